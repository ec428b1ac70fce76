"""TensorRT-RTX engines, built ahead of time on the CPU: no GPU is needed here, one runs the result.

The graph is typed as it stands, so the build is strongly typed. No timing cache is given: it would ask for a GPU.
"""

import re
from collections.abc import Sequence
from typing import Any

from cl4wsis.errors import BackendError, ConfigError, require

DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
DEFAULT_MAX_BATCH = 8


def rtx_version() -> str:
    """Return the version of TensorRT-RTX.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed but cannot be loaded.
    """
    version: str = _import_rtx().__version__
    return version


def build_rtx_engine(
    graph: bytes,
    input_size: tuple[int, int],
    compute_capabilities: Sequence[str] = DEFAULT_COMPUTE_CAPABILITIES,
    max_batch: int = DEFAULT_MAX_BATCH,
) -> bytes:
    """Build an engine from an exported graph.

    Args:
        graph: contents of ``model.onnx``.
        input_size: (height, width) of the network input, px.
        compute_capabilities: GPUs it shall run on, such as ``8.6``.
        max_batch: largest batch it shall accept; the smallest is 1.

    Returns:
        The engine's bytes.

    Raises:
        ConfigError: TensorRT-RTX knows no such compute capability.
        MissingExtraError: TensorRT-RTX is not installed.
        BackendError: TensorRT-RTX cannot be loaded, or does not accept the graph; the message holds what it said.
    """
    trt = _import_rtx()
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(graph):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise BackendError(f"TensorRT-RTX {trt.__version__} cannot read the graph: {errors}")
    config = builder.create_builder_config()
    _target(trt, config, compute_capabilities)
    profile = builder.create_optimization_profile()
    frame = (*input_size, 3)
    profile.set_shape(network.get_input(0).name, (1, *frame), (1, *frame), (max_batch, *frame))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(
            f"TensorRT-RTX {trt.__version__} built no engine: {log.last_error}; the ONNX bundle runs without it"
        )
    return bytes(engine)


class _Log:
    """A logger that keeps what went wrong for the error message."""

    def __init__(self, trt: Any) -> None:
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                    log.last_error = message

        self.last_error = "no reason was given"
        self.logger = Logger()


def _import_rtx() -> Any:
    require("trt-rtx")
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        raise BackendError(f"TensorRT-RTX is installed but cannot be loaded: {error}") from error
    return tensorrt_rtx


def _target(trt: Any, config: Any, compute_capabilities: Sequence[str]) -> None:
    known = {
        f"{match[1]}.{match[2]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if (match := re.fullmatch(r"SM(\d+)(\d)", name))
    }
    unknown = [wanted for wanted in compute_capabilities if wanted not in known]
    if unknown or not compute_capabilities:
        raise ConfigError(
            f"--compute-capability {' '.join(unknown)}: TensorRT-RTX {trt.__version__} builds for "
            f"{', '.join(sorted(known, key=float))}; for other GPUs use the ONNX bundle"
        )
    config.num_compute_capabilities = len(compute_capabilities)
    for index, wanted in enumerate(compute_capabilities):
        if not config.set_compute_capability(known[wanted], index):
            raise BackendError(f"TensorRT-RTX {trt.__version__} refuses to build for compute capability {wanted}")
