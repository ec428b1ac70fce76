"""Stand-ins for a GPU: CUDA whose device memory is host memory, and a TensorRT whose one engine finds colors.

They keep the contracts that the backend relies on: work on a stream that is being captured is recorded and not done,
and done when the captured graph is launched; an engine reads and writes at the addresses that were set.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from bundles import SIZE, SLOTS, color_answer

from cl4wsis.engines import find_machine
from cl4wsis.errors import BackendError

OK = 0
OUT_OF_MEMORY = 2

_TENSORS = {
    "images": ("UINT8", (*SIZE, 3)),
    "instance_ids": ("UINT8", SIZE),
    "labels": ("INT32", (SLOTS,)),
    "scores": ("FLOAT", (SLOTS,)),
    "areas": ("INT32", (SLOTS,)),
    "boxes": ("FLOAT", (SLOTS, 4)),
}
_NUMPY = {"UINT8": np.uint8, "INT32": np.int32, "FLOAT": np.float32}


def has_gpu() -> bool:
    """Tell whether there is a real GPU that CUDA can use."""
    try:
        find_machine()
    except BackendError:
        return False
    return True


class PretendedCuda:
    """The CUDA runtime as cuda-python shows it."""

    cudaStreamNonBlocking = 1  # noqa: N815
    cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=OUT_OF_MEMORY)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, memory: int = 1 << 30) -> None:
        self.memory = memory
        self.taken: dict[int, Any] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.launches = 0
        self.refuses_capture = False

    def enqueue(self, work: Callable[[], None]) -> None:
        """Do work of a stream, or record it."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:  # noqa: N802
        return OK, {OUT_OF_MEMORY: b"out of memory"}.get(int(code), b"capture is not permitted")

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        return OK, 77

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:  # noqa: N802
        if size > self.memory:
            return OUT_OF_MEMORY, None
        buffer = (ctypes.c_uint8 * size)()
        self.taken[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.taken[address]
        return (OK,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        self.enqueue(lambda: ctypes.memmove(to, source, size) and None)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        self.captured = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Callable[[], None]] | None]:  # noqa: N802
        graph, self.captured = self.captured, None
        return (901, None) if self.refuses_capture else (OK, graph)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:  # noqa: N802
        return OK, graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:  # noqa: N802
        return (OK,)

    cudaGraphExecDestroy = cudaGraphDestroy  # noqa: N815

    def cudaGraphLaunch(self, graph: list[Callable[[], None]], stream: int) -> tuple[int]:  # noqa: N802
        self.launches += 1
        for work in graph:
            work()
        return (OK,)


class PretendedTensorRt:
    """The module ``tensorrt``; with CUDA graph strategies it is ``tensorrt_rtx``."""

    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)

    class ILogger:
        """Takes what the library says."""

        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def __init__(self, cuda: PretendedCuda, version: str, damaged: bool = False, captures: bool = False) -> None:
        self.__version__ = version
        self._cuda = cuda
        self._damaged = damaged
        if captures:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize(content: bytes) -> Any:
            if self._damaged:
                logger.log(1, "Serialization assertion magicTag failed")
                return None
            return PretendedEngine(self._cuda)

        return SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=True)


class PretendedEngine:
    """An engine of the graph of ``bundles``."""

    num_io_tensors = len(_TENSORS)

    def __init__(self, cuda: PretendedCuda) -> None:
        self._cuda = cuda
        self.strategies: list[object] = []

    def get_tensor_name(self, index: int) -> str:
        return list(_TENSORS)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_TENSORS[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *_TENSORS[name][1])

    def get_tensor_mode(self, name: str) -> int:
        return int(name != "images")

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, config: Any = None) -> "PretendedContext":
        self.strategies.append(None if config is None else config.cuda_graph_strategy)
        return PretendedContext(self._cuda)


class PretendedContext:
    """Runs the engine at the addresses it is given."""

    def __init__(self, cuda: PretendedCuda) -> None:
        self._cuda = cuda
        self._batch = 0
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._batch = shape[0]
        return shape[1:] == _TENSORS[name][1]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in _TENSORS and address % 4 == 0

    def execute_async_v3(self, stream: int) -> bool:
        self._cuda.enqueue(self._run)
        return stream == 77

    def _run(self) -> None:
        for row, frame in enumerate(self._at("images")):
            for name, value in color_answer(frame).items():
                self._at(name)[row] = value

    def _at(self, name: str) -> np.ndarray:
        dtype, shape = _TENSORS[name]
        size = self._batch * int(np.prod(shape)) * np.dtype(_NUMPY[dtype]).itemsize
        memory = (ctypes.c_uint8 * size).from_address(self._addresses[name])
        return np.frombuffer(memory, _NUMPY[dtype]).reshape(self._batch, *shape)
