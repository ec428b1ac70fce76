"""Void pixels count in no supervised loss."""

import math

import pytest
import torch
from tiny import tiny_plan

from cl4wsis_train.data.batch import Batch
from cl4wsis_train.losses.semantic import semantic_bce_loss
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.phases.base import BasePhase


def test_mean_is_taken_over_known_pixels() -> None:
    # One image, two classes, three pixels: at logit 0 each class costs log 2, at the void pixel far more.
    logits = torch.zeros(1, 2, 1, 3)
    logits[..., 2] = 50.0
    target = torch.zeros(1, 2, 1, 3)
    void = torch.tensor([[[False, False, True]]])
    assert semantic_bce_loss(logits, target, void).item() == pytest.approx(2 * math.log(2))
    assert semantic_bce_loss(logits, target).item() == pytest.approx((4 * math.log(2) + 100) / 3)
    assert semantic_bce_loss(logits, target, ~void & void).item() == semantic_bce_loss(logits, target).item()
    # Another process holds four known pixels: both divide by three.
    assert semantic_bce_loss(logits, target, void, torch.tensor(3.0)).item() == pytest.approx(4 * math.log(2) / 3)


def test_nothing_known_costs_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = semantic_bce_loss(logits, torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_void_mask_must_fit() -> None:
    with pytest.raises(ValueError, match="void"):
        semantic_bce_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, dtype=torch.bool))


def test_base_phase_learns_nothing_from_void_pixels() -> None:
    plan = tiny_plan()
    torch.manual_seed(0)
    phase = BasePhase(InstanceSegmenter(plan.recipe.network, (4,)), plan.recipe).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    tags, labels = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0]])
    ids = torch.zeros(1, 64, 64, dtype=torch.int32)
    ids[:, 8:24, 8:24] = 1
    void = torch.zeros(1, 64, 64, dtype=torch.bool)
    void[:, 32:] = True

    def losses(mask: torch.Tensor | None) -> dict[str, float]:
        with torch.no_grad():
            return {name: loss.item() for name, loss in phase(Batch(images, tags, ids, labels, mask), 0).items()}

    known, all_pixels, nothing_void = losses(void), losses(None), losses(torch.zeros_like(void))
    assert known["center"] == all_pixels["center"]
    assert known["offset"] == all_pixels["offset"]
    assert known["semantic"] != pytest.approx(all_pixels["semantic"], rel=1e-4)
    assert nothing_void == pytest.approx(all_pixels)
