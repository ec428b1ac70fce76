"""``train-step`` and ``evaluate`` as a user calls them: what they print, refuse and leave behind."""

import json
from pathlib import Path

import pytest
from tiny import TINY
from typer.testing import CliRunner

from cl4wsis.cli.main import app
from cl4wsis.steps import trained_steps

RUNNER = CliRunner()
SETTINGS = [part for override in TINY for part in ("--set", override)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose step 0 was trained from the command line."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    answer = RUNNER.invoke(app, ["train-step", "--run", str(folder), "--device", "cpu", *SETTINGS])
    assert answer.exit_code == 0, answer.output
    assert "mean all" in answer.stdout
    return folder


def test_without_a_number_the_next_step_is_trained(run: Path) -> None:
    assert trained_steps(run) == [0]
    answer = RUNNER.invoke(app, ["train-step", "--run", str(run), "--device", "cpu", "--json", *SETTINGS])
    assert answer.exit_code == 0, answer.output
    assert trained_steps(run) == [0, 1]
    assert json.loads(answer.stdout)["metrics"]["step"] == 1


def test_missing_previous_step_is_explained(tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, ["train-step", "--step", "2", "--run", str(tmp_path), *SETTINGS])
    assert answer.exit_code == 1
    assert "starts from step 1" in answer.stderr
    assert "--with-previous" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "plan 'shapes' has steps 0 to 2, not 3"),
        (["--config", "shape"], "no plan 'shape'"),
        (["--set", "recipe.base.epoch=1"], "did you mean 'recipe.base.epochs'?"),
        (["--set", "recipe.crop_size=100"], "crop_size 100 must be a multiple of 32"),
        (["--method", "magic"], "recipe.method"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    answer = RUNNER.invoke(app, ["train-step", "--run", str(tmp_path), *arguments])
    assert answer.exit_code == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.output


def test_evaluate_measures_a_trained_step(run: Path) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--step", "0", "--run", str(run), "--json", *SETTINGS])
    assert answer.exit_code == 0, answer.output
    measured = json.loads(answer.stdout)
    assert [c["name"] for c in measured["classes"]] == ["disc", "square", "triangle", "star"]
    assert measured["num_images"] == 4


def test_evaluate_without_a_bundle_says_what_to_do(tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--run", str(tmp_path)])
    assert answer.exit_code == 1
    assert "cl4wsis export" in answer.stderr


def test_bundle_and_step_exclude_each_other(tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--bundle", str(tmp_path), "--step", "1"])
    assert answer.exit_code == 2
