"""``cl4wsis inspect`` recognises what it is given."""

import json
from pathlib import Path

import pytest
from bundles import write_color_bundle
from typer.testing import CliRunner

from cl4wsis.cli.main import app
from cl4wsis.recipe import NetworkSettings
from cl4wsis.steps import ClassInfo, InputRule, StepInfo, write_step_info
from cl4wsis.tasks import load_plan

RUNNER = CliRunner()


def inspect(*arguments: str) -> str:
    answer = RUNNER.invoke(app, ["inspect", *arguments])
    assert answer.exit_code == 0, answer.stderr
    return answer.stdout


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one step and one bundle."""
    step = tmp_path / "shapes" / "step-1"
    step.mkdir(parents=True)
    info = StepInfo(
        plan=load_plan("shapes"),
        step=1,
        classes=(
            ClassInfo(name="disc", step_added=0, color=(255, 0, 16)),
            ClassInfo(name="ring [new]", step_added=1, color=(0, 0, 200)),
        ),
        class_counts=(1, 1),
        network=NetworkSettings(),
        input=InputRule(size=(96, 128), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        weights_sha256="ab" * 32,
        parent_sha256="cd" * 32,
        seconds={"semantic": 12.4, "instance": 30.0},
        metrics={"ap50": {"all": 0.5, "new": None}},
        versions={"torch": "2.15.0"},
    )
    write_step_info(step, info)
    write_color_bundle(tmp_path / "shapes" / "colors.cl4wsis")
    return tmp_path / "shapes"


def test_a_bundle_names_its_graphs(run: Path) -> None:
    text = " ".join(inspect(str(run / "colors.cl4wsis")).split())
    assert "model.onnx (float32, post=graph), network.onnx (float32, post=host)" in text


def test_plan_by_name_and_by_file(tmp_path: Path) -> None:
    assert "image tags" in inspect("shapes")
    plan = tmp_path / "mine.toml"
    plan.write_text('name = "mine"\nsteps = [["cat"], ["dog", "cow"]]\n[data]\nkind = "shapes"\n')
    assert "dog, cow" in inspect(str(plan))
    plan.write_text(plan.read_text() + '[recipe]\nmethod = "joint"\n')
    assert "image tags" not in inspect(str(plan))
    content = json.loads(inspect(str(plan), "--json"))
    assert (content["kind"], content["name"], content["steps"]) == ("plan", "mine", [["cat"], ["dog", "cow"]])


def test_step(run: Path) -> None:
    text = inspect(str(run / "step-1"))
    for part in ("96 x 128 px", "abababababab", "cdcdcdcdcdcd", "semantic 12 s", "#ff0010", "ring [new]", "ap50.all"):
        assert part in text
    assert json.loads(inspect(str(run / "step-1"), "--json"))["kind"] == "step"


def test_run_lists_steps_and_bundles(run: Path) -> None:
    text = inspect(str(run))
    assert "step-1" in text
    assert "colors.cl4wsis" in text
    content = json.loads(inspect(str(run), "--json"))
    assert content["kind"] == "run"
    assert [step["step"] for step in content["steps"]] == [1]
    assert content["bundles"] == [str(run / "colors.cl4wsis")]


def test_run_tells_what_is_unfinished(run: Path, tmp_path: Path) -> None:
    for folder in (run, tmp_path / "fresh"):
        (folder / "step-2.partial").mkdir(parents=True)
        text = inspect(str(folder))
        assert "step-2.partial" in text
        assert "train-step" in text
        assert json.loads(inspect(str(folder), "--json"))["unfinished"] == [str(folder / "step-2.partial")]


def test_bundle_shows_the_results_of_verify(run: Path) -> None:
    path = run / "golden.cl4wsis"
    write_color_bundle(path, num_golden=1)
    assert "Checks" not in inspect(str(path))
    arguments = ["verify", str(path), "--backend", "onnxruntime", "--post", "host"]
    assert RUNNER.invoke(app, arguments).exit_code == 0
    shown = inspect(str(path)).partition("Checks")[2]
    assert "onnxruntime" in shown
    assert "passed" in shown


@pytest.mark.parametrize("inner", ["", "model.onnx"], ids=["bundle", "lone graph"])
def test_bundle(run: Path, inner: str) -> None:
    path = str(run / "colors.cl4wsis" / inner)
    text = inspect(path)
    for part in ("colors, step 1", "32 x 48 px", "instance_ids", "(batch, 32, 48)", "blue"):
        assert part in text
    content = json.loads(inspect(path, "--json"))
    assert (content["kind"], content["step"]) == ("bundle", 1)


def test_bundle_with_another_name_is_recognised(run: Path) -> None:
    (run / "colors.cl4wsis").rename(run / "renamed")
    assert "colors, step 1" in inspect(str(run / "renamed"))


@pytest.mark.parametrize(("name", "message"), [("nothing", "no plan"), ("", "is neither a plan")])
def test_what_is_none_of_these_is_refused(tmp_path: Path, name: str, message: str) -> None:
    answer = RUNNER.invoke(app, ["inspect", str(tmp_path / name)])
    assert answer.exit_code == 1
    assert message in answer.stderr
