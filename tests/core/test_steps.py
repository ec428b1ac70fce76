"""Step folders: where they are, which are complete, and what reading a broken one says."""

import hashlib
from pathlib import Path

import pytest

from cl4wsis.config import build_settings
from cl4wsis.errors import RunError
from cl4wsis.recipe import NetworkSettings
from cl4wsis.steps import (
    STEP_FILE,
    ClassInfo,
    InputRule,
    StepInfo,
    file_sha256,
    read_step,
    step_folder,
    trained_steps,
    write_step_info,
    write_text_atomically,
)
from cl4wsis.tasks import Plan, class_color


def step_info() -> StepInfo:
    plan = build_settings(
        Plan,
        {
            "name": "pets",
            "steps": [["cat"], ["dog"]],
            "data": {"kind": "coco", "train": {"images": "a"}, "val": {"images": "b"}, "steps": {1: {"images": "c"}}},
        },
        "pets.toml",
    )
    return StepInfo(
        plan=plan,
        step=1,
        classes=tuple(
            ClassInfo(name=name, step_added=step, color=class_color(step)) for step, name in enumerate(("cat", "dog"))
        ),
        class_counts=(1, 1),
        network=NetworkSettings(),
        input=InputRule(size=(64, 96), mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4)),
        weights_sha256="0" * 64,
        parent_sha256=None,
        seconds={"semantic": 1.5, "instance": 2.0},
        metrics={"AP50": None, "per_class": [0.5, 0.25]},
        versions={"torch": "2.10"},
    )


def test_step_info_survives_writing_and_reading(tmp_path: Path) -> None:
    write_step_info(tmp_path, step_info())
    assert read_step(tmp_path) == step_info()


def test_a_folder_without_step_file_is_no_step(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path.name}: is not a trained step \({STEP_FILE} is missing\)"):
        read_step(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cl4wsis-step/1", "cl4wsis-step/2", "format: Input should be 'cl4wsis-step/1'"),
        ('"step": 1', '"step": "one"', "step: Input should be a valid integer"),
        ('"weights_sha256"', '"weights_sha"', "weights_sha256: Field required"),
        ("{", "", "Invalid JSON"),
    ],
    ids=["newer format", "wrong type", "missing field", "not JSON"],
)
def test_a_step_file_that_does_not_fit_is_named_with_its_first_problem(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    write_step_info(tmp_path, step_info())
    path = tmp_path / STEP_FILE
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(RunError) as caught:
        read_step(tmp_path)
    assert str(caught.value).startswith(f"{path}: cannot be understood: ")
    assert message in str(caught.value)


# --- finding steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "step", "expected"),
    [
        ("cl4wsis", 0, "step-0"),
        ("cl4wsis", 12, "step-12"),
        ("fine-tune", 0, "step-0"),
        ("fine-tune", 1, "fine-tune/step-1"),
        ("joint", 0, "step-0"),
        ("wilson", 2, "wilson/step-2"),
        ("joint", 1, "joint/step-1"),
    ],
)
def test_baselines_have_folders_of_their_own(method: str, step: int, expected: str) -> None:
    assert step_folder(Path("run"), step, method) == Path("run") / expected


def test_only_complete_steps_are_found_in_number_order(tmp_path: Path) -> None:
    for name in ("step-10", "step-2", "step-0", "step-x", "step-03.tmp", "fine-tune/step-1", "joint/step-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / STEP_FILE).write_text("{}")
    (tmp_path / "step-1").mkdir()  # begun, not finished
    assert trained_steps(tmp_path) == [0, 2, 10]
    assert trained_steps(tmp_path, "fine-tune") == [0, 1]
    assert trained_steps(tmp_path, "joint") == [0, 1]


def test_a_run_that_does_not_exist_has_no_steps(tmp_path: Path) -> None:
    assert trained_steps(tmp_path / "nothing") == []


# --- files ------------------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    write_text_atomically(path, "né\n")
    assert path.read_bytes() == "né\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "half a \ud800")
    assert path.read_text() == "old"


def test_file_hash_is_sha256_in_hex(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
