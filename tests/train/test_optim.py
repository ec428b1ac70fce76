import pytest
import torch
from torch import nn

from cl4wsis.recipe import OptimizerSettings
from cl4wsis_train.optim import build_optimizer, set_learning_rate


def _layers() -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(2, 2), nn.Linear(2, 1)


def test_groups_have_their_own_rates_and_leave_out_frozen_parameters() -> None:
    encoder, head = _layers()
    encoder.bias.requires_grad_(False)
    optimizer = build_optimizer(OptimizerSettings(encoder_lr=0.1, head_lr=0.2), encoder.parameters(), head.parameters())
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.1, 1), (0.2, 2)]


@pytest.mark.parametrize(("inherited_lr", "expected"), [(None, 0.2), (0.01, 0.01), (0.0, 0.0)])
def test_inherited_parameters_may_learn_at_a_rate_of_their_own(inherited_lr: float | None, expected: float) -> None:
    (encoder, head), (inherited, _) = _layers(), _layers()
    settings = OptimizerSettings(encoder_lr=0.1, head_lr=0.2, inherited_lr=inherited_lr)
    optimizer = build_optimizer(settings, encoder.parameters(), head.parameters(), inherited.parameters())
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rate_of[id(layer.weight)] for layer in (encoder, inherited, head)] == [0.1, expected, 0.2]


def test_a_frozen_encoder_has_no_group() -> None:
    encoder, head = _layers()
    encoder.requires_grad_(False)
    optimizer = build_optimizer(OptimizerSettings(), encoder.parameters(), head.parameters())
    assert len(optimizer.param_groups) == 1


def test_sgd_uses_nesterov_momentum() -> None:
    encoder, head = _layers()
    settings = OptimizerSettings(kind="sgd", momentum=0.9)
    optimizer = build_optimizer(settings, encoder.parameters(), head.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"]


@pytest.mark.parametrize(
    ("warmup_epochs", "iteration", "expected"),
    [
        (0, 0, 1.0),
        (0, 50, 0.5**0.9),
        (2, 19, 1.0),  # 10 iterations an epoch: still warm
        (2, 20, 0.8**0.9),  # the decay is counted from the start, so it sets in with a drop
        (2, 99, 0.01**0.9),
    ],
)
def test_rate_decays_polynomially_after_the_warmup(warmup_epochs: int, iteration: int, expected: float) -> None:
    encoder, head = _layers()
    settings = OptimizerSettings(encoder_lr=1.0, head_lr=2.0, warmup_epochs=warmup_epochs)
    optimizer = build_optimizer(settings, encoder.parameters(), head.parameters())
    set_learning_rate(optimizer, settings, iteration, iterations_per_epoch=10, epochs=10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected, 2 * expected])
