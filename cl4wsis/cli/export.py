"""``cl4wsis export``: turn a trained step into a verified bundle."""

import logging
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl4wsis.cli.options import ConfigOption, JsonOption, MethodOption, PresetOption, RunOption

if TYPE_CHECKING:
    from cl4wsis.bundle import Manifest
    from cl4wsis.steps import StepInfo

_RTX_COMPUTE_CAPABILITIES = ["8.0", "8.6", "8.9", "12.0"]


class PrecisionOption(StrEnum):
    """Arithmetic of the network."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class ExportFormat(StrEnum):
    """What a bundle holds beside the ONNX graph."""

    ONNX = "onnx"
    TENSORRT = "trt"
    TENSORRT_RTX = "trt-rtx"


def export(
    config: ConfigOption = "shapes",
    step: Annotated[int | None, typer.Option(help="Step to export; the newest trained one when not given.")] = None,
    run: RunOption = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Bundle folder; <run>/<plan>-step<t>.cl4wsis when not given.")
    ] = None,
    format: Annotated[
        ExportFormat,
        typer.Option("--format", "-f", help="onnx runs everywhere; trt-rtx adds engines, built without a GPU."),
    ] = ExportFormat.ONNX,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option("--compute-capability", help="With trt-rtx: a GPU to build for, e.g. 8.6. Repeatable."),
    ] = None,
    precision: Annotated[
        list[PrecisionOption] | None,
        typer.Option("--precision", help="Arithmetic of a graph to write: fp32 is always there. Repeatable."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the export, e.g. grouping.profile=fast."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a trained step with its post-processing as one ONNX graph, checked against the network it came from."""
    from cl4wsis.bundle import open_bundle
    from cl4wsis.cli.console import note, print_json
    from cl4wsis.errors import BackendError, require
    from cl4wsis.steps import read_step
    from cl4wsis.tasks import load_plan

    if compute_capability and format is not ExportFormat.TENSORRT_RTX:
        raise typer.BadParameter("--compute-capability belongs to --format trt-rtx")
    plan = load_plan(config, [f"recipe.method={method}"] if method else [], preset)
    run = run or Path("runs") / plan.name
    folder = _find_step(run, step, plan.recipe.variant)
    info = read_step(folder)
    require("export")
    require("cpu")
    if format is ExportFormat.TENSORRT:
        from cl4wsis_export.tensorrt import explain_tensorrt

        raise BackendError(explain_tensorrt(info.input.size))
    from cl4wsis_export import export_step, spec_for_step

    overrides = list(settings or [])
    if format is ExportFormat.TENSORRT_RTX:
        chosen = compute_capability or _RTX_COMPUTE_CAPABILITIES
        overrides.append(f"compute_capabilities={chosen!r}")
    if precision:
        overrides.append(f"precisions={_precisions(precision)!r}")
    spec = spec_for_step(info, overrides)
    destination = out or folder.parent / f"{info.plan.name}-step{info.step}.cl4wsis"
    note(f"exporting {folder} to {destination}")
    _show_progress()
    lower = set(spec.precisions) - {"float32"}
    images = _evaluation_images(info, max(spec.verification_images, spec.precision_images if lower else 0))
    calibration = _calibration_images(info, spec.calibration_images, spec.seed) if "int8" in lower else None
    path = export_step(folder, destination, spec, images, calibration)
    manifest = open_bundle(path).manifest
    if as_json:
        print_json({"bundle": str(path), **manifest.model_dump(mode="json", exclude={"training", "accuracy"})})
    else:
        _print_result(path, manifest)


def _find_step(run: Path, step: int | None, variant: str) -> Path:
    from cl4wsis.errors import RunError
    from cl4wsis.steps import step_folder, trained_steps

    steps = trained_steps(run, variant)
    if not steps:
        raise RunError(f"{run}: holds no trained step; run 'cl4wsis train-step' first, or name the folder with --run")
    if step is not None and step not in steps:
        raise RunError(f"{run}: step {step} is not trained; trained are {', '.join(map(str, steps))}")
    return step_folder(run, steps[-1] if step is None else step, variant)


def _evaluation_images(info: "StepInfo", count: int) -> Sequence[Any] | None:
    """Return the first evaluation images of the plan, or none where they are not at hand: shapes are drawn then."""
    from cl4wsis.cli.console import note
    from cl4wsis.datasets import load_evaluation_set
    from cl4wsis.errors import DataError

    try:
        samples = load_evaluation_set(info.plan, info.step)
        return [samples[index].image for index in range(min(count, len(samples)))]
    except DataError as error:
        note(f"verifying on drawn shapes, since the plan's images are not at hand: {error}")
        return None


def _precisions(options: Sequence[PrecisionOption]) -> list[str]:
    from cl4wsis.bundle import PRECISION_OPTIONS

    return [precision for precision, spelling in PRECISION_OPTIONS.items() if spelling in options]


def _calibration_images(info: "StepInfo", count: int, seed: int) -> Sequence[Any] | None:
    """Return training images of the plan, balanced over its classes, or none where they are not at hand."""
    from cl4wsis.cli.console import note
    from cl4wsis.errors import DataError
    from cl4wsis_export.calibration import calibration_images

    try:
        return calibration_images(info.plan, info.step, count, seed)
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


def _print_result(path: Path, manifest: "Manifest") -> None:
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
