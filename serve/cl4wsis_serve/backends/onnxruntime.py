"""ONNX Runtime: the CPU of any machine, or an NVIDIA GPU through its CUDA provider."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.errors import BackendError
from cl4wsis_serve.backends.base import (
    INPUT_NAME,
    Backend,
    BackendRequest,
    Device,
    Outputs,
    check_graph,
    first_line,
    usable_cores,
)

_DEVICES: dict[str, Device] = {"onnxruntime": "cpu", "onnxruntime-cuda": "cuda"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}


class OnnxRuntimeBackend:
    """A graph loaded into an ONNX Runtime session.

    Args:
        request: names the graph; the backend's name says whether it runs on the CPU or with CUDA.

    Raises:
        BackendError: onnxruntime is missing or cannot load the graph, the device is not there, or the graph is not
            the one that the manifest describes.
    """

    def __init__(self, request: BackendRequest) -> None:
        self._device = _DEVICES[request.name]
        self._name = request.name
        self._outputs = request.output_names
        self._session = _open_session(request, self._device)
        check_graph(request, _tensors(self._session.get_inputs()), _tensors(self._session.get_outputs()))

    @property
    def name(self) -> str:
        """``onnxruntime`` on the CPU, ``onnxruntime-cuda`` on a GPU."""
        return self._name

    @property
    def device(self) -> Device:
        """``cpu`` or ``cuda``."""
        return self._device

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
        runtime = _import_onnxruntime()
    except BackendError as error:
        return str(error)
    provider = _PROVIDERS[_DEVICES[name]]
    if provider not in runtime.get_available_providers():
        return _missing_provider(runtime, provider)
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


def _open_session(request: BackendRequest, device: Device) -> Any:
    runtime = _import_onnxruntime()
    provider = _PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        raise BackendError(_missing_provider(runtime, provider))
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and what went wrong stands in them
    options.intra_op_num_threads = request.threads or usable_cores()
    # Workers that spin between operators take the cores from what reads, fits and groups images beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # TF32 has the mantissa of half precision; results would differ from those the export was checked with.
    settings = [{"use_tf32": "0"}] if device == "cuda" else [{}]
    try:
        session = runtime.InferenceSession(request.model, options, providers=[provider], provider_options=settings)
    except Exception as error:  # onnxruntime has no public base class for its errors
        raise BackendError(
            f"{request.model}: onnxruntime {runtime.__version__} cannot load it: {first_line(error)}; "
            "update onnxruntime or export the step again"
        ) from error
    active = session.get_providers()
    if active[0] != provider:
        raise BackendError(
            f"asked for {provider}, but onnxruntime fell back to {active[0]}; "
            "check the driver and CUDA libraries, or choose --backend onnxruntime to use the CPU"
        )
    return session


def _tensors(values: Any) -> dict[str, tuple[str, list[int | str | None]]]:
    return {value.name: (_NUMPY_TYPES.get(value.type, value.type), value.shape) for value in values}


def _missing_provider(runtime: Any, provider: str) -> str:
    have = ", ".join(runtime.get_available_providers())
    return (
        f"the installed onnxruntime {runtime.__version__} has no {provider} (it has {have}); "
        "on a machine with an NVIDIA GPU, run: pip uninstall onnxruntime && pip install 'cl4wsis[gpu]'"
    )
