"""``train-step`` and ``evaluate`` as a user calls them: what they print, refuse and leave behind."""

import json
from pathlib import Path

import pytest
from bundles import write_color_bundle
from tiny import TINY
from typer.testing import CliRunner

from cl4wsis.cli.main import app
from cl4wsis.steps import ClassInfo, read_step, trained_steps, write_step_info

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
        (["--device", "foo"], "--device foo with --devices auto cannot be used here (You selected an invalid"),
        (["--device", "tpu"], "--device takes auto, cpu, cuda or mps"),
        (["--device", "cpu", "--devices", "0"], "--devices auto or a number from 1"),
        (["--device", "cpu", "--devices", "-2"], "--devices auto or a number from 1"),
        (["--device", "cpu", "--devices", "abc"], "--devices auto or a number from 1"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    answer = RUNNER.invoke(app, ["train-step", "--run", str(tmp_path), *arguments])
    assert answer.exit_code == 1
    assert message in answer.stderr
    assert "Traceback" not in answer.output


OTHER_PLAN = 'steps=[["square", "disc", "triangle", "star"], ["ring", "cross"], ["crescent", "heart"]]'


@pytest.mark.parametrize(
    "command",
    [
        ["train-step"],
        ["train-step", "--step", "2", "--with-previous"],
        ["evaluate", "--step", "0"],
        ["diagnose", "--step", "0"],
        ["diagnose"],
        ["demo"],
    ],
)
def test_step_of_another_plan_is_refused(run: Path, command: list[str]) -> None:
    """Swapped classes fit the network just as well."""
    answer = RUNNER.invoke(app, [*command, "--run", str(run), *SETTINGS, "--set", OTHER_PLAN])
    assert answer.exit_code == 1, answer.output
    assert "was trained on another plan: it knows disc, square, triangle, star" in answer.stderr
    assert "of plan 'shapes' has square, disc, triangle, star" in answer.stderr
    assert "--run" in answer.stderr


def test_demo_does_not_show_steps_that_were_trained_with_other_settings(run: Path) -> None:
    answer = RUNNER.invoke(app, ["demo", "--run", str(run), *SETTINGS, "--set", "recipe.seed=99"])
    assert answer.exit_code == 1, answer.output
    assert "step-0: was trained with other settings: recipe.seed was" in answer.stderr


def test_step_of_another_plan_does_not_count_as_trained(run: Path, tmp_path: Path) -> None:
    """Where all steps are there, but one learned other classes, training says so instead of having nothing to do."""
    (tmp_path / "step-0").symlink_to(run / "step-0")
    two_steps = 'steps=[["disc", "square", "triangle", "star"], ["heart"]]'
    info = read_step(run / "step-0")
    (tmp_path / "step-1").mkdir()
    ring = ClassInfo(name="ring", step_added=1, color=(1, 2, 3))
    write_step_info(tmp_path / "step-1", info.model_copy(update={"step": 1, "classes": (*info.classes, ring)}))
    answer = RUNNER.invoke(app, ["train-step", "--run", str(tmp_path), *SETTINGS, "--set", two_steps])
    assert answer.exit_code == 1
    assert f"{tmp_path / 'step-1'}: was trained on another plan" in answer.stderr
    assert "star, ring, but step 1 of plan 'shapes' has disc, square, triangle, star, heart" in answer.stderr


@pytest.mark.parametrize(
    "command", [["train-step"], ["evaluate", "--step", "1"], ["diagnose"], ["export"]], ids=lambda command: command[0]
)
def test_preset_keeps_its_method(tmp_path: Path, command: list[str]) -> None:
    arguments = ["--run", str(tmp_path), "--preset", "plus"]
    spellings = [["--method", "joint"]] + [["--set", "recipe.method=joint"]] * (command != ["export"])
    for spelling in spellings:
        answer = RUNNER.invoke(app, [*command, *arguments, *spelling])
        assert answer.exit_code == 2
        assert "the method cl4wsis, not joint" in " ".join(answer.stderr.replace("│", " ").split())


def test_method_may_repeat_that_of_the_preset(tmp_path: Path) -> None:
    answer = RUNNER.invoke(
        app, ["evaluate", "--step", "1", "--run", str(tmp_path), "--preset", "joint", "--method", "joint"]
    )
    assert answer.exit_code == 1
    assert f"{tmp_path / 'joint' / 'step-1'}: is not a trained step" in answer.stderr


def test_an_encoder_that_cannot_be_exported_is_not_trained(tmp_path: Path) -> None:
    encoder = "bat_resnext26ts"  # an attention for one size of its input
    arguments = ["train-step", "--step", "0", "--run", str(tmp_path), *SETTINGS]
    answer = RUNNER.invoke(app, [*arguments, "--set", f"recipe.network.encoder={encoder}"])
    assert answer.exit_code == 1
    assert "cannot be exported" in answer.stderr
    assert "Nothing was trained; --no-export-check" in answer.stderr
    assert trained_steps(tmp_path) == []


def test_evaluate_measures_a_trained_step(run: Path) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--step", "0", "--run", str(run), "--json", *SETTINGS])
    assert answer.exit_code == 0, answer.output
    measured = json.loads(answer.stdout)
    assert [c["name"] for c in measured["classes"]] == ["disc", "square", "triangle", "star"]
    assert measured["num_images"] == 4


@pytest.mark.parametrize("command", [["evaluate", "--step", "0"], ["diagnose", "--step", "0"]])
def test_another_input_size_than_that_of_training_is_told(run: Path, command: list[str]) -> None:
    told = "--set recipe.input_size=[64,64]"
    arguments = [*command, "--run", str(run), "--json", *SETTINGS]
    same = RUNNER.invoke(app, arguments)
    assert same.exit_code == 0, same.output
    assert told not in same.stderr
    answer = RUNNER.invoke(app, [*arguments, "--set", "recipe.input_size=[64,96]"])
    assert answer.exit_code == 0, answer.output
    assert told in answer.stderr.replace("\n", " ")
    assert "64x96 px" in answer.stderr.replace("\n", " ")


def test_evaluate_takes_no_bundle_of_another_preset(tmp_path: Path) -> None:
    write_color_bundle(tmp_path / "shapes-step2.cl4wsis")
    write_color_bundle(tmp_path / "plus" / "shapes-step2.cl4wsis")
    for preset, folder in (("pam", "pam"), (None, ".")):
        options = [] if preset is None else ["--preset", preset]
        answer = RUNNER.invoke(app, ["evaluate", "--run", str(tmp_path), *options])
        assert answer.exit_code == 1
        expected = "give the plan it was trained on" if preset is None else f"{tmp_path / folder}/ holds no bundle"
        assert expected in answer.stderr


def test_evaluate_without_a_bundle_says_what_to_do(tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--run", str(tmp_path)])
    assert answer.exit_code == 1
    assert "cl4wsis export" in answer.stderr


@pytest.mark.parametrize(
    "option",
    [
        ["--backend", "onnxruntime"],
        ["--precision", "fp16"],
        ["--post", "host"],
        ["--threads", "2"],
        ["--allow-fallback"],
    ],
    ids=lambda option: option[0],
)
def test_options_of_a_bundle_are_refused_for_a_step(run: Path, option: list[str]) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--step", "0", "--run", str(run), *SETTINGS, *option])
    assert answer.exit_code == 2
    assert f"{option[0]}: for the evaluation of a bundle" in " ".join(answer.stderr.replace("│", " ").split())


def test_bundle_and_step_exclude_each_other(tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, ["evaluate", "--bundle", str(tmp_path), "--step", "1"])
    assert answer.exit_code == 2
