"""What ``cl4wsis export`` makes out of a bundle: engines, a Triton model repository, OpenVINO files. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cl4wsis.bundle import Precision
    from cl4wsis_export.engines import EngineSpec


class EngineOptions(NamedTuple):
    """Options of the command line that only engines know; ``None`` or False where not given."""

    compute_capability: Sequence[str] | None
    opt_batch: int | None
    max_batch: int | None
    workspace: int | None
    hardware_level: str | None
    version_compatible: bool
    refittable: bool
    refit_from: Path | None
    engine_cache: bool

    def given(self) -> list[str]:
        """Name the options that were given, as they are spelled."""
        return [f"--{name.replace('_', '-')}" for name, value in self._asdict().items() if value]


def engine_spec(options: EngineOptions, is_rtx: bool) -> "EngineSpec":
    """Turn options into settings of a build.

    Raises:
        ConfigError: a value is impossible.
    """
    from cl4wsis.config import build_settings
    from cl4wsis_export.engines import DEFAULT_COMPUTE_CAPABILITIES, EngineSpec

    values: dict[str, Any] = {
        "opt_batch": options.opt_batch,
        "max_batch": options.max_batch,
        "workspace_mib": options.workspace,
        "hardware_level": options.hardware_level,
        "version_compatible": options.version_compatible,
        "refittable": options.refittable or options.refit_from is not None,
        "compute_capabilities": options.compute_capability or (DEFAULT_COMPUTE_CAPABILITIES if is_rtx else ()),
    }
    given = {name: value for name, value in values.items() if value is not None}
    return build_settings(EngineSpec, given, "engine options")


def default_precision(bundle: Path) -> "Precision":
    """Return float32, or what a lone graph is."""
    from cl4wsis.bundle import open_bundle

    held = [variant.precision for variant in open_bundle(bundle).manifest.variants]
    return held[0] if len(held) == 1 else "float32"


def add_engines(bundle: Path, is_rtx: bool, precisions: Sequence["Precision"], options: EngineOptions) -> list[str]:
    """Build engines of a bundle's graphs, showing how far the build is.

    Returns:
        Paths of the engines.
    """
    from cl4wsis.cli.console import progress_bar
    from cl4wsis_export import from_bundle
    from cl4wsis_export.engines import TENSORRT, TENSORRT_RTX

    library = TENSORRT_RTX if is_rtx else TENSORRT
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)
            if done >= total:
                bar.remove_task(tasks.pop(phase))

        found = from_bundle.add_engines(
            bundle,
            library,
            precisions,
            engine_spec(options, is_rtx),
            in_cache=options.engine_cache,
            refit_from=options.refit_from,
            progress=show,
        )
    return [str(engine.path) for engine in found]


def write_triton(bundle: Path, out: Path | None, precision: "Precision | None", engine: Path | None) -> list[str]:
    """Write a Triton model repository, with the graph or with one of the bundle's TensorRT engines.

    Args:
        bundle: folder or graph.
        out: the repository; ``triton`` beside the bundle when not given.
        precision: of the graph; the default of the bundle, or that of the engine, when not given.
        engine: to be served instead of the graph.

    Returns:
        Path of the model within it.

    Raises:
        BundleError: the engine is of another precision.
    """
    from cl4wsis.bundle import open_bundle
    from cl4wsis.engines import engine_at, graph_sha256
    from cl4wsis.errors import BundleError
    from cl4wsis_export.triton import write_repository

    opened = open_bundle(bundle)
    found = None if engine is None else engine_at(opened, engine)
    if found is None:
        variant = opened.variant(precision or default_precision(bundle))
    else:
        held = opened.manifest.variants
        variant = next(variant for variant in held if graph_sha256(opened, variant) == found.info.graph_sha256)
        if precision not in (None, variant.precision):
            raise BundleError(f"{engine}: is an engine of the {variant.precision} graph; leave out --precision")
    return [str(write_repository(opened, variant, out or _base(bundle).parent / "triton", found))]


def _base(bundle: Path) -> Path:
    """Return a bundle, or the one whose graph was named: what is made of it goes beside it, not into it."""
    from cl4wsis.bundle import MANIFEST_FILE

    bundle = bundle.resolve()
    return bundle.parent if bundle.is_file() and (bundle.parent / MANIFEST_FILE).is_file() else bundle


def write_openvino(bundle: Path, out: Path | None, precision: "Precision") -> list[str]:
    """Write OpenVINO's own format.

    Returns:
        Path of the folder.
    """
    from cl4wsis.bundle import PRECISION_OPTIONS, SUFFIX, open_bundle
    from cl4wsis_export.openvino import write_openvino

    opened = open_bundle(bundle)
    suffix = "" if precision == "float32" else f"-{PRECISION_OPTIONS[precision]}"
    base = _base(bundle)
    name = base.name.removesuffix(SUFFIX).removesuffix(".onnx")
    destination = out or base.with_name(f"{name.removesuffix(suffix)}{suffix}-openvino")
    return [str(write_openvino(opened, opened.variant(precision), destination))]
