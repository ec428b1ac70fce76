"""ONNX Runtime on the CPU of any machine; :mod:`cl4wsis_serve.backends.onnxruntime_gpu` is for GPUs.

On CPUs it computes the layers of our float16 and int8 graphs in float32 and converts in between (docs/benchmarks.md).
The answers are right, and come later than those of the float32 graph.
"""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.cores import usable_cores
from cl4wsis.errors import BackendError
from cl4wsis_serve.backends.base import (
    INPUT_NAME,
    Backend,
    BackendRequest,
    Device,
    Outputs,
    check_graph,
    first_line,
)

logger = logging.getLogger(__name__)

_PROVIDER = "CPUExecutionProvider"
_NUMPY_TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}


class OnnxRuntimeBackend:
    """A graph loaded into an ONNX Runtime session.

    Args:
        request: names the graph.

    Raises:
        BackendError: onnxruntime is missing or cannot load the graph, or the graph is not the one that the manifest
            describes.
    """

    name = "onnxruntime"
    device: Device = "cpu"

    def __init__(self, request: BackendRequest) -> None:
        if request.variant.precision != "float32":
            logger.warning(
                "%s: onnxruntime computes the %s graph in float32 on a CPU, slower than the float32 graph; --backend "
                "openvino gains by it (pip install 'cl4wsis[openvino]')",
                request.model,
                request.variant.precision,
            )
        self._outputs = request.output_names
        self._session = _open_session(request)
        check_graph(request, _tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()))

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph on (B, H, W, 3) uint8 images.

        Raises:
            BackendError: the session failed, for example for want of memory.
        """
        try:
            arrays = self._session.run(self._outputs, {INPUT_NAME: images})
        except Exception as error:  # onnxruntime has no public base class for its errors
            raise BackendError(
                f"{self.name} failed on a batch of shape {images.shape}: {first_line(error)}; "
                "if memory ran out, use a smaller batch size"
            ) from error
        return dict(zip(self._outputs, arrays, strict=True))


def open_backend(request: BackendRequest) -> Backend:
    """Load a graph, see :class:`OnnxRuntimeBackend`."""
    return OnnxRuntimeBackend(request)


def why_unavailable(name: str) -> str | None:
    """Say why this backend cannot be used here, or nothing when it can; loads onnxruntime if it is installed."""
    try:
        _import_onnxruntime()
    except BackendError as error:
        return str(error)
    return None


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({first_line(error)}); run: pip install 'cl4wsis[cpu]', "
            "or 'cl4wsis[gpu]' on a machine with an NVIDIA GPU"
        ) from error
    return onnxruntime


def _open_session(request: BackendRequest) -> Any:
    runtime = _import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and what went wrong stands in them
    options.intra_op_num_threads = request.threads or usable_cores()
    # Workers that spin between operators take the cores from what reads, fits and groups images beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return runtime.InferenceSession(request.model, options, providers=[_PROVIDER])
    except Exception as error:  # onnxruntime has no public base class for its errors
        raise BackendError(
            f"{request.model}: onnxruntime {runtime.__version__} cannot load it: {first_line(error)}; "
            "update onnxruntime or export the step again"
        ) from error


def _tensors(values: Any) -> dict[str, tuple[str, list[int | str | None]]]:
    return {value.name: (_NUMPY_TYPES.get(value.type, value.type), value.shape) for value in values}
