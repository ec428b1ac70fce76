"""Weights and training state on disk: safetensors for tensors, JSON for the rest, and nothing else.

A step folder is assembled under the name ``step-<t>.partial`` and renamed once it is complete. While it is partial it
also holds the state from which an interrupted training goes on: ``last.safetensors`` and ``last.json`` (written after
an epoch), and the result of every phase that has ended.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cl4wsis.config import Settings
from cl4wsis.errors import RunError
from cl4wsis.steps import WEIGHTS_FILE, StepInfo, file_sha256, read_step, write_text_atomically
from cl4wsis_train.models.network import InstanceSegmenter

_STATE_TENSORS = "last.safetensors"
_STATE_FILE = "last.json"


class Progress(Settings):
    """How far an interrupted step has come."""

    plan_sha256: str
    """Hash of the plan it was started with; another plan starts anew."""
    phase: str
    """Phase to continue with."""
    epochs_done: int
    """Complete epochs of that phase."""
    iteration: int
    """Optimiser updates of that phase."""
    seconds: dict[str, float]
    """Training time so far, by phase."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors so that a reader sees the old or the new file, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError as error:
        raise RunError(f"{path}: is missing") from error
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: is damaged ({error}); train this step again") from error


def load_step(folder: Path) -> tuple[InstanceSegmenter, StepInfo]:
    """Rebuild the Segmenter of a trained step.

    Args:
        folder: a complete step folder.

    Returns:
        The network in evaluation mode on the CPU, and what ``step.json`` says.

    Raises:
        RunError: the folder is no step, or its weights are not those that ``step.json`` names.
    """
    info = read_step(folder)
    weights = folder / WEIGHTS_FILE
    tensors = load_tensors(weights)
    if file_sha256(weights) != info.weights_sha256:
        raise RunError(f"{weights}: is not the file that step.json describes (SHA-256 differs); train this step again")
    network = InstanceSegmenter(info.network.model_copy(update={"weights": "none"}), info.class_counts)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{weights}: does not fit the network that step.json describes: {error}") from error
    return network.eval(), info


def save_progress(folder: Path, progress: Progress, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of an unfinished phase; the JSON is written last and names a tensor file that is complete."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    save_tensors(folder / _STATE_TENSORS, tensors)
    text = json.dumps({"progress": progress.model_dump(), "scalars": scalars}, indent=1)
    write_text_atomically(folder / _STATE_FILE, text)


def read_progress(folder: Path, plan_sha256: str) -> Progress | None:
    """Return how far a partial step has come, or None when there is nothing that fits the plan."""
    path = folder / _STATE_FILE
    if not path.is_file():
        return None
    try:
        progress = Progress.model_validate(json.loads(path.read_bytes())["progress"])
    except (ValueError, KeyError, ValidationError) as error:
        raise RunError(f"{path}: is damaged; delete {folder} to start this step again") from error
    return progress if progress.plan_sha256 == plan_sha256 else None


def restore_progress(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load module and optimiser from the state that :func:`save_progress` wrote."""
    tensors = load_tensors(folder / _STATE_TENSORS)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    scalars = json.loads((folder / _STATE_FILE).read_bytes())["scalars"]
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = tensor
    state = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


def drop_progress(folder: Path) -> None:
    """Delete the state of an unfinished phase."""
    for name in (_STATE_FILE, _STATE_TENSORS):
        (folder / name).unlink(missing_ok=True)
