"""Settings under which a whole step trains in seconds: eight pictures of 64 px, random weights, thin heads.

The method is the published one, every module on.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cl4wsis.tasks import Plan, load_plan
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.phases.semantic import SemanticPhase

TINY = [
    'steps=[["disc", "square", "triangle", "star"], ["ring", "cross"], ["crescent", "heart"]]',
    "data.num_train=8",
    "data.num_val=4",
    "data.image_size=64",
    "recipe.crop_size=64",
    "recipe.input_size=[64, 64]",
    "recipe.network.weights=none",
    "recipe.network.semantic_channels=16",
    "recipe.network.instance_channels=16",
    "recipe.network.decoder_channels=16",
    "recipe.network.localizer_channels=16",
    "recipe.base.epochs=2",
    "recipe.base.batch_size=4",
    "recipe.semantic.epochs=2",
    "recipe.semantic.batch_size=4",
    "recipe.semantic.optimizer.warmup_epochs=1",
    "recipe.instance.epochs=2",
    "recipe.instance.batch_size=4",
    "recipe.log_every=1",
    "recipe.network.encoder_statistics=batch",
    "recipe.network.head_init=default",
    "recipe.network.learned_upsampling=false",
    "recipe.semantic.train_encoder=true",
    "recipe.semantic.random_dropout=true",
    "recipe.semantic.refine_target=false",
    "recipe.semantic.old_classes_compete=false",
    "recipe.semantic.suppress_old=0",
    "recipe.semantic.peak_input=logits",
    "recipe.instance.peaks.smoothing=true",
    "recipe.instance.peaks.accept_peakless=false",
]

GENTLE = [
    "recipe.network.weights=package",
    "recipe.network.encoder_statistics=stored",
    "recipe.network.semantic_channels=32",
    "recipe.network.localizer_channels=32",
    "recipe.crop_size=96",
    'recipe.base.optimizer={kind="sgd",encoder_lr=1e-4,head_lr=1e-2}',
    "recipe.base.instance_loss.center_weight=5",
    'recipe.semantic.optimizer={kind="sgd",encoder_lr=1e-5,head_lr=1e-3,warmup_epochs=1}',
    'recipe.instance.optimizer={kind="sgd",encoder_lr=0.0,head_lr=1e-3,warmup_epochs=0}',
    "recipe.instance.instance_loss.center_weight=5",
    "recipe.instance.peaks.smoothing=false",
    "recipe.instance.peaks.accept_peakless=true",
    "recipe.semantic.old_classes_compete=true",
    "recipe.semantic.peak_input=log_odds",
]
"""Settings under which the last bits of sums do not grow into different loss curves: small rates and well-posed
statistics; yet every loss but the localizer's self-training has something to teach."""


def tiny_plan(*overrides: str) -> Plan:
    """Load the plan ``shapes`` with these settings and further assignments."""
    return load_plan("shapes", [*TINY, *overrides])


@contextmanager
def no_dropout() -> Iterator[None]:
    """Switch dropout off: its masks depend on the build of PyTorch, and on which process holds an image."""
    original = torch.nn.Dropout.forward
    torch.nn.Dropout.forward = lambda self, input: input  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Dropout.forward = original  # type: ignore[method-assign]


def read_losses(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Read the losses of every logged iteration of a step, by phase."""
    losses: dict[str, list[dict[str, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        losses.setdefault(entry["phase"], []).append(entry["losses"])
    return losses


def tiny_phase(*overrides: str) -> SemanticPhase:
    """Build phase 1 of step 1 on networks that nobody has trained, with further assignments to the tiny plan."""
    plan = tiny_plan(*overrides)
    torch.manual_seed(0)
    old_network = InstanceSegmenter(plan.recipe.network, (4,))
    network = InstanceSegmenter(plan.recipe.network, (4, 2))
    network.load_previous(old_network.state_dict())
    return SemanticPhase(network, old_network, plan.recipe, plan.split(1), plan.all_seen_labels)
