"""ONNX Runtime: the CPU of any machine, or an NVIDIA GPU through its CUDA provider."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cl4wsis.bundle import Manifest
from cl4wsis.errors import BackendError
from cl4wsis_serve.backends.base import INPUT_NAME, OUTPUT_NAMES, Outputs

Device = Literal["cpu", "cuda"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}
_NAMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-cuda"}


class OnnxRuntimeBackend:
    """A graph loaded into an ONNX Runtime session.

    Args:
        model: the ``.onnx`` file.
        manifest: describes the graph; names, types and fixed sizes of inputs and outputs must agree.
        device: ``cpu`` or ``cuda``.
        threads: threads within one operator; all cores this process may use when not given.

    Raises:
        BackendError: onnxruntime is missing or cannot load the graph, the device is not there, or the graph is not
            the one that the manifest describes.
    """

    def __init__(self, model: Path, manifest: Manifest, device: Device = "cpu", threads: int | None = None) -> None:
        self._session = _open_session(model, device, threads)
        self._name = _NAMES[device]
        _check_graph(self._session, model, manifest)

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


def _check_graph(session: Any, model: Path, manifest: Manifest) -> None:
    """Compare names, types and fixed sizes of the graph with what the manifest says about them."""
    pairs = (("input", manifest.inputs, session.get_inputs()), ("output", manifest.outputs, session.get_outputs()))
    for kind, stated, values in pairs:
        found = {value.name: (_NUMPY_TYPES.get(value.type, value.type), value.shape) for value in values}
        for tensor in stated:
            if tensor.name not in found:
                raise BackendError(f"{model}: the graph has no {kind} '{tensor.name}'; it has {', '.join(found)}")
            dtype, shape = found[tensor.name]
            if dtype != tensor.dtype or not _shapes_agree(shape, tensor.shape):
                raise BackendError(
                    f"{model}: {kind} '{tensor.name}' is {dtype} {_text(shape)} in the graph, "
                    f"but {tensor.dtype} {_text(tensor.shape)} in the manifest; export the step again"
                )


def _shapes_agree(found: Sequence[int | str | None], stated: Sequence[int | str]) -> bool:
    """Compare two shapes, letting a size that one of them leaves open pass."""
    if len(found) != len(stated):
        return False
    fixed = ((a, b) for a, b in zip(found, stated, strict=True) if isinstance(a, int) and isinstance(b, int))
    return all(a == b for a, b in fixed)


def _text(shape: Sequence[int | str | None]) -> str:
    return f"({', '.join(str(side) for side in shape)})"


def _missing_provider(runtime: Any, provider: str) -> str:
    have = ", ".join(runtime.get_available_providers())
    return (
        f"the installed onnxruntime {runtime.__version__} has no {provider} (it has {have}); "
        "on a machine with an NVIDIA GPU, run: pip uninstall onnxruntime && pip install 'cl4wsis[gpu]'"
    )


def usable_cores() -> int:
    """Return the number of cores this process may use, which in a container is less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
