"""Errors that users see, and the gate in front of optional parts.

    Cl4wsisError
    ├── ConfigError      a plan or recipe that cannot be understood
    ├── DataError        images or annotations that are missing or broken
    │   └── ProblemsError      many of them at once
    ├── RunError         a run folder, step or checkpoint that does not fit
    ├── BundleError      an exported bundle that is damaged, foreign or too new
    │   └── BatchDependenceError   a network whose answer depends on the other images of a batch
    ├── BackendError     a runtime that cannot do what was asked of it
    │   └── EngineMissingError     no engine fits the machine
    └── MissingExtraError  an optional part that is not installed

A mistake in a call (wrong shape, wrong type) is a plain ``ValueError``.
"""

import importlib.util

_EXTRA_MODULES = {
    "train": ("torch", "torchvision", "timm", "lightning_fabric", "safetensors", "tensorboard", "matplotlib"),
    "export": ("torch", "onnx", "onnxscript"),
    "cpu": ("onnxruntime",),
    "trt": ("tensorrt",),
    "trt-rtx": ("tensorrt_rtx",),
    "openvino": ("openvino",),
    "sbd": ("scipy",),
    "serve": ("fastapi", "uvicorn"),
}


class Cl4wsisError(Exception):
    """Base of every error whose message is written for the person at the keyboard."""


class ConfigError(Cl4wsisError):
    """A plan or recipe names an unknown field or an impossible value."""


class DataError(Cl4wsisError):
    """Images or annotations are missing, unreadable or contradict each other."""


class RunError(Cl4wsisError):
    """A run folder lacks a step, or a step does not belong to this lineage."""


class BundleError(Cl4wsisError):
    """An exported bundle is damaged, foreign or of an unknown version."""


class BackendError(Cl4wsisError):
    """A runtime backend is not available or cannot do what was asked."""


class MissingExtraError(Cl4wsisError):
    """An optional part of the package is needed but not installed."""


def require(extra: str) -> None:
    """Check that the modules of an optional part can be found, without importing them.

    Args:
        extra: name of the extra, as in ``pip install 'cl4wsis[extra]'``.

    Raises:
        MissingExtraError: at least one module is missing; the message is the install command.
    """
    missing = [name for name in _EXTRA_MODULES[extra] if not _is_importable(name)]
    if missing:
        raise MissingExtraError(
            f"this needs {', '.join(missing)}, which is not installed; run: pip install 'cl4wsis[{extra}]'"
        )


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
