"""Building engines: one strongly typed path for TensorRT (10.12 on, and 11) and TensorRT-RTX.

Both libraries have the same builder, parser and profiles under different module names, so the module is a value here.
What differs is written down in :class:`Library` and in :func:`_apply_target`, and nowhere else. Precision lies in the
graph; no flag of the builder changes it, and TF32, which would round float32 products to the mantissa of half
precision, is switched off.

A build runs in a thread of its own, so that Ctrl-C reaches this process while the builder works in C++: the progress
monitor then tells the builder to stop, and nothing is written.
"""

import importlib
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cl4wsis.bundle import EngineInfo, HardwareLevel
from cl4wsis.config import Settings
from cl4wsis.engines import Machine
from cl4wsis.errors import BackendError, ConfigError, require
from cl4wsis_export.inspection import check_built_types, check_types, network_types, program_types

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a phase of the build, its steps done and all its steps; from the thread of the build."""

_MIB = 1 << 20
_POLL_SECONDS = 0.1
_OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|insufficient (device )?memory|cudaErrorMemoryAllocation", re.I)
_HARDWARE_LEVELS: dict[HardwareLevel, str] = {
    "none": "NONE",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
    "ampere-plus": "AMPERE_PLUS",
}


@dataclass(frozen=True)
class Library:
    """What tells the two libraries apart.

    Attributes:
        name: as it stands in the manifest.
        title: as people write it.
        module: to import.
        extra: that installs it.
        minimum: oldest version that works.
        needs_gpu: whether it builds only on a machine with a GPU, and for that GPU.
        refit_needs_gpu: whether a refittable engine needs a GPU to be built.
    """

    name: Literal["tensorrt", "tensorrt-rtx"]
    title: str
    module: str
    extra: str
    minimum: tuple[int, int]
    needs_gpu: bool
    refit_needs_gpu: bool


TENSORRT = Library("tensorrt", "TensorRT", "tensorrt", "trt", (10, 12), needs_gpu=True, refit_needs_gpu=True)
TENSORRT_RTX = Library(
    "tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "trt-rtx", (1, 2), needs_gpu=False, refit_needs_gpu=True
)
DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
"""GPUs for which a TensorRT-RTX engine is built where none is named."""


class EngineSpec(Settings):
    """Settings of a build."""

    min_batch: int = Field(1, ge=1)
    """Smallest batch the engine accepts."""
    opt_batch: int = Field(1, ge=1)
    """Batch for which the fastest kernels are chosen."""
    max_batch: int = Field(8, ge=1)
    """Largest batch the engine accepts."""
    workspace_mib: int | None = Field(None, ge=1)
    """Limit of the memory of one layer, MiB; all of the GPU's when not given."""
    hardware_level: HardwareLevel = "none"
    """On which other GPUs the engine shall run, at the cost of speed; TensorRT only."""
    version_compatible: bool = False
    """Let later versions of TensorRT load the engine, at the cost of speed; TensorRT only."""
    refittable: bool = False
    """Let weights of another checkpoint of the same step be put into the engine later."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to build for, such as ``8.6``; TensorRT-RTX only."""

    @field_validator("compute_capabilities")
    @classmethod
    def _in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Sort them, each once: an engine is found again however they are written."""
        return tuple(sorted(set(names), key=lambda name: (len(name), name)))

    @model_validator(mode="after")
    def _check_batches(self) -> "EngineSpec":
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError(f"batches must not fall: min {self.min_batch}, opt {self.opt_batch}, max {self.max_batch}")
        return self


@dataclass(frozen=True)
class BuiltEngine:
    """Result of a build.

    Attributes:
        content: the serialised engine.
        types: layers with weights by the arithmetic that was read back.
        timing_cache: what the builder has measured, for the next build; none for TensorRT-RTX.
    """

    content: bytes
    types: dict[str, int]
    timing_cache: bytes | None


def load_library(library: Library) -> Any:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it cannot be loaded, or is too old to build strongly typed networks as they are exported.
    """
    require(library.extra)
    try:
        trt = importlib.import_module(library.module)
    except (ImportError, OSError) as error:
        raise BackendError(f"{library.title} is installed but cannot be loaded: {error}") from error
    check_version(library, trt.__version__)
    return trt


def check_version(library: Library, version: str) -> None:
    """Refuse a version that is too old.

    Raises:
        BackendError: it is.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version))[:2]
    if numbers < library.minimum:
        raise BackendError(
            f"{library.title} {version} is installed, but at least {'.'.join(map(str, library.minimum))} is needed; "
            f"run: pip install --upgrade 'cl4wsis[{library.extra}]'"
        )


def describe_engine(
    library: Library, trt: Any, graph_sha256: str, spec: EngineSpec, machine: Machine | None
) -> EngineInfo:
    """Describe an engine that is to be built.

    Args:
        library: which of the two.
        trt: its module.
        graph_sha256: of the graph.
        spec: settings.
        machine: this one, if the library builds for its GPU alone.
    """
    return EngineInfo(
        file="engines/none",
        runtime=f"{library.name} {trt.__version__}",
        compute_capabilities=(machine.compute_capability,) if machine else spec.compute_capabilities,
        min_batch=spec.min_batch,
        opt_batch=spec.opt_batch,
        max_batch=spec.max_batch,
        graph_sha256=graph_sha256,
        gpu=machine.gpu if machine else None,
        driver=machine.driver if machine else None,
        platform=machine.platform if machine else "",  # those of TensorRT-RTX run on Linux and Windows alike
        hardware_level=spec.hardware_level,
        version_compatible=spec.version_compatible,
        refittable=spec.refittable,
        workspace_mib=spec.workspace_mib,
    )


def build_engine(
    library: Library,
    trt: Any,
    graph: Path | bytes,
    spec: EngineSpec,
    stated_types: dict[str, int] | None = None,
    timing_cache: bytes | None = None,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Build an engine and read back in which arithmetic it computes.

    The types of all layers with weights are compared with those the graph states, in the strongly typed network
    definition; where the engine itself can be read without a GPU (TensorRT-RTX), each precision must appear in it too.
    :func:`cl4wsis_export.refit.inspect_engine` looks at an engine that is loaded.

    Args:
        library: which of the two.
        trt: its module, by :func:`load_library`.
        graph: an exported ``.onnx`` file, or its contents if it holds its weights itself.
        spec: settings.
        stated_types: layers with weights by arithmetic, as the manifest states them; not checked when not given.
        timing_cache: of an earlier build on this machine; TensorRT only.
        progress: told how far the build is.

    Raises:
        ConfigError: the library does not know a compute capability, or cannot do what the settings ask for.
        BackendError: there is no GPU where one is needed, the graph is not accepted, its precision was not honoured, or
            memory ran out; the message holds what the builder said and what to do.
        KeyboardInterrupt: the user has interrupted the build; it has ended.
    """
    log = Log(trt)
    builder = _create_builder(library, trt, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    where = graph.name if isinstance(graph, Path) else "the graph"
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector would know no types
    if spec.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mib * _MIB)
    _apply_target(library, trt, config, spec)
    _parse(library, trt, network, graph, log)
    types = network_types(network)
    check_types(types, stated_types or {}, where)
    cache = _attach_timing_cache(library, config, timing_cache)
    _add_profile(builder, network, config, spec)
    content = _run(library, trt, builder, network, config, spec, log, progress)
    if library.name == "tensorrt-rtx":
        built = program_types(content)
        check_built_types(built, types, where)
        types = built or types
    return BuiltEngine(content, types, bytes(cache.serialize()) if cache is not None else None)


def check_capabilities(wanted: Sequence[str]) -> dict[str, Any]:
    """Check that TensorRT-RTX can build for these GPUs.

    Args:
        wanted: compute capabilities such as ``8.6``.

    Returns:
        All compute capabilities that it knows.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        BackendError: it cannot be loaded.
        ConfigError: it does not know one, or none is named.
    """
    trt = load_library(TENSORRT_RTX)
    known = {
        f"{match[1]}.{match[2]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if (match := re.fullmatch(r"SM(\d+)(\d)", name))
    }
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"--compute-capability {' '.join(unknown)}: TensorRT-RTX {trt.__version__} builds for "
            f"{', '.join(sorted(known, key=float))}; for other GPUs use the ONNX bundle or --format trt"
        )
    return known


class Log:
    """A logger for the library that keeps what went wrong for the error message.

    Args:
        trt: module of the library.
    """

    def __init__(self, trt: Any) -> None:
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    log.errors.append(message)

        self.errors: list[str] = []
        self.logger = Logger()

    @property
    def last_error(self) -> str:
        """What went wrong last."""
        return self.errors[-1] if self.errors else "no reason was given"


def explain_failure(library: Library, version: str, errors: list[str], spec: EngineSpec) -> str:
    """Say why there is no engine, and what to do.

    Args:
        library: which of the two.
        version: of the library.
        errors: what it logged.
        spec: settings of the build.
    """
    reason = errors[-1] if errors else "no reason was given"
    memory = next((error for error in errors if _OUT_OF_MEMORY.search(error)), None)
    if memory is not None:
        limit = "" if spec.workspace_mib is None else f" (now {spec.workspace_mib} MiB)"
        return (
            f"{library.title} {version} ran out of memory: {memory}; build for a smaller batch with --max-batch (now "
            f"{spec.max_batch}), limit the memory of a layer with --workspace{limit}, or close what else uses the GPU"
        )
    if spec.refittable and library.refit_needs_gpu and "CUDA_SUCCESS" in reason:
        return (
            f"{library.title} {version} built no engine: --refittable needs a GPU at the time of the build, and none "
            f"answered ({reason}); build without --refittable, or on a machine with a GPU"
        )
    return f"{library.title} {version} built no engine: {reason}; the ONNX bundle runs without it"


def _create_builder(library: Library, trt: Any, log: Log) -> Any:
    try:
        return trt.Builder(log.logger)
    except (TypeError, RuntimeError) as error:  # what the bindings raise when the library gives no builder
        reason = log.errors[-1] if log.errors else str(error)
        raise BackendError(
            f"{library.title} {trt.__version__} cannot start: {reason}; it needs an NVIDIA GPU and its driver: check "
            "nvidia-smi, or use --format trt-rtx, which builds without a GPU"
        ) from error


def _parse(library: Library, trt: Any, network: Any, graph: Path | bytes, log: Log) -> None:
    parser = trt.OnnxParser(network, log.logger)
    accepted = parser.parse_from_file(str(graph)) if isinstance(graph, Path) else parser.parse(graph)
    if not accepted:
        errors = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise BackendError(f"{library.title} {trt.__version__} cannot read the graph: {errors or log.last_error}")


def _apply_target(library: Library, trt: Any, config: Any, spec: EngineSpec) -> None:
    """Say for which machines the engine shall be: the one part in which the two libraries differ."""
    if spec.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if library.name == "tensorrt":
        if spec.compute_capabilities:
            raise ConfigError(
                "--compute-capability belongs to --format trt-rtx: TensorRT builds for the GPU of this machine; "
                "--hardware-level makes its engine run on others"
            )
        config.hardware_compatibility_level = getattr(
            trt.HardwareCompatibilityLevel, _HARDWARE_LEVELS[spec.hardware_level]
        )
        if spec.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        return
    if spec.hardware_level != "none" or spec.version_compatible:
        raise ConfigError(
            "--hardware-level and --version-compatible belong to --format trt: a TensorRT-RTX engine is for the "
            "compute capabilities named with --compute-capability, and for one version"
        )
    known = check_capabilities(spec.compute_capabilities)
    config.num_compute_capabilities = len(spec.compute_capabilities)
    for index, wanted in enumerate(spec.compute_capabilities):
        if not config.set_compute_capability(known[wanted], index):
            raise BackendError(f"{library.title} {trt.__version__} refuses to build for compute capability {wanted}")


def _attach_timing_cache(library: Library, config: Any, content: bytes | None) -> Any | None:
    """Let the builder use and extend what it measured before; TensorRT-RTX would ask for a GPU then."""
    if library.name == "tensorrt-rtx":
        return None
    cache = config.create_timing_cache(content or b"")
    if not config.set_timing_cache(cache, False):
        logger.warning("the timing cache is of another GPU or version; starting a new one")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _add_profile(builder: Any, network: Any, config: Any, spec: EngineSpec) -> None:
    image = network.get_input(0)
    frame = tuple(image.shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, *((batch, *frame) for batch in (spec.min_batch, spec.opt_batch, spec.max_batch)))
    config.add_optimization_profile(profile)


def _run(
    library: Library,
    trt: Any,
    builder: Any,
    network: Any,
    config: Any,
    spec: EngineSpec,
    log: Log,
    progress: Progress | None,
) -> bytes:
    """Build in another thread and wait for it, passing an interruption on to the builder."""
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    results: list[Any] = []
    ended = threading.Event()

    def build() -> None:
        try:
            results.append(builder.build_serialized_network(network, config))
        finally:
            ended.set()

    threading.Thread(target=build, name="cl4wsis-build").start()
    interrupted = False
    while not ended.is_set():  # an interrupted join() of Python 3.11 and 3.12 takes a running thread for one that ended
        try:
            ended.wait(_POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = monitor.cancelled = True
            logger.info("interrupted; waiting for the builder to stop")
    if interrupted:
        raise KeyboardInterrupt
    if not results or results[0] is None:
        raise BackendError(explain_failure(library, trt.__version__, log.errors, spec))
    return bytes(results[0])


def _monitor(trt: Any, progress: Progress | None) -> Any:
    """Make a progress monitor that stops the build once it is cancelled."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.pop(phase_name, 0))

        def _tell(self, phase: str, done: int) -> None:
            if progress is not None and not self.cancelled:
                progress(phase, done, self._steps.get(phase, done))

    return Monitor()
