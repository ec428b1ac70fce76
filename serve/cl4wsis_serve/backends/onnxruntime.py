"""ONNX Runtime: the CPU of any machine, or an NVIDIA GPU through its CUDA provider."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cl4wsis.errors import BackendError
from cl4wsis_serve.backends.base import INPUT_NAME, OUTPUT_NAMES, Outputs

Device = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NAMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}


class OnnxRuntimeBackend:
    """A graph loaded into an ONNX Runtime session.

    Args:
        model: the ``.onnx`` file.
        size: (height, width) of the network input that the manifest states; the graph must agree.
        device: ``cpu`` or ``cuda``.
        threads: threads within one operator; all cores this process may use when not given.

    Raises:
        BackendError: onnxruntime is missing or cannot load the graph, the device is not there, or the graph is not
            the one that the manifest describes.
    """

    def __init__(self, model: Path, size: tuple[int, int], device: Device = "cpu", threads: int | None = None) -> None:
        self._session = _open_session(model, device, threads)
        self._name = _NAMES[device]
        _check_graph(self._session, model, size)

    @property
    def name(self) -> str:
        """``onnxruntime`` on the CPU, ``onnxruntime-cuda`` on a GPU."""
        return self._name

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph on (B, H, W, 3) uint8 images.

        Raises:
            BackendError: the session failed, for example for want of memory.
        """
        try:
            arrays = self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: images})
        except Exception as error:  # onnxruntime has no public base class for its errors
            raise BackendError(
                f"{self.name} failed on a batch of shape {images.shape}: {_first_line(error)}; "
                "if memory ran out, use a smaller batch size"
            ) from error
        return dict(zip(OUTPUT_NAMES, arrays, strict=True))


def why_unavailable(device: Device) -> str | None:
    """Say why this backend cannot be used here, or nothing when it can; loads onnxruntime if it is installed."""
    try:
        runtime = _import_onnxruntime()
    except BackendError as error:
        return str(error)
    provider = _PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        return _missing_provider(runtime, provider)
    return None


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({_first_line(error)}); run: pip install 'cl4wsis[cpu]', "
            "or 'cl4wsis[gpu]' on a machine with an NVIDIA GPU"
        ) from error
    return onnxruntime


def _open_session(model: Path, device: Device, threads: int | None) -> Any:
    runtime = _import_onnxruntime()
    provider = _PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        raise BackendError(_missing_provider(runtime, provider))
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and what went wrong stands in them
    options.intra_op_num_threads = threads or usable_cores()
    # TF32 has the mantissa of half precision; results would differ from those the export was checked with.
    settings = [{"use_tf32": "0"}] if device == "cuda" else [{}]
    try:
        session = runtime.InferenceSession(model, options, providers=[provider], provider_options=settings)
    except Exception as error:  # onnxruntime has no public base class for its errors
        raise BackendError(
            f"{model}: onnxruntime {runtime.__version__} cannot load it: {_first_line(error)}; "
            "update onnxruntime or export the step again"
        ) from error
    active = session.get_providers()
    if active[0] != provider:
        raise BackendError(
            f"asked for {provider}, but onnxruntime fell back to {active[0]}; "
            "check the driver and CUDA libraries, or choose --backend onnxruntime to use the CPU"
        )
    return session


def _check_graph(session: Any, model: Path, size: tuple[int, int]) -> None:
    inputs = {value.name: value for value in session.get_inputs()}
    if list(inputs) != [INPUT_NAME] or inputs[INPUT_NAME].type != "tensor(uint8)":
        found = ", ".join(f"{name}: {value.type}" for name, value in inputs.items())
        raise BackendError(f"{model}: the graph must take one input, {INPUT_NAME}: tensor(uint8), found {found}")
    shape = inputs[INPUT_NAME].shape
    if len(shape) != 4 or list(shape[1:]) != [*size, 3]:
        raise BackendError(
            f"{model}: the graph takes images of shape {shape}, the manifest says (B, {size[0]}, {size[1]}, 3)"
        )
    found_outputs = [value.name for value in session.get_outputs()]
    missing = [name for name in OUTPUT_NAMES if name not in found_outputs]
    if missing:
        raise BackendError(f"{model}: the graph has no output {', '.join(missing)}; it has {', '.join(found_outputs)}")


def _missing_provider(runtime: Any, provider: str) -> str:
    have = ", ".join(runtime.get_available_providers())
    return (
        f"the installed onnxruntime {runtime.__version__} has no {provider} (it has {have}); "
        "run: pip uninstall onnxruntime && pip install 'cl4wsis[gpu]'"
    )


def usable_cores() -> int:
    """Return the number of cores this process may use, which in a container is less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
