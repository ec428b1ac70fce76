"""OpenVINO on the CPU: reads the ONNX graph as it is and compiles it for this processor.

OpenVINO computes float32 graphs in bfloat16 or half precision where a CPU can, unless it is told otherwise. Here the
graph decides: one in float32 (or int8, whose remaining layers are float32) computes in float32, one in float16 in the
half-precision arithmetic that the CPU has.

Compiled graphs are kept on disk only where the environment variable ``CL4WSIS_OPENVINO_CACHE`` names a folder for them.

All graphs of a process are compiled by one ``openvino.Core``, which is never given up. With a core OpenVINO loads its
plugin for CPUs, which gives the thread that loads it a stack for signal handlers; with the core goes the stack, in
whichever thread that happens, and the one before it is put back, be that still there or not. Were two cores given up in
the order in which they were made, or one in another thread, the next signal (Ctrl-C, the end of a child process) would
end the process with SIGSEGV.
"""

import logging
import mmap
import os
import threading
from collections import OrderedDict
from functools import cache
from pathlib import Path
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
from cl4wsis_serve.backends.openvino_padding import leave_out_padding

logger = logging.getLogger(__name__)
_core_lock = threading.Lock()

_NUMPY_TYPES = {"u8": "uint8", "i32": "int32", "f32": "float32"}
_HALF_TYPES = {"FP16": "f16", "BF16": "bf16"}
"""Half-precision arithmetic by the name of the capability, the more exact first."""
_CACHE_VARIABLE = "CL4WSIS_OPENVINO_CACHE"
_KEPT_BATCH_SIZES = 8
"""As many as a server takes images in one request, where nothing else is set: it never compiles one twice."""
_MEMORY_MARKER = b"*/_ORT_MEM_ADDR_/*"
"""A file name by which a graph claims that its weights lie at an address in memory; OpenVINO would read there."""


class OpenVinoBackend:
    """A graph compiled by OpenVINO for the CPU.

    It is compiled for each batch size that occurs, which is a tenth faster than leaving the size open; the last eight
    sizes are kept, and one that comes back after more than that is compiled again.

    Args:
        request: names the graph.

    Raises:
        BackendError: OpenVINO is missing or cannot load the graph, or the graph is not the one that the manifest
            describes.
    """

    name = "openvino"
    device: Device = "cpu"

    def __init__(self, request: BackendRequest) -> None:
        self._runtime = _import_openvino()
        self._request = request
        self._core = shared_core()
        self.arithmetic = _arithmetic(self._core, request)
        """Floating-point type in which layers compute that are not int8: ``f32``, ``f16`` or ``bf16``."""
        self._multiplies_padding = request.variant.precision == "int8" and "BF16" not in _capabilities(self._core)
        """int8 kernels are those of CPUs without AVX-512, with which OpenVINO always computes in bfloat16 too."""
        _refuse_memory_references(request.model)
        try:
            self._model = self._core.read_model(request.model)
        except Exception as error:  # OpenVINO raises plain RuntimeErrors
            raise self._loading_error(error) from error
        check_graph(request, _tensors(self._model.inputs), _tensors(self._model.outputs))
        self._calls: OrderedDict[int, Any] = OrderedDict()
        self._call_for(1)  # a graph that cannot be compiled is found out now

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph on (B, H, W, 3) uint8 images, which are read where they are.

        Raises:
            BackendError: the runtime failed, for example for want of memory.
        """
        size = self._request.manifest.input.size
        if images.shape[1:] != (*size, 3):
            raise BackendError(f"openvino was given a batch of shape {images.shape}, expected (batch, {size}, 3)")
        frames = np.ascontiguousarray(images)  # its name keeps it alive until the end: OpenVINO holds no reference
        call = self._call_for(len(frames))
        try:
            call.set_tensor(INPUT_NAME, self._runtime.Tensor(frames, shared_memory=True))
            call.infer()
            outputs = {name: call.get_tensor(name).data for name in self._request.output_names}
        except Exception as error:  # OpenVINO raises plain RuntimeErrors
            raise BackendError(
                f"openvino failed on a batch of shape {images.shape}: {_reason(error)}; "
                "if memory ran out, use a smaller batch size"
            ) from error
        if self._request.variant.post == "host":
            return {name: maps.transpose(0, 3, 1, 2) for name, maps in outputs.items()}
        return outputs

    def _call_for(self, batch: int) -> Any:
        """Return the graph compiled for a batch size, ready to be called."""
        if batch in self._calls:
            self._calls.move_to_end(batch)
            return self._calls[batch]
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.arithmetic,
            "INFERENCE_NUM_THREADS": self._request.threads or usable_cores(),
            "ENABLE_CPU_PINNING": False,  # several processes would otherwise all take the same cores
        }
        if cache := os.environ.get(_CACHE_VARIABLE):
            settings["CACHE_DIR"] = cache
        try:
            model = self._model.clone()
            model.reshape({INPUT_NAME: [batch, *self._request.manifest.input.size, 3]})
            if self._multiplies_padding:
                leave_out_padding(model)
            if self._request.variant.post == "host":
                model = self._with_channels_last(model)
            self._calls[batch] = self._core.compile_model(model, "CPU", settings).create_infer_request()
        except Exception as error:  # OpenVINO raises plain RuntimeErrors
            raise self._loading_error(error) from error
        if len(self._calls) > _KEPT_BATCH_SIZES:
            self._calls.popitem(last=False)
        return self._calls[batch]

    def _with_channels_last(self, model: Any) -> Any:
        """Let a graph give its maps in the order in which layers compute them, (B, h, w, C).

        To put the channels first takes OpenVINO longer than the layer before it, and whoever groups the pixels reads
        only the channels of the classes that it finds.
        """
        from openvino.preprocess import PrePostProcessor

        order = PrePostProcessor(model)
        for name in self._request.output_names:
            order.output(name).model().set_layout(self._runtime.Layout("NCHW"))
            order.output(name).tensor().set_layout(self._runtime.Layout("NHWC"))
        return order.build()

    def _loading_error(self, error: Exception) -> BackendError:
        return BackendError(
            f"{self._request.model}: openvino {self._runtime.__version__} cannot load it: {_reason(error)}; "
            "update openvino, export the step again, or choose --backend onnxruntime"
        )


def open_backend(request: BackendRequest) -> Backend:
    """Compile a graph, see :class:`OpenVinoBackend`."""
    return OpenVinoBackend(request)


def why_unavailable(name: str) -> str | None:
    """Say why this backend cannot be used here, or nothing when it can; loads OpenVINO if it is installed."""
    try:
        devices = shared_core().available_devices
    except BackendError as error:
        return str(error)
    return None if "CPU" in devices else f"{name} has no CPU plugin; run: pip install --force-reinstall openvino"


def shared_core() -> Any:
    """Return the one ``openvino.Core`` of this process.

    Raises:
        BackendError: OpenVINO is missing.
    """
    runtime = _import_openvino()
    with _core_lock:
        return _make_core(runtime)


@cache
def _make_core(runtime: Any) -> Any:
    return runtime.Core()


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"openvino cannot be imported ({first_line(error)}); run: pip install 'cl4wsis[openvino]'"
        ) from error
    return openvino


def _capabilities(core: Any) -> list[str]:
    """Name the types in which this CPU computes."""
    return list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _arithmetic(core: Any, request: BackendRequest) -> str:
    if request.variant.precision != "float16":
        return "f32"
    capabilities = _capabilities(core)
    found = [hint for capability, hint in _HALF_TYPES.items() if capability in capabilities]
    if not found:
        logger.warning(
            "%s: this CPU has no half-precision arithmetic; openvino computes the float16 graph in float32, "
            "no faster than the float32 graph",
            request.model,
        )
    return found[0] if found else "f32"


def _refuse_memory_references(model: Path) -> None:
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = content.find(_MEMORY_MARKER) >= 0
    except (OSError, ValueError) as error:
        raise BackendError(f"{model}: cannot be read: {first_line(error)}") from error
    if found:
        raise BackendError(
            f"{model}: its weights refer to memory outside the file, which no exported graph does; "
            "do not use this file, export the step again"
        )


def _tensors(values: Any) -> dict[str, tuple[str, list[int | str | None]]]:
    return {
        value.any_name: (
            _NUMPY_TYPES.get(value.element_type.get_type_name(), value.element_type.get_type_name()),
            [side.get_length() if side.is_static else None for side in value.partial_shape],
        )
        for value in values
    }


def _reason(error: BaseException) -> str:
    """Return the last line of OpenVINO's message: the first ones name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
