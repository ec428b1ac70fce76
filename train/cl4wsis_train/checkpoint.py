"""Weights and training state on disk: safetensors for tensors, JSON for the rest, and nothing else.

A step folder is assembled under the name ``step-<t>.partial`` and renamed once it is complete. While it is partial it
also holds the state from which an interrupted training goes on: ``last.safetensors`` (written after an epoch, with what
is no tensor in its metadata, so that the two can never be of different epochs), and the result of every phase that has
ended.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cl4wsis.comparison import difference
from cl4wsis.config import Settings
from cl4wsis.errors import RunError
from cl4wsis.folders import hold_folder, replaced_file
from cl4wsis.steps import WEIGHTS_FILE, StepInfo, file_sha256, read_step
from cl4wsis.tasks import Plan
from cl4wsis_train.models.network import InstanceSegmenter

_STATE_FILE = "last.safetensors"
_STATE_KEY = "state"


class Progress(Settings):
    """How far an interrupted step has come."""

    plan: Plan
    """The plan it was started with."""
    parent_sha256: str | None
    """Hash of the weights it started from."""
    phase: str
    """Phase to continue with."""
    epochs_done: int
    """Complete epochs of that phase."""
    iteration: int
    """Optimiser updates of that phase."""
    seconds: dict[str, float]
    """Training time so far, by phase."""
    loss_scaler: dict[str, float | int]
    """State of what scales the loss in float16; empty in other precisions."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors so that a reader sees the old or the new file, never half of one.

    Raises:
        RunError: the file cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replaced_file(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors leaves a file that its owner alone can read
            save_file(contiguous, temporary, metadata)
            temporary.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be written: {error}") from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes from training in it at the same time.

    Raises:
        RunError: another process does, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error.strerror or error}") from error
    sentence = f"{folder}: another process trains this step; wait for it, or stop it first"
    with hold_folder(folder, RunError(sentence)):
        yield


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        path.open("rb").close()  # safetensors takes a file that may not be read for one that is missing
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError as error:
        raise RunError(f"{path}: is missing") from error
    except PermissionError as error:
        raise RunError(f"{path}: may not be read; its owner can allow it") from error
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: is damaged ({error}); train this step again") from error


def check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse the weights of a training that diverged.

    Args:
        tensors: by name.
        folder: of the step, for the message.

    Raises:
        RunError: a tensor holds infinity or what is no number.
    """
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise RunError(
            f"{folder}: {len(broken)} tensors of the network are not finite, among them {broken[0]}; delete the folder "
            "and train this step again with lower learning rates"
        )


def load_step(folder: Path) -> tuple[InstanceSegmenter, StepInfo]:
    """Rebuild the Segmenter of a trained step.

    Args:
        folder: a complete step folder.

    Returns:
        The network in evaluation mode on the CPU, and what ``step.json`` says.

    Raises:
        RunError: the folder is no step, or its weights are not finite, or not those that ``step.json`` names.
    """
    info = read_step(folder)
    weights = folder / WEIGHTS_FILE
    tensors = load_tensors(weights)
    if file_sha256(weights) != info.weights_sha256:
        raise RunError(f"{weights}: is not the file that step.json describes (SHA-256 differs); train this step again")
    check_finite(tensors, folder)
    network = InstanceSegmenter(info.network.model_copy(update={"weights": "none"}), info.class_counts)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{weights}: does not fit the network that step.json describes: {error}") from error
    return network.eval(), info


def save_progress(folder: Path, progress: Progress, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of an unfinished phase."""
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    text = json.dumps({"progress": progress.model_dump(mode="json"), "scalars": scalars})
    save_tensors(folder / _STATE_FILE, tensors, {_STATE_KEY: text})


def read_progress(folder: Path, plan: Plan, step: int, parent_sha256: str | None) -> Progress | None:
    """Return how far a partial step has come, or None when nothing was saved yet.

    Args:
        folder: of the partial step.
        plan: to go on with.
        step: of the plan.
        parent_sha256: of the weights that the step starts from now.

    Raises:
        RunError: it is damaged, or was started with other settings that matter or from other weights.
    """
    if not (folder / _STATE_FILE).is_file():
        return None
    try:
        progress = Progress.model_validate(_read_state(folder)["progress"])
    except (KeyError, ValidationError) as error:
        raise RunError(
            f"{folder / _STATE_FILE}: is damaged or of another version; delete {folder} to start this step again"
        ) from error
    way_out = f"delete {folder} to start this step anew"
    changed = difference(progress.plan, plan, step)
    if changed is not None:
        raise RunError(f"{folder}: was started with other settings ({changed}); go on with those, or {way_out}")
    if progress.parent_sha256 != parent_sha256:
        raise RunError(
            f"{folder}: was started from weights {str(progress.parent_sha256)[:12]}, but the previous step holds "
            f"{str(parent_sha256)[:12]} now; put those back, or {way_out}"
        )
    return progress


def _read_state(folder: Path) -> dict[str, Any]:
    """Read what is no tensor; nothing where the file holds nothing of the kind."""
    path = folder / _STATE_FILE
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {}).get(_STATE_KEY, "{}"))
            return state
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path}: is damaged ({error}); delete {folder} to start this step again") from error


def restore_progress(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load module and optimiser from the state that :func:`save_progress` wrote."""
    tensors = load_tensors(folder / _STATE_FILE)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    scalars = _read_state(folder)["scalars"]
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            entries.setdefault(int(index), {})[key] = tensor
    state = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})


def drop_progress(folder: Path) -> None:
    """Delete the state of an unfinished phase."""
    (folder / _STATE_FILE).unlink(missing_ok=True)
