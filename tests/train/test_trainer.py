"""Whole steps on a handful of drawn pictures: folders, lineage, resuming, baselines, several processes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import TINY, tiny_plan

from cl4wsis.errors import RunError
from cl4wsis.steps import read_step, step_folder, trained_steps
from cl4wsis_train import trainer
from cl4wsis_train.checkpoint import load_step, load_tensors, locked_folder, read_progress, save_tensors
from cl4wsis_train.log import TrainingLog
from cl4wsis_train.trainer import build_fabric, missing_steps, train_step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 0 and 1."""
    folder = tmp_path_factory.mktemp("run")
    for step in (0, 1):
        train_step(tiny_plan(), step, folder, fabric=build_fabric(tiny_plan(), "cpu"))
    return folder


def test_steps_leave_complete_folders(run: Path) -> None:
    assert trained_steps(run) == [0, 1]
    network, info = load_step(step_folder(run, 1))
    assert [c.name for c in info.classes] == list(tiny_plan().split(1).seen_names)
    assert [c.step_added for c in info.classes] == [0, 0, 0, 0, 1, 1]
    assert network.class_counts == (4, 2)
    assert info.parent_sha256 == read_step(step_folder(run, 0)).weights_sha256
    assert set(info.seconds) == {"semantic", "instance"}
    assert info.metrics


def test_folder_holds_no_training_state_and_no_pickle(run: Path) -> None:
    names = {path.name for path in step_folder(run, 1).iterdir()}
    assert names == {"segmenter.safetensors", "step.json", "semantic.safetensors", "metrics.jsonl", "tensorboard"}
    assert not list(run.glob("*.partial"))


def test_losses_of_every_phase_are_logged(run: Path) -> None:
    lines = [json.loads(line) for line in (step_folder(run, 1) / "metrics.jsonl").read_text().splitlines()]
    names = {(line["phase"], name) for line in lines for name in line["losses"]}
    assert names == {
        *(("semantic", name) for name in ("classification", "peak", "localizer_distillation", "flac")),
        *(("semantic", name) for name in ("encoder_distillation", "semantic", "self_training", "random_dropout")),
        *(("instance", name) for name in ("center_old", "offset_old", "center_new", "offset_new")),
    }
    assert all(value == value for line in lines for value in line["losses"].values())  # no NaN
    warm = [line for line in lines if line["phase"] == "semantic" and line["epoch"] == 0]
    assert all("self_training" not in line["losses"] for line in warm)


def test_phase_2_trains_the_instance_branch_alone(run: Path) -> None:
    phase_1 = load_tensors(step_folder(run, 1) / "semantic.safetensors")
    final = load_tensors(step_folder(run, 1) / "segmenter.safetensors")
    changed = {name for name, tensor in final.items() if not torch.equal(tensor, phase_1[f"network.{name}"])}
    assert changed
    assert all(name.startswith("instance_branch.") for name in changed)


def test_phase_1_leaves_the_instance_branch_alone(run: Path) -> None:
    base = load_tensors(step_folder(run, 0) / "segmenter.safetensors")
    phase_1 = load_tensors(step_folder(run, 1) / "semantic.safetensors")
    old = [name for name in base if name.startswith("instance_branch.")]
    assert all(torch.equal(base[name], phase_1[f"network.{name}"]) for name in old)


def test_frozen_encoder_stays_that_of_the_base_step(run: Path, tmp_path: Path) -> None:
    (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    plan = tiny_plan("recipe.semantic.train_encoder=false")
    folder = train_step(plan, 1, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False)
    base, final = (load_tensors(path / "segmenter.safetensors") for path in (step_folder(run, 0), folder))
    same = {name for name in base if name in final and torch.equal(base[name], final[name])}
    assert {name for name in base if name.startswith("encoder.")} <= same
    assert any(name.startswith("semantic_branch.") for name in base if name not in same)


def test_old_network_is_untouched_by_training(run: Path) -> None:
    base = load_tensors(step_folder(run, 0) / "segmenter.safetensors")
    phase_1 = load_tensors(step_folder(run, 1) / "semantic.safetensors")
    assert all(torch.equal(tensor, phase_1[f"old_network.{name}"]) for name, tensor in base.items())


@pytest.mark.parametrize(("phase", "epoch"), [("semantic", 1), ("instance", 0), ("instance", 1)])
def test_interrupted_step_ends_as_if_it_had_not_been(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, epoch: int
) -> None:
    (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    monkeypatch.setattr(trainer, "_SECONDS_BETWEEN_SAVES", 0.0)
    interrupted_step(tmp_path, monkeypatch, phase, epoch)
    with (tmp_path / "step-1.partial" / "metrics.jsonl").open("a") as file:  # written after the last save
        file.write(json.dumps({"phase": "instance", "iteration": 4, "lr": 0.0}) + '\n{"phase": "in')
    train_step(tiny_plan(), 1, tmp_path, fabric=build_fabric(tiny_plan(), "cpu"), evaluate=False)
    found, expected = (read_step(step_folder(folder, 1)).weights_sha256 for folder in (tmp_path, run))
    assert found == expected
    assert iterations(tmp_path) == iterations(run)
    assert shown_iterations(tmp_path) == shown_iterations(run)


def test_scale_of_the_loss_outlives_an_interruption(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 updates are left out until the scale of the loss is low enough."""
    plan = tiny_plan()

    def half_precision() -> Fabric:
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # Fabric makes one for GPUs alone
        return Fabric(accelerator="cpu", devices=1, plugins=precision)

    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step-0").symlink_to(step_folder(run, 0))
    interrupted_step(tmp_path / "interrupted", monkeypatch, "instance", 1, half_precision())
    parent = read_step(step_folder(run, 0)).weights_sha256
    progress = read_progress(tmp_path / "interrupted" / "step-1.partial", plan, 1, parent)
    assert progress is not None
    assert progress.loss_scaler["scale"] < 65536
    hashes = set()
    for name in ("whole", "interrupted"):
        folder = train_step(plan, 1, tmp_path / name, fabric=half_precision(), evaluate=False)
        hashes.add(read_step(folder).weights_sha256)
    assert len(hashes) == 1


def interrupted_step(
    run: Path, monkeypatch: pytest.MonkeyPatch, phase: str, epoch: int, fabric: Fabric | None = None
) -> None:
    """Start step 1 and interrupt it in its second iteration of an epoch; every epoch is saved."""
    plan = tiny_plan()
    monkeypatch.setattr(trainer, "_SECONDS_BETWEEN_SAVES", 0.0)
    original = trainer.set_learning_rate

    def interrupt(optimizer, settings, iteration, per_epoch, epochs):  # type: ignore[no-untyped-def]
        wanted = plan.recipe.semantic if phase == "semantic" else plan.recipe.instance
        if settings == wanted.optimizer and iteration == epoch * per_epoch + 1:
            raise KeyboardInterrupt
        original(optimizer, settings, iteration, per_epoch, epochs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "set_learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_step(plan, 1, run, fabric=fabric or build_fabric(plan, "cpu"), evaluate=False)
    assert not step_folder(run, 1).exists()


def iterations(run: Path) -> list[tuple[str, int]]:
    lines = (step_folder(run, 1) / "metrics.jsonl").read_text().splitlines()
    return [(entry["phase"], entry["iteration"]) for entry in map(json.loads, lines)]


def shown_iterations(run: Path) -> dict[str, list[int]]:
    """Return the iterations of every curve in TensorBoard."""
    events = EventAccumulator(str(step_folder(run, 1) / "tensorboard"))
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_a_later_step_cannot_change_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    plan = tiny_plan("recipe.network.output_stride=8", "recipe.network.head_init=prior")
    lines: list[str] = []
    train_step(plan, 1, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False, report=lines.append)
    found = [line for line in lines if line.startswith("recipe.network.")]
    assert found == ["recipe.network.output_stride stays 16, as in step 0; 8 needs a step 0 of its own"]


def test_weights_can_be_read_by_whom_the_folder_allows(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    (tmp_path / "b").touch()
    save_tensors(path, {"a": torch.zeros(2)})
    assert path.stat().st_mode == (tmp_path / "b").stat().st_mode == (step_folder(run, 1) / "step.json").stat().st_mode
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)
    with pytest.raises(RunError, match="may not be read"):
        load_tensors(path)


def test_an_interrupted_step_goes_on_under_the_same_settings_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    interrupted_step(tmp_path, monkeypatch, "instance", 1)
    other = tiny_plan("recipe.instance.epochs=3")
    with pytest.raises(RunError, match=r"other settings \(.*epochs.*go on with those, or delete"):
        train_step(other, 1, tmp_path, fabric=build_fabric(other, "cpu"), evaluate=False)
    lines: list[str] = []
    same = tiny_plan("recipe.num_workers=0", "recipe.log_every=2")
    train_step(same, 1, tmp_path, fabric=build_fabric(same, "cpu"), evaluate=False, report=lines.append)
    assert any(line.startswith("going on with phase instance") for line in lines)


def test_an_interrupted_step_does_not_go_on_from_other_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    interrupted_step(tmp_path, monkeypatch, "instance", 1)
    (tmp_path / "step-0").unlink()
    plan = tiny_plan("recipe.seed=1")
    train_step(plan, 0, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False)
    with pytest.raises(RunError, match=r"was started from weights .* the previous step holds"):
        train_step(tiny_plan(), 1, tmp_path, fabric=build_fabric(tiny_plan(), "cpu"), evaluate=False)


def test_one_process_at_a_time_trains_a_step(run: Path, tmp_path: Path) -> None:
    (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    with locked_folder(tmp_path / "step-1.partial"), pytest.raises(RunError, match="another process trains this step"):
        train_step(tiny_plan(), 1, tmp_path, fabric=build_fabric(tiny_plan(), "cpu"), evaluate=False)


def test_a_file_system_without_locks_is_no_reason_not_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)
    with locked_folder(tmp_path / "step-1.partial"):
        assert (tmp_path / "step-1.partial").is_dir()


def test_training_that_diverges_is_an_error(tmp_path: Path) -> None:
    plan = tiny_plan("recipe.base.optimizer.encoder_lr=1e30", "recipe.base.optimizer.head_lr=1e30")
    with pytest.raises(RunError, match=r"is not finite after .* lower learning rates"):
        train_step(plan, 0, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False)
    assert not step_folder(tmp_path, 0).exists()


def test_weights_that_are_not_finite_are_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last update may be the one that breaks them, and no loss sees it any more."""
    monkeypatch.setattr(TrainingLog, "flush", lambda log: None)
    plan = tiny_plan("recipe.base.optimizer.encoder_lr=1e30", "recipe.base.optimizer.head_lr=1e30")
    with pytest.raises(RunError, match="tensors of the network are not finite"):
        train_step(plan, 0, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False)
    assert not step_folder(tmp_path, 0).exists()


@pytest.mark.parametrize("step", [0, 1])
def test_mixed_precision_trains_every_phase(run: Path, tmp_path: Path, step: int) -> None:
    if step:
        (tmp_path / "step-0").symlink_to(step_folder(run, 0))
    plan = tiny_plan("recipe.precision=bf16-mixed")
    folder = train_step(plan, step, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False)
    assert read_step(folder).weights_sha256 != read_step(step_folder(run, step)).weights_sha256


def test_missing_previous_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"starts from step 1.*--with-previous"):
        train_step(tiny_plan(), 2, tmp_path)


def test_trained_step_is_not_overwritten(run: Path) -> None:
    with pytest.raises(RunError, match="trained already"):
        train_step(tiny_plan(), 1, run)


def test_step_of_another_lineage_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "step-1").symlink_to(step_folder(run, 1))
    plan = tiny_plan("recipe.seed=1")
    train_step(plan, 0, tmp_path, fabric=build_fabric(plan, "cpu"), evaluate=False)
    with pytest.raises(RunError, match="was trained from weights"):
        train_step(plan, 2, tmp_path)


def test_step_of_another_plan_is_refused(run: Path) -> None:
    other = tiny_plan('steps=[["disc", "square", "triangle", "star"], ["heart"], ["ring"], ["cross"]]')
    with pytest.raises(RunError, match="trained on another plan"):
        train_step(other, 2, run)


def test_missing_steps_are_listed_in_order(run: Path) -> None:
    assert missing_steps(tiny_plan(), 2, run) == [2]
    assert missing_steps(tiny_plan("recipe.method=fine-tune"), 2, run) == [1, 2]
    assert missing_steps(tiny_plan("recipe.method=joint"), 2, run) == [2]


@pytest.mark.parametrize(("method", "parent"), [("fine-tune", True), ("joint", False)])
def test_baselines_share_the_base_step_or_begin_anew(run: Path, method: str, parent: bool) -> None:
    plan = tiny_plan(f"recipe.method={method}", "recipe.base.epochs=1")
    folder = train_step(plan, 1, run, fabric=build_fabric(plan, "cpu"), evaluate=False)
    assert folder == run / method / "step-1"
    assert (read_step(folder).parent_sha256 is not None) == parent
    assert set(read_step(folder).seconds) == {"base"}


def start_training(launcher: list[str], *arguments: str) -> None:
    settings = [part for override in TINY for part in ("--set", override)]
    command = [sys.executable, "-m", *launcher, "train-step", "--device", "cpu", *arguments, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_two_processes_train_every_phase(tmp_path: Path) -> None:
    start_training(["cl4wsis"], "--devices", "2", "--step", "1", "--with-previous", "--run", str(tmp_path))
    assert trained_steps(tmp_path) == [0, 1]


@pytest.mark.slow
def test_torchrun_decides_on_the_processes(tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "cl4wsis"]
    start_training(launcher, "--step", "0", "--run", str(tmp_path))
    assert trained_steps(tmp_path) == [0]
