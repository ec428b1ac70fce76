"""The step folder: what training leaves behind for export, evaluation and the next step.

``runs/<plan>/step-<t>/`` holds ``segmenter.safetensors`` and ``step.json``; this module reads and writes the latter,
and finds steps. A folder is complete when it has its final name: it is written under a temporary one and renamed.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from cl4wsis.config import Settings
from cl4wsis.errors import RunError
from cl4wsis.folders import replaced_file
from cl4wsis.recipe import NetworkSettings
from cl4wsis.tasks import Plan

WEIGHTS_FILE = "segmenter.safetensors"
STEP_FILE = "step.json"


class ClassInfo(Settings):
    """One class a Segmenter knows; its position in the list is its label."""

    name: str
    step_added: int
    color: tuple[int, int, int]
    """RGB."""


class InputRule(Settings):
    """What the network expects of its input: RGB, (image - mean) / std, values of image in 0..255."""

    size: tuple[int, int]
    """(height, width), px; an image is fitted into it, its aspect kept, and padded right and below with the mean."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class StepInfo(Settings):
    """Everything about a trained step but its weights."""

    format: Literal["cl4wsis-step/1"] = "cl4wsis-step/1"
    plan: Plan
    """The plan as resolved when the step was trained, recipe included."""
    step: int
    classes: tuple[ClassInfo, ...]
    """All classes seen so far, in label order."""
    class_counts: tuple[int, ...]
    """Number of classes each step added up to here: the convolutions of the two class heads."""
    network: NetworkSettings
    input: InputRule
    weights_sha256: str
    parent_sha256: str | None
    """Weights of the step this one was trained from; none for step 0."""
    seconds: dict[str, float]
    """Training time of each phase."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Result of the evaluation after training, as written by ``cl4wsis.metrics``."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of cl4wsis, torch and timm."""


def step_folder(run: Path, step: int, variant: str = "cl4wsis") -> Path:
    """Return the folder of a step, which need not exist.

    Presets and supervised baselines stand in a folder of their own within the run. They share the base step.

    Args:
        run: run folder.
        step: step number.
        variant: ``recipe.variant`` of the plan.
    """
    shared = variant == "cl4wsis" or step == 0
    return (run if shared else run / variant) / f"step-{step}"


def trained_steps(run: Path, variant: str = "cl4wsis") -> list[int]:
    """List the complete steps of a run, in order."""
    parents = {step_folder(run, step, variant).parent for step in (0, 1)}
    found = (
        re.fullmatch(r"step-(\d+)", path.parent.name)
        for parent in parents
        for path in parent.glob(f"step-*/{STEP_FILE}")
    )
    steps = {int(match[1]) for match in found if match}
    return sorted(step for step in steps if (step_folder(run, step, variant) / STEP_FILE).is_file())


def read_step(folder: Path) -> StepInfo:
    """Read ``step.json``.

    Raises:
        RunError: the folder is no complete step, or was written by another version.
    """
    path = folder / STEP_FILE
    try:
        return StepInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError(f"{folder}: is not a trained step ({STEP_FILE} is missing)") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path}: cannot be understood: {where}: {first['msg']}") from error


def read_plan_step(plan: Plan, step: int, run: Path) -> StepInfo:
    """Read a trained step of a run, once it is sure that its classes are those of the plan.

    Several plans may end up in one run folder, when a plan is edited or its steps are set on the command line. Measured
    or continued under another plan, a step would be taken for what it is not.

    Args:
        plan: whose step it should be; ``plan.recipe.variant`` selects the folder.
        step: step number.
        run: run folder.

    Raises:
        ConfigError: the plan has no such step.
        RunError: the step is not trained, cannot be read, or knows other classes.
    """
    folder = step_folder(run, step, plan.recipe.variant)
    expected = plan.split(step).seen_names
    info = read_step(folder)
    found = tuple(known.name for known in info.classes)
    if found != expected:
        raise RunError(
            f"{folder}: was trained on another plan: it knows {', '.join(found)}, but step {step} of plan "
            f"'{plan.name}' has {', '.join(expected)}; give the plan it was trained on, name another run folder with "
            "--run, or delete this step to train it again"
        )
    return info


def write_step_info(folder: Path, info: StepInfo) -> None:
    """Write ``step.json`` atomically."""
    write_text_atomically(folder / STEP_FILE, json.dumps(info.model_dump(mode="json"), indent=1) + "\n")


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new one, never half of it."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
