"""``cl4wsis doctor``: what is installed, what works here, and why the rest does not. Never imports torch."""

import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import typer

from cl4wsis.cli.options import JsonOption

_DISTRIBUTIONS = (
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "pycocotools",
    "pydantic",
    "torch",
    "torchvision",
    "timm",
    "lightning-fabric",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "openvino",
    "fastapi",
)
_PARTS = {
    "train": "train-step, evaluate a trained step",
    "export": "export",
    "cpu": "predict and evaluate a bundle",
    "openvino": "predict faster on a CPU",
    "trt": "TensorRT engines",
    "trt-rtx": "TensorRT-RTX engines",
    "serve": "the HTTP server",
}
_COLLIDING_WHEELS = (
    (
        (
            "onnxruntime",
            "onnxruntime-gpu",
            "onnxruntime-openvino",
            "onnxruntime-directml",
            "onnxruntime-qnn",
            "onnxruntime-rocm",
            "onnxruntime-migraphx",
            "onnxruntime-training",
            "ort-nightly",
            "ort-nightly-gpu",
        ),
        "pip install 'cl4wsis[gpu]' (or 'cl4wsis[cpu]')",
    ),
    (
        ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"),
        "pip install opencv-python-headless",
    ),
)
"""Wheels that put files into the same folder, and how to end up with the right one alone."""


def doctor(as_json: JsonOption = False) -> None:
    """Show what is installed, what works on this machine, and why the rest is skipped."""
    from cl4wsis.cli.console import note, print_json

    findings = _examine()
    if as_json:
        print_json(findings)
    else:
        _print(findings)
    for problem in findings["problems"]:
        note(f"problem: {problem}")
    if findings["problems"]:
        raise typer.Exit(1)


def _examine() -> dict[str, Any]:
    versions = {name: _version(name) for name in _DISTRIBUTIONS}
    return {
        "cl4wsis": _version("cl4wsis"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "parts": {extra: _why_missing(extra) for extra in _PARTS},
        "onnxruntime_providers": _providers(),
        "gpus": gpu_names(),
        "backends": _backends(),
        "problems": [*_wheel_problems(versions), *_opencv_problems()],
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _why_missing(extra: str) -> str | None:
    from cl4wsis.errors import MissingExtraError, require

    try:
        require(extra)
    except MissingExtraError as error:
        return str(error)
    return None


def _providers() -> list[str]:
    """List the execution providers that the installed onnxruntime was built with."""
    try:
        import onnxruntime
    except Exception:  # the reason is reported with the backends
        return []
    return list(onnxruntime.get_available_providers())


def _backends() -> dict[str, dict[str, str | None]]:
    """Say of every backend what it runs on, and why it cannot be used here (none: it can)."""
    from cl4wsis_serve import BACKENDS, backend_status

    return {name: {"device": BACKENDS[name].device, "reason": reason} for name, reason in backend_status().items()}


def gpu_names() -> list[str]:
    """List NVIDIA GPUs with driver versions as the driver's own tool tells them; none where it is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _wheel_problems(versions: dict[str, str | None]) -> list[str]:
    """Find wheels that overwrite each other's files."""
    problems = []
    for wheels, remedy in _COLLIDING_WHEELS:
        present = [name for name in wheels if versions.get(name) or _version(name)]
        if len(present) > 1:
            both = "both" if len(present) == 2 else "all"
            names = f"{', '.join(present[:-1])} and {present[-1]}"
            problems.append(
                f"{names} are {both} installed and overwrite each other; run: "
                f"pip uninstall -y {' '.join(present)} && {remedy}"
            )
    return problems


def _opencv_problems() -> list[str]:
    try:
        import cv2  # noqa: F401 (that it can be imported is the question)
    except Exception as error:
        return [f"OpenCV cannot be imported ({error}); run: pip install --force-reinstall opencv-python-headless"]
    return []


def _print(findings: dict[str, Any]) -> None:
    from cl4wsis.cli.console import print_fields, print_table

    gpus = "; ".join(findings["gpus"]) or "no NVIDIA GPU (nvidia-smi is missing or finds none)"
    machine = (("python", findings["python"]), ("platform", findings["platform"]), ("gpu", gpus))
    print_fields(f"cl4wsis {findings['cl4wsis']}", machine)
    print_table("Packages", ("package", "version"), findings["packages"].items())
    parts = ((extra, use, findings["parts"][extra] or "ready") for extra, use in _PARTS.items())
    print_table("Parts", ("extra", "for", "state"), parts)
    backends = ((name, found["device"], found["reason"] or "ready") for name, found in findings["backends"].items())
    print_table("Backends, in the order of --backend auto", ("backend", "device", "state"), backends)
