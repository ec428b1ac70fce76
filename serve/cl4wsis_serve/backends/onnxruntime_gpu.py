"""ONNX Runtime on an NVIDIA GPU, through its CUDA or its TensorRT provider.

Every batch size that is run has a session of its own in which the batch is a number: ONNX Runtime then computes all
shapes when it loads the graph, no shape arithmetic is left for the CPU, and the whole run can be captured as one CUDA
graph between buffers that stay on the device. The price is that each size holds the weights again; a session is made
when a batch of its size first comes.

Nothing may run on the CPU: ONNX Runtime is told to refuse a session with a node there, and where it tells the provider
of every node, that is checked too. Where it refuses a CUDA graph, the session is opened without, with a warning.
"""

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.engines import cache_folder, graph_sha256
from cl4wsis.errors import BackendError, MissingExtraError, require
from cl4wsis_serve.backends.base import (
    INPUT_NAME,
    Backend,
    BackendRequest,
    Device,
    Outputs,
    check_graph,
    first_line,
)
from cl4wsis_serve.backends.buckets import BUCKETS, choose_bucket, fill_batch, run_in_parts

logger = logging.getLogger(__name__)

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

_PROVIDERS = {"onnxruntime-cuda": (CUDA,), "onnxruntime-tensorrt": (TENSORRT, CUDA)}
_BATCH = "batch"
_RUNS_BEFORE_REPLAY = 3
"""ONNX Runtime takes memory in the first runs and captures after them."""
_NUMPY_TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}


class OnnxRuntimeGpuBackend:
    """A graph in ONNX Runtime on the first GPU.

    Args:
        request: names the graph and the provider.

    Raises:
        BackendError: ONNX Runtime has no such provider or cannot load it, would run a node on the CPU, or the graph is
            not the one that the manifest describes.
    """

    device: Device = "cuda"

    def __init__(self, request: BackendRequest) -> None:
        self._request = request
        self._runtime = _import_onnxruntime(request.name)
        if request.name == "onnxruntime-tensorrt" and request.variant.precision != "float32":
            raise BackendError(
                f"onnxruntime-tensorrt takes float32 graphs alone: with TensorRT 10, its switch for "
                f"{request.variant.precision} would let the grouping compute in it too; choose --backend tensorrt or "
                "onnxruntime-cuda"
            )
        self._sessions: dict[int, _BatchSession] = {1: _BatchSession(self._runtime, request, 1)}

    @property
    def name(self) -> str:
        """``onnxruntime-cuda`` or ``onnxruntime-tensorrt``."""
        return self._request.name

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph on (B, H, W, 3) uint8 images; batches larger than the largest bucket run in parts.

        Raises:
            BackendError: the session failed, for example for want of memory.
        """
        return run_in_parts(self._run_bucket, images, BUCKETS[-1])

    def _run_bucket(self, images: NDArray[np.uint8]) -> Outputs:
        bucket = choose_bucket(len(images), BUCKETS)
        if bucket not in self._sessions:
            self._sessions[bucket] = _BatchSession(self._runtime, self._request, bucket)
        return self._sessions[bucket].run(images)


class _BatchSession:
    """A session of one batch size, with its inputs and outputs on the device."""

    def __init__(self, runtime: Any, request: BackendRequest, batch: int) -> None:
        self._name = request.name
        self._session = open_session(runtime, request, batch)
        tensors = (self._session.get_inputs(), self._session.get_outputs())
        check_graph(request, *({value.name: _describe(value) for value in values} for values in tensors))
        frame = (batch, *request.manifest.input.size, 3)
        self._frames = np.zeros(frame, np.uint8)
        self._image = runtime.OrtValue.ortvalue_from_numpy(self._frames, "cuda", 0)
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(INPUT_NAME, self._image)
        self._results = {}
        for tensor in request.outputs:
            shape = [batch, *(int(side) for side in tensor.shape[1:])]
            dtype = np.dtype(tensor.dtype).type
            self._results[tensor.name] = runtime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0)
            self._binding.bind_ortvalue_output(tensor.name, self._results[tensor.name])
        for _ in range(_RUNS_BEFORE_REPLAY):
            self._launch()

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        fill_batch(self._frames, images)
        self._image.update_inplace(self._frames)
        self._launch()
        return {name: value.numpy()[: len(images)] for name, value in self._results.items()}

    def _launch(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime has no public base class for its errors
            raise BackendError(
                f"{self._name} failed on a batch of shape {self._frames.shape}: {first_line(error)}; "
                "if memory ran out, use a smaller batch size"
            ) from error


def open_backend(request: BackendRequest) -> Backend:
    """Load a graph, see :class:`OnnxRuntimeGpuBackend`."""
    return OnnxRuntimeGpuBackend(request)


def why_unavailable(name: str) -> str | None:
    """Say why this backend cannot be used here, or nothing when it can; loads onnxruntime if it is installed."""
    try:
        _import_onnxruntime(name)
    except BackendError as error:
        return str(error)
    return None


def open_session(runtime: Any, request: BackendRequest, batch: int) -> Any:
    """Open a session of one batch size on the GPU, with CUDA graphs where ONNX Runtime allows them.

    Args:
        runtime: the module onnxruntime.
        request: names graph and provider.
        batch: number of images.

    Raises:
        BackendError: the graph cannot be loaded, or would not run on the GPU as a whole.
    """
    try:
        session = _create_session(runtime, request, batch, capture=True)
    except Exception as error:  # onnxruntime has no public base class for its errors
        if "graph" not in str(error).lower() or "captur" not in str(error).lower():
            raise _explain(runtime, request, error) from error
        logger.warning("%s: no CUDA graph for batches of %d: %s", request.name, batch, first_line(error))
        try:
            session = _create_session(runtime, request, batch, capture=False)
        except Exception as second:
            raise _explain(runtime, request, second) from second
    session.disable_fallback()  # an error of the provider shall not open another session on the CPU
    check_placement(session, _PROVIDERS[request.name])
    return session


def session_options(runtime: Any, batch: int) -> Any:
    """Return options under which the batch is a number and no node may run on the CPU.

    Args:
        runtime: the module onnxruntime.
        batch: number of images.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and what went wrong stands in them
    options.add_free_dimension_override_by_name(_BATCH, batch)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def provider_options(name: str, cache: Path, capture: bool) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a backend with their options, in the order of preference.

    TF32 has the mantissa of half precision; results would differ from those the export was checked with.

    Args:
        name: of the backend.
        cache: folder for the engines of the TensorRT provider.
        capture: whether to run through a CUDA graph.
    """
    enabled = "1" if capture else "0"
    options = {
        CUDA: {"use_tf32": "0", "enable_cuda_graph": enabled if name == "onnxruntime-cuda" else "0"},
        TENSORRT: {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(cache),
            "trt_cuda_graph_enable": enabled,
        },
    }
    return [(provider, options[provider]) for provider in _PROVIDERS[name]]


def check_placement(session: Any, providers: tuple[str, ...]) -> None:
    """Check that a session runs on the providers that were asked for, and each of its nodes too.

    Args:
        session: of ONNX Runtime.
        providers: allowed, the preferred one first.

    Raises:
        BackendError: ONNX Runtime fell back to another provider, for all of the graph or for some nodes.
    """
    active = session.get_providers()
    if active[0] != providers[0]:
        raise BackendError(
            f"asked for {providers[0]}, but onnxruntime fell back to {active[0]}; "
            "check the driver and CUDA libraries, or choose --backend onnxruntime to use the CPU"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # before 1.24; disable_cpu_ep_fallback alone then
    elsewhere = [
        f"{node.op_type} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name not in providers
        for node in part.get_nodes()
    ]
    if elsewhere:
        kinds = ", ".join(sorted(set(elsewhere)))
        raise BackendError(
            f"{len(elsewhere)} nodes would not run on {providers[0]} ({kinds}); update onnxruntime-gpu, or choose "
            "--backend onnxruntime to use the CPU"
        )


def _create_session(runtime: Any, request: BackendRequest, batch: int, capture: bool) -> Any:
    cache = cache_folder() / request.name / graph_sha256(request.bundle, request.variant)[:16]
    cache.mkdir(parents=True, exist_ok=True)
    return runtime.InferenceSession(
        request.model,
        session_options(runtime, batch),
        providers=provider_options(request.name, cache, capture),
    )


def _import_onnxruntime(name: str) -> Any:
    """Return onnxruntime if it has the provider, with the CUDA libraries of NVIDIA's wheels loaded where it can."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({first_line(error)}); run: pip install 'cl4wsis[gpu]' on a machine with "
            "an NVIDIA GPU"
        ) from error
    provider = _PROVIDERS[name][0]
    have = onnxruntime.get_available_providers()
    if provider not in have:
        raise BackendError(
            f"the installed onnxruntime {onnxruntime.__version__} has no {provider} (it has {', '.join(have)}); "
            "on a machine with an NVIDIA GPU, run: pip uninstall onnxruntime && pip install 'cl4wsis[gpu]'"
        )
    if provider == TENSORRT:
        _load_tensorrt()
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    return onnxruntime


def _load_tensorrt() -> None:
    """Load the libraries of TensorRT, which the wheel of ONNX Runtime does not bring, from its own wheel."""
    try:
        require("trt")
        importlib.import_module("tensorrt")
    except (MissingExtraError, ImportError, OSError) as error:
        raise BackendError(f"the TensorRT provider needs TensorRT: {first_line(error)}") from error


def _explain(runtime: Any, request: BackendRequest, error: Exception) -> BackendError:
    return BackendError(
        f"{request.model}: onnxruntime {runtime.__version__} cannot load it on {_PROVIDERS[request.name][0]}: "
        f"{first_line(error)}; check the driver and CUDA libraries, or choose --backend onnxruntime to use the CPU"
    )


def _describe(value: Any) -> tuple[str, Any]:
    return _NUMPY_TYPES.get(value.type, value.type), value.shape
