"""TensorRT and TensorRT-RTX: an engine on an NVIDIA GPU, without torch and without ONNX Runtime.

Everything runs on a stream of its own between page-locked host buffers and device buffers that are made once per batch
size. Batches are of few sizes, so that each has its own context with fixed shapes and addresses. What TensorRT does for
one is captured as one CUDA graph, copies included; TensorRT-RTX captures by itself.

Only an engine that was built for this machine and that this user trusts is loaded, see :mod:`cl4wsis.engines`. It is
loaded without leave to run code of the host.
"""

import ctypes
import importlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.bundle import TensorInfo
from cl4wsis.engines import FoundEngine, Machine, check_cuda, cuda_runtime, find_engine, find_machine
from cl4wsis.errors import BackendError, MissingExtraError, require
from cl4wsis_serve.backends.base import (
    INPUT_NAME,
    Backend,
    BackendRequest,
    Device,
    Outputs,
    TensorShapes,
    check_graph,
    first_line,
)
from cl4wsis_serve.backends.buckets import choose_bucket, fill_batch, run_in_parts, usable_buckets

logger = logging.getLogger(__name__)

_ALIGNMENT = 256

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "trt", "tensorrt-rtx": "trt-rtx"}
_NUMPY_TYPES = {"UINT8": "uint8", "INT32": "int32", "FLOAT": "float32"}


class TensorRtBackend:
    """An engine loaded onto the first GPU that CUDA shows.

    Args:
        request: names the graph; the engine built from it is looked up.

    Raises:
        BackendError: the library or the GPU is missing, no engine fits, or it cannot be loaded; the message says why
            and how to build one.
    """

    device: Device = "cuda"

    def __init__(self, request: BackendRequest) -> None:
        self._name = request.name
        self._trt = _import(request.name)
        self._cuda = cuda_runtime()
        machine = find_machine()
        found = find_engine(request.bundle, request.variant, request.name, self._trt.__version__, machine)
        self._engine, self._kept = _load(self._trt, found, machine)
        check_graph(request, *_tensors(self._trt, self._engine))
        self._inputs, self._outputs = request.manifest.inputs, request.outputs
        self._buckets = usable_buckets(found.info.min_batch, found.info.max_batch)
        flags = self._cuda.cudaStreamNonBlocking
        self._stream = check_cuda(self._cuda, self._cuda.cudaStreamCreateWithFlags(flags), "make a stream")
        self._slots: dict[int, _Slot] = {}

    @property
    def name(self) -> str:
        """``tensorrt`` or ``tensorrt-rtx``."""
        return self._name

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the engine on (B, H, W, 3) uint8 images; batches larger than the largest bucket run in parts.

        Raises:
            BackendError: CUDA or the engine failed, for example for want of memory.
        """
        return run_in_parts(self._run_bucket, images, self._buckets[-1])

    def _run_bucket(self, images: NDArray[np.uint8]) -> Outputs:
        bucket = choose_bucket(len(images), self._buckets)
        if bucket not in self._slots:
            self._slots[bucket] = _Slot(self, bucket)
        slot = self._slots[bucket]
        fill_batch(slot.layout.view(slot.host, INPUT_NAME), images)
        slot.launch()
        check_cuda(self._cuda, self._cuda.cudaStreamSynchronize(self._stream), "run the engine")
        return {tensor.name: slot.layout.view(slot.host, tensor.name)[: len(images)].copy() for tensor in self._outputs}

    def close(self) -> None:
        """Give back buffers, graphs and the stream."""
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
        if self._stream is not None:
            self._cuda.cudaStreamDestroy(self._stream)
            self._stream = None

    def __del__(self) -> None:
        """Give back what the device holds; nothing can be reported here."""
        if getattr(self, "_stream", None) is not None:
            self.close()


@dataclass(frozen=True)
class BufferLayout:
    """Where the tensors of one batch size lie within one buffer, the inputs first.

    Attributes:
        tensors: type, shape and offset in bytes, by name; the name is that of the graph.
        input_bytes: size of the part that goes to the device.
        total_bytes: size of the buffer.
    """

    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    input_bytes: int
    total_bytes: int

    @classmethod
    def plan(cls, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], batch: int) -> "BufferLayout":
        """Lay the tensors out one after the other, each at a multiple of 256 bytes, as CUDA wants it.

        Args:
            inputs: of the graph.
            outputs: of the graph.
            batch: number of images.
        """
        tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...], int]] = {}
        offset = input_bytes = 0
        for index, tensor in enumerate((*inputs, *outputs)):
            input_bytes = offset if index == len(inputs) else input_bytes
            dtype = np.dtype(tensor.dtype)
            shape = (batch, *(int(side) for side in tensor.shape[1:]))
            tensors[tensor.name] = (dtype, shape, offset)
            offset += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return cls(tensors, input_bytes, offset)

    def view(self, buffer: NDArray[np.uint8], name: str) -> NDArray[Any]:
        """Return a tensor as it lies in a host buffer."""
        dtype, shape, offset = self.tensors[name]
        size = math.prod(shape) * dtype.itemsize
        return buffer[offset : offset + size].view(dtype).reshape(shape)


class _Slot:
    """Context, buffers and CUDA graph of one batch size."""

    def __init__(self, owner: TensorRtBackend, batch: int) -> None:
        self._cuda, self._trt, self._stream = owner._cuda, owner._trt, owner._stream
        self._graph: Any = None
        self._pinned: Any = None
        self._memory: Any = None
        self.layout = BufferLayout.plan(owner._inputs, owner._outputs, batch)
        size = self.layout.total_bytes
        try:
            self._pinned = check_cuda(self._cuda, self._cuda.cudaMallocHost(size), f"lock {size} bytes for a batch")
            self._memory = check_cuda(self._cuda, self._cuda.cudaMalloc(size), f"take {size} bytes for a batch")
            self.host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(self._pinned)))
            self._context = self._create_context(owner._engine)
            self._bind()
            self._enqueue()  # the first run takes memory and compiles, which a capture may not
            check_cuda(self._cuda, self._cuda.cudaStreamSynchronize(self._stream), f"run a first batch of {batch}")
            if owner.name == "tensorrt":
                self._capture(batch)
        except BackendError:
            self.close()
            raise

    def launch(self) -> None:
        """Start copying in, running and copying out."""
        if self._graph is None:
            self._enqueue()
        else:
            check_cuda(self._cuda, self._cuda.cudaGraphLaunch(self._graph, self._stream), "launch the graph")

    def close(self) -> None:
        """Give back graph and buffers."""
        if self._graph is not None:
            self._cuda.cudaGraphExecDestroy(self._graph)
        if self._memory is not None:
            self._cuda.cudaFree(self._memory)
        if self._pinned is not None:
            self._cuda.cudaFreeHost(self._pinned)
        self._graph = self._memory = self._pinned = None

    def _create_context(self, engine: Any) -> Any:
        if hasattr(self._trt, "CudaGraphStrategy"):  # TensorRT-RTX captures by itself, after it has compiled
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise BackendError(
                "the engine gives no execution context; GPU memory may be short, close what else uses it"
            )
        return context

    def _bind(self) -> None:
        for name, (_, shape, offset) in self.layout.tensors.items():
            if name == INPUT_NAME and not self._context.set_input_shape(name, shape):
                raise BackendError(f"the engine refuses images of shape {shape}; build it again")
            if not self._context.set_tensor_address(name, int(self._memory) + offset):
                raise BackendError(f"the engine knows no tensor '{name}'; build it again")

    def _enqueue(self) -> None:
        kinds, size = self._cuda.cudaMemcpyKind, self.layout.input_bytes
        rest = self.layout.total_bytes - size
        pinned, memory = int(self._pinned), int(self._memory)
        to_device = (memory, pinned, size, kinds.cudaMemcpyHostToDevice, self._stream)
        to_host = (pinned + size, memory + size, rest, kinds.cudaMemcpyDeviceToHost, self._stream)
        check_cuda(self._cuda, self._cuda.cudaMemcpyAsync(*to_device), "copy the images")
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError("the engine did not start; see the log of the library above")
        check_cuda(self._cuda, self._cuda.cudaMemcpyAsync(*to_host), "copy the results")

    def _capture(self, batch: int) -> None:
        """Capture a run as a CUDA graph; an engine that cannot be captured is launched layer by layer, with a note."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            check_cuda(self._cuda, self._cuda.cudaStreamBeginCapture(self._stream, mode), "begin a capture")
            try:
                self._enqueue()
            finally:
                ended = self._cuda.cudaStreamEndCapture(self._stream)
            graph = check_cuda(self._cuda, ended, "capture the engine")
            self._graph = check_cuda(self._cuda, self._cuda.cudaGraphInstantiate(graph, 0), "make a graph")
            self._cuda.cudaGraphDestroy(graph)
        except BackendError as error:
            logger.warning("no CUDA graph for batches of %d, each layer is launched by itself: %s", batch, error)


def open_backend(request: BackendRequest) -> Backend:
    """Load the engine of a graph, see :class:`TensorRtBackend`."""
    return TensorRtBackend(request)


def why_unavailable(name: str) -> str | None:
    """Say why this backend cannot be used here, or nothing when it can; loads the library if it is installed."""
    try:
        require(_EXTRAS[name])
        find_machine()
        _import(name)
    except (BackendError, MissingExtraError) as error:
        return str(error)
    return None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{name} cannot be imported ({first_line(error)}); run: pip install 'cl4wsis[{_EXTRAS[name]}]'"
        ) from error


def _load(trt: Any, found: FoundEngine, machine: Machine) -> tuple[Any, Any]:
    """Load an engine that fits; what the library says against it becomes the message.

    Returns:
        The engine, and what must live as long as it does.
    """
    errors: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                errors.append(message)

    content = found.read()
    logger_ = Logger()
    try:
        runtime = trt.Runtime(logger_)
        runtime.engine_host_code_allowed = found.info.version_compatible  # such engines carry their own runtime
        engine = runtime.deserialize_cuda_engine(content)
    except (TypeError, RuntimeError) as error:  # what the bindings raise when the library gives no runtime
        raise BackendError(f"{found.info.runtime} cannot start: {first_line(error)}; check nvidia-smi") from error
    if engine is None:
        reason = errors[-1] if errors else "no reason was given"
        raise BackendError(
            f"{found.path}: {found.info.runtime} cannot load it on {machine.gpu}: {reason}; build it again with "
            "'cl4wsis export --from'"
        )
    return engine, (runtime, logger_)


def _tensors(trt: Any, engine: Any) -> tuple[TensorShapes, TensorShapes]:
    """Return types and shapes of the engine's inputs and outputs; a free batch is None."""
    inputs: dict[str, tuple[str, Sequence[int | str | None]]] = {}
    outputs: dict[str, tuple[str, Sequence[int | str | None]]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name).name
        shape = [None if side < 0 else int(side) for side in engine.get_tensor_shape(name)]
        tensors = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        tensors[name] = (_NUMPY_TYPES.get(dtype, dtype.lower()), shape)
    return inputs, outputs
