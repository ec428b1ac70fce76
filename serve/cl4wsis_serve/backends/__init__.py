"""Inference backends behind one protocol, and the table of them.

A backend is a module with two functions, imported when somebody asks for it:

- ``why_unavailable(name) -> str | None``: why the backend of this name cannot run on this machine, and what to do; None
  where it can. It opens no model and leaves nothing behind.
- ``open_backend(request) -> Backend``: loads a graph, see :class:`~cl4wsis_serve.backends.base.BackendRequest`; raises
  ``BackendError``, and never answers from another device than the one in the table.
"""

import importlib
from typing import Any, NamedTuple

from cl4wsis.errors import BackendError
from cl4wsis_serve.backends.base import Backend, BackendRequest, Device


class BackendEntry(NamedTuple):
    """Where a backend is implemented, and on what it runs."""

    module: str
    device: Device


BACKENDS: dict[str, BackendEntry] = {
    "tensorrt": BackendEntry("cl4wsis_serve.backends.tensorrt", "cuda"),
    "tensorrt-rtx": BackendEntry("cl4wsis_serve.backends.tensorrt", "cuda"),
    "onnxruntime-cuda": BackendEntry("cl4wsis_serve.backends.onnxruntime_gpu", "cuda"),
    "onnxruntime-tensorrt": BackendEntry("cl4wsis_serve.backends.onnxruntime_gpu", "cuda"),
    "openvino": BackendEntry("cl4wsis_serve.backends.openvino", "cpu"),
    "onnxruntime": BackendEntry("cl4wsis_serve.backends.onnxruntime", "cpu"),
}
"""All backends by name, in the order in which ``auto`` tries them."""


def device_of(name: str) -> Device:
    """Return what a backend runs on.

    Raises:
        BackendError: there is no backend of this name; the message lists those there are.
    """
    return _entry(name).device


def why_unavailable(name: str) -> str | None:
    """Say why a backend cannot run on this machine, and what to do about it; nothing where it can.

    Raises:
        BackendError: there is no backend of this name.
    """
    reason: str | None = _module(name).why_unavailable(name)
    return reason


def open_backend(request: BackendRequest) -> Backend:
    """Load a graph into the backend that the request names.

    Raises:
        BackendError: there is no such backend, it cannot run here, or it cannot load the graph.
    """
    backend: Backend = _module(request.name).open_backend(request)
    return backend


def backend_status() -> dict[str, str | None]:
    """Say for every backend why it cannot be used on this machine; nothing where it can."""
    return {name: why_unavailable(name) for name in BACKENDS}


def _entry(name: str) -> BackendEntry:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _module(name: str) -> Any:
    return importlib.import_module(_entry(name).module)
