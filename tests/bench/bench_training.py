"""Step time of the phases and what it is spent on. Run by hand: python tests/bench/bench_training.py --crop 160 320.

Trains on drawn shapes, or on the images of another plan, with heads that nobody has trained; the first two steps are
not counted. Prints Markdown: a row per phase, with the share of each part in its step. ``teacher`` is the old network,
``student`` the one in training, its frozen parts included, ``targets`` all making of labels; ``rest`` is mostly
upsampling. With photographs::

    python tests/bench/bench_training.py --config animals7/4-3 --set data.root=FOLDER --crop 160 224
"""

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from cl4wsis.tasks import Plan, load_plan
from cl4wsis_train.data.loading import build_training_loader
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.optim import build_optimizer
from cl4wsis_train.phases import base, instance, semantic
from cl4wsis_train.phases.common import Phase

PhaseName = Literal["base", "semantic", "instance"]
PARTS = ("data", "teacher", "student", "localizer", "targets", "losses", "backward", "optimizer", "rest")
FUNCTIONS = {
    base: {"targets": ("encode_instance_targets", "semantic_target_from_ids")},
    semantic: {"targets": ("semantic_target", "self_training_target", "random_dropout_mask")},
    instance: {
        "targets": ("semantic_map_from_logits", "find_peaks", "synthesize_targets", "refine_targets", "merge_targets")
    },
}


class Stopwatch:
    """Adds up the time of named parts; time inside an inner part does not count for the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._last = self.now()

    def now(self) -> float:
        """Return the time once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def enter(self, part: str) -> None:
        """Begin a part."""
        self._book()
        self._stack.append(part)

    def leave(self) -> None:
        """End the part begun last."""
        self._book()
        self._stack.pop()

    def _book(self) -> None:
        now = self.now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed as a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def watch(self, module: nn.Module, name: str) -> None:
        """Time the forward passes of a module as a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave())


def build_phase(plan: Plan, name: PhaseName) -> Phase:
    """Build a phase on networks that nobody has trained."""
    torch.manual_seed(0)
    split = plan.split(1)
    old_network = InstanceSegmenter(plan.recipe.network, (len(split.old_names),))
    if name == "base":
        return base.BasePhase(old_network, plan.recipe)
    network = InstanceSegmenter(plan.recipe.network, (len(split.old_names), len(split.new_names)))
    network.load_previous(old_network.state_dict())
    phase = semantic.SemanticPhase(network, old_network, plan.recipe, split)
    if name == "semantic":
        return phase
    # An untrained classifier sees few new classes; a bias makes regions for which labels are to be made.
    nn.init.constant_(network.semantic_branch.classifier[1].bias, 1.0)
    return instance.InstancePhase(phase, plan.recipe)


def watch_parts(phase: Phase, watch: Stopwatch) -> None:
    """Time the networks of a phase."""
    networks = [("student", phase.network)]
    if hasattr(phase, "old_network"):
        networks.append(("teacher", phase.old_network))
    for owner, network in networks:
        for part in (network.encoder, network.semantic_branch, network.instance_branch):
            watch.watch(part, owner)
    for name in ("localizer", "peak_generator"):
        if getattr(phase, name, None) is not None:
            watch.watch(getattr(phase, name), "localizer")
    if isinstance(phase, semantic.SemanticPhase):
        watch.watch(phase.refinement, "targets")


def timed_functions(watch: Stopwatch) -> contextlib.ExitStack:
    """Time label making and losses, which phases call by name."""
    stack = contextlib.ExitStack()
    for module in (base, semantic, instance):
        names = {function: part for part, functions in FUNCTIONS[module].items() for function in functions}
        names |= {name: "losses" for name in vars(module) if name.endswith("_loss") and callable(vars(module)[name])}
        for name, part in names.items():
            stack.enter_context(mock.patch.object(module, name, watch.timed(part, getattr(module, name))))
    return stack


def measure(plan: Plan, name: PhaseName, batch_size: int, steps: int, device: torch.device) -> dict[str, float]:
    """Return the median step time of a phase in milliseconds as ``step``, and of its parts."""
    phase = build_phase(plan, name).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = getattr(plan.recipe, name).optimizer
    known = {id(parameter) for parameter in phase.network.encoder.parameters()}
    heads = [parameter for parameter in phase.parameters() if id(parameter) not in known]
    optimizer = build_optimizer(settings, phase.network.encoder.parameters(), heads)
    loader = build_training_loader(plan, 0 if name == "base" else 1, name, batch_size, seed=0)
    watch = Stopwatch(device)
    watch_parts(phase, watch)
    rows: list[dict[str, float]] = []
    warm = settings.warmup_epochs  # so that every loss takes part
    batches = iter(())
    with timed_functions(watch):
        phase.train()
        while len(rows) < steps + 2:
            watch.seconds.clear()
            with watch.part("rest"):
                with watch.part("data"):
                    batch = next(batches, None)
                    if batch is None:
                        batches = iter(loader)
                        batch = next(batches)
                    batch = batch.to(device)
                total = torch.stack(list(phase(batch, warm).values())).sum()
                with watch.part("backward"):
                    total.backward()
                with watch.part("optimizer"):
                    optimizer.step()
                    optimizer.zero_grad()
            rows.append(dict(watch.seconds))
    parts = {part: 1e3 * statistics.median(row.get(part, 0.0) for row in rows[2:]) for part in PARTS}
    return {"step": 1e3 * statistics.median(sum(row.values()) for row in rows[2:]), **parts}


def print_table(crop: int, batch_size: int, rows: dict[PhaseName, dict[str, float]]) -> None:
    """Print the step time of every phase, its ratio to the base phase, and the shares of the parts."""
    print(f"\n{crop} px, batch {batch_size}\n")
    print(f"| phase | ms per step | / base | {' | '.join(PARTS)} |")
    print(f"| --- |{' ---: |' * (len(PARTS) + 2)}")
    for name, row in rows.items():
        shares = " | ".join(f"{row[part] / row['step']:.1%}" for part in PARTS)
        print(f"| {name} | {row['step']:.0f} | {row['step'] / rows['base']['step']:.2f} | {shares} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crop", type=int, nargs="+", default=[160])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="counted steps per phase")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--config", default="shapes")
    parser.add_argument("--set", action="append", default=[], help="field=value of the plan")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"plan {arguments.config}, {threads}, torch {torch.__version__}")
    torch.set_flush_denormal(True)
    drawn = load_plan(arguments.config, arguments.set).data.kind == "shapes"
    for crop in arguments.crop:
        assignments = [f"recipe.crop_size={crop}", f"recipe.input_size=[{crop}, {crop}]"]
        if drawn:
            assignments.append(f"data.image_size={crop}")
        plan = load_plan(arguments.config, [*assignments, *arguments.set])
        names: tuple[PhaseName, ...] = ("base", "semantic", "instance")
        print_table(
            crop,
            arguments.batch,
            {name: measure(plan, name, arguments.batch, arguments.steps, device) for name in names},
        )


if __name__ == "__main__":
    main()
