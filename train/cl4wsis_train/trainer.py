"""The loop: one step of a plan, phase by phase, from the previous step's folder to the new one.

``train_step`` reads as the story: check the data, build the phases, run each over its epochs, evaluate, rename the
folder. Devices, precision and processes are lightning-fabric's.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn

import cl4wsis
from cl4wsis.datasets import check_sources
from cl4wsis.errors import ConfigError, DataError, RunError
from cl4wsis.preprocess import pad_color
from cl4wsis.recipe import LEARNING_FIELDS, NetworkSettings, OptimizerSettings, Recipe
from cl4wsis.steps import (
    WEIGHTS_FILE,
    ClassInfo,
    InputRule,
    StepInfo,
    file_sha256,
    read_step,
    step_folder,
    write_step_info,
)
from cl4wsis.tasks import Plan, class_color
from cl4wsis_train.checkpoint import (
    Progress,
    check_finite,
    drop_progress,
    load_step,
    load_tensors,
    locked_folder,
    read_progress,
    restore_progress,
    save_progress,
    save_tensors,
)
from cl4wsis_train.data.loading import build_fitted_loader, build_training_loader
from cl4wsis_train.evaluate import evaluate_network
from cl4wsis_train.log import TrainingLog
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.optim import build_optimizer, set_learning_rate
from cl4wsis_train.phases.base import BasePhase
from cl4wsis_train.phases.common import Phase
from cl4wsis_train.phases.instance import InstancePhase
from cl4wsis_train.phases.semantic import SemanticPhase
from cl4wsis_train.processes import synchronize_norms

logger = logging.getLogger(__name__)

PhaseName = Literal["base", "semantic", "instance"]
_SEMANTIC_RESULT = "semantic.safetensors"
_SECONDS_BETWEEN_SAVES = 30.0
_LONGEST_WAIT = timedelta(days=1)
_FRESH_LOSS_SCALER = {"scale": 2.0**16, "_growth_tracker": 0}
"""What a scaler of PyTorch begins with."""


def train_step(
    plan: Plan,
    step: int,
    run: Path,
    *,
    fabric: Fabric | None = None,
    evaluate: bool = True,
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Train one step of a plan and leave its folder behind.

    An interrupted step goes on after its last saved epoch, with the same result as without the interruption. One
    process at a time may train a step.

    Args:
        plan: resolved plan; ``plan.recipe.method`` selects the method or a supervised baseline.
        step: 0 for the base step.
        run: run folder; the step is written to ``step_folder(run, step, plan.recipe.variant)``.
        fabric: launched fabric with devices and precision; one device chosen automatically when not given.
        evaluate: measure the trained network on the plan's evaluation images.
        report: receives lines about what happens, in the first process.

    Returns:
        The complete step folder.

    Raises:
        RunError: the step exists already, the previous one is missing, or belongs to another lineage; another process
            trains this step; it was interrupted under other settings; the loss is no longer finite.
        DataError: the data is broken; found before training starts.
        ConfigError: step 0 of a plan with a preset, or a batch that the processes cannot share evenly.
    """
    if step == 0 and plan.recipe.preset:
        raise ConfigError(f"step 0 is the plan's own, whatever the preset; found preset '{plan.recipe.preset}'")
    folder = step_folder(run, step, plan.recipe.variant)
    if folder.exists():
        raise RunError(f"{folder}: step {step} is trained already; delete the folder to train it again")
    previous = previous_folder(plan, step, run)
    fabric = fabric or build_fabric(plan)
    if not fabric.is_global_zero:  # all processes would say the same
        report = logger.debug
    report(_check_data(plan, step, fabric))
    return _StepTraining(plan, step, folder, previous, fabric, report).run(evaluate)


def _check_data(plan: Plan, step: int, fabric: Fabric) -> str:
    """Check the data once for all processes, and let all of them know what was found."""
    is_sound, text = True, ""
    if fabric.is_global_zero:
        try:
            text = str(check_sources(plan, step))
        except DataError as error:
            is_sound, text = False, str(error)
    is_sound, text = fabric.broadcast((is_sound, text))
    if not is_sound:
        raise DataError(text)
    return text


def build_fabric(plan: Plan, device: str = "auto", num_devices: int | str = "auto") -> Fabric:
    """Build and launch a fabric.

    Args:
        plan: gives the precision.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        num_devices: processes on this machine; ``auto`` is one on a CPU and all GPUs otherwise. Under ``torchrun`` or
            ``fabric run`` the launcher decides, on the number of machines too.
    """
    num_nodes = 1
    if torch.distributed.is_torchelastic_launched():
        num_devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // num_devices
    elif device in ("auto", "cpu") and num_devices == "auto" and not torch.cuda.is_available():
        num_devices = 1
    fabric = Fabric(
        accelerator=device,
        devices=num_devices,
        num_nodes=num_nodes,
        precision=plan.recipe.precision,
        strategy=_strategy(num_devices),
    )
    fabric.launch()
    return fabric


def _strategy(num_devices: int | str) -> Any:
    """Leave out-of-use parameters be, heads that wait for the warm-up to end, and wait for the evaluation.

    One process evaluates while the others wait for it; 30 minutes, the default, are too short for large data.
    """
    if num_devices == 1 and not torch.distributed.is_torchelastic_launched():
        return "auto"
    return DDPStrategy(find_unused_parameters=True, timeout=_LONGEST_WAIT)


def missing_steps(plan: Plan, step: int, run: Path) -> list[int]:
    """List the steps up to and including this one that are still to be trained for it, in order."""
    first = step if plan.recipe.method == "joint" else 0
    numbers = range(first, step + 1)
    return [number for number in numbers if not step_folder(run, number, plan.recipe.variant).exists()]


def previous_folder(plan: Plan, step: int, run: Path) -> Path | None:
    """Find the step that this one starts from, and check that it belongs to the plan.

    Raises:
        RunError: it is missing, or its classes are others.
    """
    if step == 0 or plan.recipe.method == "joint":
        plan.split(step)
        return None
    folder = step_folder(run, step - 1, plan.recipe.variant)
    if not folder.exists():
        raise RunError(
            f"step {step} of plan '{plan.name}' starts from step {step - 1}, which is not in {folder}; "
            f"train it first (cl4wsis train-step --step {step - 1}) or add --with-previous"
        )
    info = read_step(folder)
    found, expected = tuple(c.name for c in info.classes), plan.split(step).old_names
    if found != expected:
        raise RunError(f"{folder}: was trained on another plan: it knows {found}, step {step} expects {expected}")
    if info.step > 0 and info.parent_sha256 is not None:
        _check_lineage(info, step_folder(run, info.step - 1, plan.recipe.variant))
    return folder


def _check_lineage(info: StepInfo, parent: Path) -> None:
    """Refuse a step whose parent was trained anew since; a parent that was removed is no reason to refuse."""
    if parent.exists() and read_step(parent).weights_sha256 != info.parent_sha256:
        raise RunError(
            f"step {info.step} was trained from weights {str(info.parent_sha256)[:12]}, but {parent} holds "
            f"{read_step(parent).weights_sha256[:12]}; train step {info.step} again"
        )


class _StepTraining:
    """The parts of one step's training: its folder, its networks, and the phases run so far."""

    def __init__(
        self,
        plan: Plan,
        step: int,
        folder: Path,
        previous: Path | None,
        fabric: Fabric,
        report: Callable[[str], None],
    ) -> None:
        self.plan, self.step, self.folder, self.previous = plan, step, folder, previous
        self.fabric, self.report = fabric, report
        self.recipe = plan.recipe
        self.split = plan.split(step)
        self.partial = folder.with_name(folder.name + ".partial")
        self.seconds: dict[str, float] = {}
        self.old_network: InstanceSegmenter | None = None
        self.parent_sha256 = read_step(previous).weights_sha256 if previous else None

    def run(self, evaluate: bool) -> Path:
        """Train all phases, evaluate, and give the folder its final name."""
        writes = self.fabric.is_global_zero
        with locked_folder(self.partial) if writes else nullcontext():
            self.fabric.barrier()
            if self.folder.exists():  # another process has just finished it
                raise RunError(f"{self.folder}: step {self.step} was trained by another process meanwhile")
            progress = read_progress(self.partial, self.plan, self.step, self.parent_sha256)
            if progress is not None:
                self.seconds = dict(progress.seconds)
                self.report(f"going on with phase {progress.phase} after {progress.epochs_done} epochs")
            done = (progress.phase, progress.iteration) if progress else None
            with _flushed_denormals(), TrainingLog(self.partial, self.recipe.log_every, writes, done) as log:
                network = self._run_phases(progress, log)
            if writes:
                self._finish(network, evaluate)
            self.fabric.barrier()
        return self.folder

    def _run_phases(self, progress: Progress | None, log: TrainingLog) -> InstanceSegmenter:
        torch.manual_seed(self._seed("start", 0))
        network, old_network = (
            model and model.to(memory_format=torch.channels_last) for model in self._build_networks()
        )
        assert network is not None
        self.old_network = old_network
        if self.plan.learns_from_masks(self.step):
            base = BasePhase(network, self.recipe)
            self._run_phase("base", base, self.recipe.base.epochs, self.recipe.base.optimizer, progress, log)
            self._fit_discriminant(base, "base")
            return network
        assert old_network is not None
        semantic = SemanticPhase(network, old_network, self.recipe, self.split, self.plan.all_seen_labels)
        result = self.partial / _SEMANTIC_RESULT
        if progress is None or progress.phase == "semantic":
            settings = self.recipe.semantic
            self._run_phase("semantic", semantic, settings.epochs, settings.optimizer, progress, log)
            if settings.yielded_share:
                self._lower_new_classes(semantic, settings.yielded_share)
            self._fit_discriminant(semantic, "semantic")
            self._save_on_main(result, semantic.state_dict())
            progress = None
        else:
            semantic.load_state_dict(load_tensors(result))
        instance = InstancePhase(semantic, self.recipe, self.plan.all_seen_labels)
        settings_2 = self.recipe.instance
        self._run_phase("instance", instance, settings_2.epochs, settings_2.optimizer, progress, log)
        return network

    def _lower_new_classes(self, phase: SemanticPhase, share: float) -> None:
        """Go once through the training images, all of them in every process, so that all agree."""
        loader = build_training_loader(
            self.plan, self.step, "semantic", self.recipe.semantic.batch_size, self._seed("lower", 0)
        )
        drop = phase.lower_new_classes((batch.to(self.fabric.device) for batch in loader), share)
        self.report(f"logits of the new classes lowered by {drop:.2f}")

    def _fit_discriminant(self, phase: BasePhase | SemanticPhase, name: Literal["base", "semantic"]) -> None:
        """Let the discriminant know the classes of this step; every process goes through all images."""
        network = phase.network.eval()
        if network.discriminant is None:
            return
        padding = pad_color(network.mean)
        loader = build_fitted_loader(self.plan, self.step, name, getattr(self.recipe, name).batch_size, padding)
        with torch.no_grad():
            network.discriminant.fit(phase.labelled_features(batch.to(self.fabric.device)) for batch in loader)

    def _build_networks(self) -> tuple[InstanceSegmenter, InstanceSegmenter | None]:
        """Build the network of this step, started from the previous one, and the previous one itself."""
        counts = _class_counts(self.plan, self.step)
        if self.previous is None:
            return InstanceSegmenter(self._network_settings(self.recipe.network), counts), None
        old_network, info = load_step(self.previous)
        settings = info.network.model_copy(update={"weights": "none", **_training_settings(self.recipe)})
        _tell_unused(info.network, self.recipe.network, self.report)
        network = InstanceSegmenter(self._network_settings(settings), counts)
        network.load_previous(old_network.state_dict())
        return network, old_network

    def _network_settings(self, settings: NetworkSettings) -> NetworkSettings:
        """Leave the discriminant to the method: the supervised baselines learn from masks what tells classes apart."""
        return settings if self.recipe.method == "cl4wsis" else settings.model_copy(update={"discriminant": 0.0})

    def _inherited_parameters(self, network: InstanceSegmenter) -> list[nn.Parameter]:
        """List the parameters of the branches that the previous step's network has as well."""
        if self.old_network is None:
            return []
        old_names = self.old_network.state_dict().keys()
        branches = (network.semantic_branch, network.instance_branch)
        in_branches = {id(parameter) for branch in branches for parameter in branch.parameters()}
        return [p for name, p in network.named_parameters() if name in old_names and id(p) in in_branches]

    def _run_phase(
        self,
        name: PhaseName,
        phase: Phase,
        epochs: int,
        settings: OptimizerSettings,
        progress: Progress | None,
        log: TrainingLog,
    ) -> None:
        """Run one phase over its remaining epochs."""
        fabric = self.fabric
        batch_size = getattr(self.recipe, name).batch_size
        if batch_size % fabric.world_size:
            raise ConfigError(
                f"recipe.{name}.batch_size {batch_size} cannot be shared evenly by {fabric.world_size} processes; "
                "choose a multiple, or another --devices"
            )
        loader = build_training_loader(self.plan, self.step, name, batch_size // fabric.world_size, self._seed(name, 0))
        fabric_loader: Any = fabric.setup_dataloaders(loader)
        network = phase.network
        encoder = list(network.encoder.parameters())
        inherited = self._inherited_parameters(network)
        known = {id(parameter) for parameter in encoder + inherited}
        heads = [parameter for parameter in phase.parameters() if id(parameter) not in known]
        if fabric.world_size > 1:
            synchronize_norms(phase)
        optimizer = build_optimizer(settings, encoder, heads, inherited)
        model, fabric_optimizer = fabric.setup(phase, optimizer)
        first_epoch, iteration = 0, 0
        loss_scaler = fabric.strategy.precision.state_dict()
        if loss_scaler:  # the fabric may have trained something else before
            loss_scaler |= _FRESH_LOSS_SCALER
        if progress is not None and progress.phase == name:
            restore_progress(self.partial, phase, optimizer)
            loss_scaler = progress.loss_scaler
            first_epoch, iteration = progress.epochs_done, progress.iteration
        fabric.strategy.precision.load_state_dict(loss_scaler)
        seconds_before, start, last_save = self.seconds.get(name, 0.0), time.monotonic(), time.monotonic()
        per_epoch = len(fabric_loader)
        log.start_phase(name, epochs * per_epoch, iteration)
        for epoch in range(first_epoch, epochs):
            phase.train()
            self._seed_epoch(fabric_loader, loader, name, epoch)
            for batch in fabric_loader:
                set_learning_rate(optimizer, settings, iteration, per_epoch, epochs)
                losses = model(batch.to(fabric.device), epoch)
                fabric.backward(torch.stack(list(losses.values())).sum())
                fabric_optimizer.step()
                fabric_optimizer.zero_grad()
                iteration += 1
                log.update(iteration, epoch, losses, phase.statistics, optimizer.param_groups[-1]["lr"])
            self.seconds[name] = seconds_before + time.monotonic() - start
            is_due = time.monotonic() - last_save > _SECONDS_BETWEEN_SAVES
            # Processes save together, and their clocks may disagree.
            if fabric.broadcast(is_due) or epoch + 1 == epochs:
                last_save = time.monotonic()
                log.flush()
                self._save_progress(name, epoch + 1, iteration, phase, optimizer)

    def _seed(self, phase: str, epoch: int) -> int:
        """Derive the seed of a phase and epoch, so that an epoch runs alike with and without an interruption."""
        text = f"{self.recipe.seed}/{self.step}/{phase}/{epoch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def _seed_epoch(self, fabric_loader: Any, loader: Any, name: str, epoch: int) -> None:
        """Seed the order of images, and what is drawn at random: dropout on GPUs differently in each process."""
        seed = self._seed(name, epoch + 1)
        loader.generator.manual_seed(seed)
        if hasattr(fabric_loader.sampler, "set_epoch"):
            fabric_loader.sampler.set_epoch(epoch)
        torch.manual_seed(seed)
        if self.fabric.device.type == "cuda":
            torch.cuda.manual_seed(seed + self.fabric.global_rank)

    def _save_progress(
        self, name: PhaseName, epochs_done: int, iteration: int, phase: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.fabric.is_global_zero:
            progress = Progress(
                plan=self.plan,
                parent_sha256=self.parent_sha256,
                phase=name,
                epochs_done=epochs_done,
                iteration=iteration,
                seconds=self.seconds,
                loss_scaler=self.fabric.strategy.precision.state_dict(),
            )
            save_progress(self.partial, progress, phase, optimizer)
        self.fabric.barrier()

    def _save_on_main(self, path: Path, tensors: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            save_tensors(path, tensors)
        self.fabric.barrier()

    def _finish(self, network: InstanceSegmenter, evaluate: bool) -> None:
        """Write weights and ``step.json``, and rename the folder."""
        network.eval()
        check_finite(network.state_dict(), self.partial)
        weights = self.partial / WEIGHTS_FILE
        save_tensors(weights, network.state_dict())
        metrics: dict[str, Any] = {}
        if evaluate:
            self.report("evaluating")
            metrics = evaluate_network(network, self.plan, self.step).model_dump(mode="json")
        mean, std = network.mean, network.std
        info = StepInfo(
            plan=self.plan,
            step=self.step,
            classes=tuple(
                ClassInfo(name=name, step_added=_step_of(self.plan, name), color=class_color(label))
                for label, name in enumerate(self.split.seen_names)
            ),
            class_counts=_class_counts(self.plan, self.step),
            network=network.settings,
            input=InputRule(size=self.recipe.input_size, mean=mean, std=std),
            weights_sha256=file_sha256(weights),
            parent_sha256=self.parent_sha256,
            seconds={name: round(value, 1) for name, value in self.seconds.items()},
            metrics=metrics,
            versions={"cl4wsis": cl4wsis.__version__, "torch": torch.__version__, "timm": timm.__version__},
        )
        write_step_info(self.partial, info)
        drop_progress(self.partial)
        self.partial.rename(self.folder)


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Round numbers below 1e-38 to zero: fresh heads yield them, and a CPU is ten times slower on them."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _training_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of the network's settings that say how it learns; the others are those of step 0."""
    return {name: getattr(recipe.network, name) for name in LEARNING_FIELDS}


def _tell_unused(of_step_0: NetworkSettings, wanted: NetworkSettings, report: Callable[[str], None]) -> None:
    """Say which fields of the recipe are without effect, as they describe the weights of step 0."""
    for name in type(wanted).model_fields:
        found, value = getattr(of_step_0, name), getattr(wanted, name)
        if name not in (*LEARNING_FIELDS, "weights") and found != value:
            report(f"recipe.network.{name} stays {found!r}, as in step 0; {value!r} needs a step 0 of its own")


def _class_counts(plan: Plan, step: int) -> tuple[int, ...]:
    return tuple(len(names) for names in plan.steps[: step + 1])


def _step_of(plan: Plan, name: str) -> int:
    return next(step for step, names in enumerate(plan.steps) if name in names)
