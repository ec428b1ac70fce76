"""Optimisers and the learning-rate schedule (CL4WSIS, ICCV 2023, implementation details)."""

from collections.abc import Iterable

import torch
from torch import nn

from cl4wsis.recipe import OptimizerSettings


def build_optimizer(
    settings: OptimizerSettings,
    encoder: Iterable[nn.Parameter],
    heads: Iterable[nn.Parameter],
    inherited: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Build the optimiser of one phase.

    Args:
        settings: kind and rates.
        encoder: parameters that learn at ``encoder_lr``; frozen ones are left out.
        heads: parameters that learn at ``head_lr``; frozen ones are left out.
        inherited: parameters that learn at ``inherited_lr``, or at ``head_lr`` where that is not set.
    """
    inherited_lr = settings.head_lr if settings.inherited_lr is None else settings.inherited_lr
    rates = (settings.encoder_lr, inherited_lr, settings.head_lr)
    groups = [
        {"params": trainable, "lr": rate, "initial_lr": rate}
        for parameters, rate in zip((encoder, inherited, heads), rates, strict=True)
        if (trainable := [p for p in parameters if p.requires_grad])
    ]
    if settings.kind == "sgd":
        return torch.optim.SGD(
            groups, momentum=settings.momentum, nesterov=settings.momentum > 0, weight_decay=settings.weight_decay
        )
    return torch.optim.Adam(groups, weight_decay=settings.weight_decay)


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    settings: OptimizerSettings,
    iteration: int,
    iterations_per_epoch: int,
    epochs: int,
) -> None:
    """Set the rate of every group for the coming update.

    The rate is constant during the warm-up epochs; then it is ``initial * (1 - it / it_max) ** power`` with ``it``
    counted from the very start, so it drops a little where the warm-up ends.

    Args:
        optimizer: whose groups carry ``initial_lr``.
        settings: warm-up and exponent.
        iteration: updates done so far in this phase.
        iterations_per_epoch: updates in one epoch.
        epochs: of this phase.
    """
    warm = iteration < settings.warmup_epochs * iterations_per_epoch
    factor = 1.0 if warm else (1 - iteration / (epochs * iterations_per_epoch)) ** settings.power
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
