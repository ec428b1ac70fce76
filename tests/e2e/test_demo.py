"""From nothing to pictures: train, export, evaluate and predict with one command."""

import json
from pathlib import Path

import pytest
from tiny import TINY
from typer.testing import CliRunner

from cl4wsis.bundle import open_bundle
from cl4wsis.cli.main import app
from cl4wsis.images import read_image
from cl4wsis.steps import read_step, step_folder, trained_steps

RUNNER = CliRunner()
SETTINGS = [part for override in TINY for part in ("--set", override)]


@pytest.mark.slow
def test_demo_trains_exports_measures_and_predicts_every_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    answer = RUNNER.invoke(app, ["demo", "--run", str(run), "--device", "cpu", "--json", *SETTINGS])
    assert answer.exit_code == 0, answer.output
    printed = json.loads(answer.stdout)

    assert trained_steps(run) == [0, 1, 2]
    parents = [open_bundle(run / f"shapes-step{step}.cl4wsis").manifest.parent_sha256 for step in range(3)]
    weights = [read_step(step_folder(run, step)).weights_sha256 for step in range(3)]
    assert parents == [None, *weights[:2]]

    measured = printed["exported model"]
    assert [len(measured["steps"][str(step)]["classes"]) for step in range(3)] == [4, 6, 8]
    assert set(measured["forgetting"]["2"]["classes"]) == {"disc", "square", "triangle", "star", "ring", "cross"}

    overlays = sorted((run / "pictures" / "masks" / "overlay").iterdir())
    assert len(overlays) == 4
    assert read_image(overlays[0]).shape[2] == 3
    assert json.loads((run / "pictures" / "masks" / "coco.json").read_text()) is not None


@pytest.mark.slow
def test_demo_of_joint_training_shows_its_own_network(tmp_path: Path) -> None:
    settings = [*SETTINGS, "--set", "recipe.method=joint", "--set", "recipe.base.epochs=1"]
    answer = RUNNER.invoke(app, ["demo", "--run", str(tmp_path), "--device", "cpu", "--json", *settings])
    assert answer.exit_code == 0, answer.output
    assert list(json.loads(answer.stdout)["exported model"]["steps"]) == ["2"]
    trained = read_step(step_folder(tmp_path, 2, "joint"))
    assert open_bundle(tmp_path / "joint" / "shapes-step2.cl4wsis").manifest.weights_sha256 == trained.weights_sha256
    assert not (tmp_path / "step-2").exists()


@pytest.mark.slow
def test_exported_model_measures_as_the_network_it_came_from(tmp_path: Path) -> None:
    settings = [*SETTINGS, "--set", "recipe.network.weights=package", "--set", "recipe.base.epochs=20"]
    settings += ["--set", "recipe.base.optimizer.head_lr=0.003", "--set", "data.num_train=32"]
    arguments = ["--run", str(tmp_path), *settings]
    trained = RUNNER.invoke(app, ["train-step", "--device", "cpu", "--json", *arguments])
    assert trained.exit_code == 0, trained.output
    exported = RUNNER.invoke(app, ["export", "--run", str(tmp_path)])
    assert exported.exit_code == 0, exported.output
    measured = RUNNER.invoke(app, ["evaluate", "--json", *arguments])
    assert measured.exit_code == 0, measured.output
    network, graph = json.loads(trained.stdout)["metrics"], json.loads(measured.stdout)
    for measure in ("ap50", "ap", "coco_ap"):
        assert graph[measure]["all"] == pytest.approx(network[measure]["all"], abs=1e-6)
