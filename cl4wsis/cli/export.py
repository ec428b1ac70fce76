"""``cl4wsis export``: turn a trained step into a verified bundle."""

import logging
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl4wsis.cli.options import (
    ConfigOption,
    JsonOption,
    MethodOption,
    PrecisionName,
    PresetOption,
    RunOption,
    load_chosen_plan,
    read_precisions,
)

if TYPE_CHECKING:
    from cl4wsis.bundle import Manifest
    from cl4wsis.cli.derive import EngineOptions
    from cl4wsis.steps import StepInfo
    from cl4wsis.tasks import Plan


class ExportFormat(StrEnum):
    """What a bundle holds beside the ONNX graph, or what is made out of a bundle."""

    ONNX = "onnx"
    TENSORRT = "trt"
    TENSORRT_RTX = "trt-rtx"
    TRITON = "triton"
    OPENVINO = "openvino"


class HardwareOption(StrEnum):
    """On which other GPUs a TensorRT engine shall run."""

    NONE = "none"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"
    AMPERE_PLUS = "ampere-plus"


_DEFAULT_PLAN = "shapes"
_ENGINES = (ExportFormat.TENSORRT, ExportFormat.TENSORRT_RTX)
_FOLDERS = (ExportFormat.TRITON, ExportFormat.OPENVINO)


def export(
    config: ConfigOption = _DEFAULT_PLAN,
    step: Annotated[int | None, typer.Option(help="Step to export; the newest trained one when not given.")] = None,
    run: RunOption = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Bundle folder or .onnx file to start from instead of a trained step; needs no torch.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Bundle folder; <plan>-step<t>.cl4wsis beside the step when not given. With triton or openvino: "
            "folder for them, beside the bundle when not given.",
        ),
    ] = None,
    format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            "-f",
            help="onnx runs everywhere; trt adds engines for the GPU of this machine, trt-rtx engines built without a "
            "GPU; triton writes a model repository, openvino OpenVINO's own format.",
        ),
    ] = ExportFormat.ONNX,
    precision: Annotated[
        list[PrecisionName] | None,
        typer.Option(
            "--precision",
            help="Arithmetic of a graph to write (fp32 is always there), or with --from of the graphs to use. "
            "Repeatable.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            help="With trt-rtx: a GPU to build for; 8.0, 8.6, 8.9 and 12.0 when not given. Repeatable.",
        ),
    ] = None,
    opt_batch: Annotated[
        int | None, typer.Option("--opt-batch", min=1, help="Engines: batch to be fastest at; 1 when not given.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option("--max-batch", min=1, help="Engines: largest batch; 8 when not given.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option("--workspace", min=1, help="Engines: limit of the memory of one layer, MiB.")
    ] = None,
    hardware_level: Annotated[
        HardwareOption | None,
        typer.Option("--hardware-level", help="With trt: on which other GPUs the engine shall run, more slowly."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="With trt: let later versions of TensorRT load the engine.")
    ] = False,
    refittable: Annotated[
        bool,
        typer.Option("--refittable", help="Engines: let weights of another checkpoint of this step be put in later."),
    ] = False,
    refit_from: Annotated[
        Path | None,
        typer.Option(
            "--refit-from",
            help="Take the refittable engine of this bundle and give it the new weights, without a build.",
            show_default=False,
        ),
    ] = None,
    engine_cache: Annotated[
        bool,
        typer.Option(
            "--engine-cache", help="Put engines into the user's cache folder ($CL4WSIS_CACHE), not into the bundle."
        ),
    ] = False,
    engine: Annotated[
        Path | None,
        typer.Option(
            "--engine",
            help="With triton and --from: serve this TensorRT engine of the bundle, not the graph.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the export, e.g. grouping.profile=fast."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a trained step with its post-processing as one ONNX graph, checked against the network it came from."""
    from cl4wsis.bundle import check_destination, open_bundle
    from cl4wsis.cli.console import note, print_json
    from cl4wsis.cli.derive import EngineOptions
    from cl4wsis.errors import require
    from cl4wsis.steps import read_plan_step, read_step

    options = EngineOptions(
        compute_capability,
        opt_batch,
        max_batch,
        workspace,
        None if hardware_level is None else hardware_level.value,
        version_compatible,
        refittable,
        refit_from,
        engine_cache,
    )
    of_training = {
        "--config": config != _DEFAULT_PLAN,
        "--step": step is not None,
        "--run": run is not None,
        "--preset": preset is not None,
        "--method": method is not None,
        "--set": bool(settings),
    }
    _check_options(format, options, source, out, [name for name, is_given in of_training.items() if is_given])
    if format in _FOLDERS and len(set(precision or [])) > 1:
        raise typer.BadParameter(f"--format {format.value} takes one --precision")
    if engine is not None and (format is not ExportFormat.TRITON or source is None):
        raise typer.BadParameter("--engine belongs to --format triton with --from")
    if source is not None:
        _show_progress()
        _print_derived(source, _derive(source, format, out, precision, options, engine), as_json)
        return
    plan = load_chosen_plan(config, None, preset, method)
    run = run or Path("runs") / plan.name
    folder = _find_step(run, step, plan.recipe.variant)
    info = read_step(folder)
    if config != _DEFAULT_PLAN:  # without --config, a step is what it says it is
        read_plan_step(plan, info.step, run)
    require("export")
    require("cpu")
    _check_target(format, options, info, out)
    default = folder.parent / f"{info.plan.name}-step{info.step}.cl4wsis"
    destination = default if out is None or format in _FOLDERS else out
    check_destination(destination)
    from cl4wsis_export import export_step, spec_for_step

    overrides = list(settings or [])
    if precision:
        overrides.append(f"precisions={read_precisions(precision)!r}")
    spec = spec_for_step(info, overrides)
    note(f"exporting {folder} to {destination}")
    _show_progress()
    lower = set(spec.precisions) - {"float32"}
    source_plan = plan if config != _DEFAULT_PLAN else info.plan  # the plan that is named says where its images lie now
    count = max(spec.verification_images, spec.precision_images if lower else 0)
    images = _evaluation_images(source_plan, info.step, count)
    calibration = None
    if "int8" in lower:
        calibration = _calibration_images(source_plan, info.step, spec.calibration_images, spec.seed)
    path = export_step(folder, destination, spec, images, calibration)
    derived = [] if format is ExportFormat.ONNX else _derive(path, format, out, precision, options)
    manifest = open_bundle(path).manifest
    if as_json:
        written = {"written": derived} if format in _FOLDERS else {}
        print_json(
            {"bundle": str(path), **written, **manifest.model_dump(mode="json", exclude={"training", "accuracy"})}
        )
    else:
        _print_result(path, manifest, derived if format in _FOLDERS else [])


def _check_options(
    format: ExportFormat,
    options: "EngineOptions",
    source: Path | None,
    out: Path | None,
    of_training: Sequence[str],
) -> None:
    """Refuse options that would have no effect."""
    if options.compute_capability and format is not ExportFormat.TENSORRT_RTX:
        raise typer.BadParameter("--compute-capability belongs to --format trt-rtx")
    if (options.hardware_level or options.version_compatible) and format is not ExportFormat.TENSORRT:
        raise typer.BadParameter("--hardware-level and --version-compatible belong to --format trt")
    if options.given() and format not in _ENGINES:
        raise typer.BadParameter(f"{', '.join(options.given())} belongs to --format trt or trt-rtx")
    if source is not None and format is ExportFormat.ONNX:
        raise typer.BadParameter(
            "--from needs --format trt, trt-rtx, triton or openvino: a bundle holds its ONNX graphs"
        )
    if source is not None and of_training:
        raise typer.BadParameter(f"{', '.join(of_training)}: for the export of a trained step, not for --from")
    if source is not None and out is not None and format in _ENGINES:
        raise typer.BadParameter("--out: engines go into the bundle of --from, or with --engine-cache into the cache")


def _check_target(format: ExportFormat, options: "EngineOptions", info: "StepInfo", out: Path | None) -> None:
    """Find out what is missing for a format, or in its way, before the long work of the export."""
    from cl4wsis.cli.derive import engine_spec
    from cl4wsis.errors import require

    if format is ExportFormat.TENSORRT:
        from cl4wsis_export.tensorrt import require_tensorrt

        require_tensorrt(info.input.size, engine_spec(options, is_rtx=False))
    elif format is ExportFormat.TENSORRT_RTX:
        from cl4wsis_export.engines import check_capabilities

        check_capabilities(engine_spec(options, is_rtx=True).compute_capabilities)
    elif format is ExportFormat.OPENVINO:
        require("openvino")
        if out is not None:
            from cl4wsis_export import openvino

            openvino.check_destination(out)
    elif format is ExportFormat.TRITON and out is not None:
        from cl4wsis_export import triton

        triton.check_destination(out / triton.model_name(info.plan.name))


def _derive(
    bundle: Path,
    format: ExportFormat,
    out: Path | None,
    precision: Sequence[PrecisionName] | None,
    options: "EngineOptions",
    engine: Path | None = None,
) -> list[str]:
    """Make something out of a bundle, and return the paths of what was written."""
    from cl4wsis.cli import derive

    given = read_precisions(precision)
    if format is ExportFormat.TRITON:
        return derive.write_triton(bundle, out, given[0] if given else None, engine)
    precisions = given or [derive.default_precision(bundle)]
    if format in _ENGINES:
        return derive.add_engines(bundle, format is ExportFormat.TENSORRT_RTX, precisions, options)
    return derive.write_openvino(bundle, out, precisions[0])


def _print_derived(source: Path, written: list[str], as_json: bool) -> None:
    from cl4wsis.cli.console import print_fields, print_json

    if as_json:
        print_json({"bundle": str(source), "written": written})
    else:
        print_fields(str(source), [("written", path) for path in written])


def _find_step(run: Path, step: int | None, variant: str) -> Path:
    from cl4wsis.errors import RunError
    from cl4wsis.steps import step_folder, trained_steps

    steps = trained_steps(run, variant)
    if not steps:
        raise RunError(f"{run}: holds no trained step; run 'cl4wsis train-step' first, or name the folder with --run")
    if step is not None and step not in steps:
        raise RunError(f"{run}: step {step} is not trained; trained are {', '.join(map(str, steps))}")
    return step_folder(run, steps[-1] if step is None else step, variant)


def _evaluation_images(plan: "Plan", step: int, count: int) -> Sequence[Any] | None:
    """Return the first evaluation images of the plan, or none where they are not at hand: shapes are drawn then."""
    from cl4wsis.cli.console import note
    from cl4wsis.datasets import load_evaluation_set
    from cl4wsis.errors import DataError

    try:
        samples = load_evaluation_set(plan, step)
        return [samples[index].image for index in range(min(count, len(samples)))]
    except DataError as error:
        note(f"verifying on drawn shapes, since the plan's images are not at hand: {error}")
        return None


def _calibration_images(plan: "Plan", step: int, count: int, seed: int) -> Sequence[Any] | None:
    """Return training images of the plan, balanced over its classes, or none where they are not at hand."""
    from cl4wsis.cli.console import note
    from cl4wsis.errors import DataError
    from cl4wsis_export.calibration import calibration_images

    try:
        return calibration_images(plan, step, count, seed)
    except DataError as error:
        note(f"calibrating on drawn shapes, since the plan's images are not at hand: {error}")
        return None


def _show_progress() -> None:
    """Let the log lines of the export reach stderr."""
    from cl4wsis.cli.console import note

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    logger = logging.getLogger("cl4wsis_export")
    logger.handlers = [Notes()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _print_result(path: Path, manifest: "Manifest", written: Sequence[str]) -> None:
    from cl4wsis.cli.console import print_fields

    check = manifest.verification
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    fields: list[tuple[str, object]] = [
        ("classes", ", ".join(info.name for info in manifest.classes)),
        ("input", f"{manifest.input.size[0]}x{manifest.input.size[1]} px, uint8 RGB, any batch size"),
        ("grouping", f"{manifest.grouping.profile}, at most {manifest.grouping.max_instances} instances"),
        ("graph", f"opset {manifest.graph.opset}, {sum(manifest.graph.operators.values())} nodes"),
        ("size", f"{size / 1e6:.1f} MB"),
        ("graphs", _describe_variants(path, manifest)),
        ("engines", ", ".join(engine.file for engine in manifest.engines) or None),
        *(("written", folder) for folder in written),
    ]
    if check is not None:
        fields += [
            ("instances as in the reference", f"{check.matched:.2%} of {check.instances} on {check.images} images"),
            ("pixels that differ from torch", f"{check.differing_pixels:.3%} at most"),
        ]
    print_fields(str(path), fields)


def _describe_variants(path: Path, manifest: "Manifest") -> str:
    """Name every graph with its size, and how well a lower precision agrees with float32."""
    texts = []
    for variant in manifest.variants:
        size = (path / variant.file).stat().st_size / 1e6
        agreement = variant.agreement if variant.post == "graph" else None
        agrees = f", {agreement.matched:.1%} of instances as in float32" if agreement is not None else ""
        texts.append(f"{variant.file} ({variant.precision}, post={variant.post}, {size:.1f} MB{agrees})")
    return "; ".join(texts)
