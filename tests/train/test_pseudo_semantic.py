import numpy as np
import pytest
import torch

from cl4wsis.tasks import ClassSplit
from cl4wsis_train.models.affinity import PixelAdaptiveRefinement
from cl4wsis_train.pseudo.semantic import (
    average_over_proposals,
    mask_by_labels,
    random_dropout_mask,
    self_training_target,
    semantic_target,
    smooth_labels,
)

SPLIT = ClassSplit(step=1, old_names=("a", "b"), new_names=("c", "d"))  # channels: 0 | 1 2 | 3 4


def random_case(batch=3, height=6, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cam_logits = 3 * torch.randn(batch, 5, height, width, generator=generator)
    old_probs = torch.rand(batch, 3, height, width, generator=generator)
    image_labels = torch.tensor([[0.0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])[:batch]
    return cam_logits, old_probs, image_labels


def target_slowly(cam_logits, old_probs, image_labels, alpha):
    target = np.zeros(cam_logits.shape)
    for b, _, y, x in np.ndindex(*target[:, :1].shape):
        m = np.exp(cam_logits[b, :, y, x])
        m /= m.sum()
        for c in range(1, len(m)):
            m[c] *= image_labels[b, c - 1]
        q = [alpha * (m[c] == m.max()) + (1 - alpha) * m[c] for c in range(len(m))]
        num_old = old_probs.shape[1]
        target[b, :, y, x] = [min(old_probs[b, 0, y, x], q[0]), *old_probs[b, 1:, y, x], *q[num_old:]]
    return target


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_segmenter_target_matches_the_formula(alpha):
    case = random_case()
    expected = target_slowly(*(tensor.double().numpy() for tensor in case), alpha)
    cam_logits, old_probs, image_labels = case
    target = semantic_target(cam_logits.softmax(1), old_probs, image_labels, alpha)
    np.testing.assert_allclose(target.numpy(), expected, atol=1e-6)


def test_segmenter_target_by_eye():
    # One pixel per column: background wins, new class 2 wins, untagged new class 3 would win.
    probs = torch.tensor([[0.7, 0.1, 0.1], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [0.1, 0.7, 0.2], [0.1, 0.1, 0.6]])
    old_probs = torch.tensor([[0.9, 0.9, 0.05], [0.3, 0.2, 0.1], [0.0, 0.5, 0.6]])
    target = semantic_target(probs[None, :, None], old_probs[None, :, None], torch.tensor([[0.0, 0, 1, 0]]), 0.5)
    expected = torch.tensor(
        [
            [0.85, 0.05, 0.05],  # min(P'_0, Q_0) with Q_0 = 0.5 * 1 + 0.5 * 0.7, then 0.05 twice
            [0.3, 0.2, 0.1],
            [0.0, 0.5, 0.6],
            [0.05, 0.85, 0.6],  # in the last pixel class 2 is the largest of those allowed: 0.5 + 0.1
            [0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(target[0, :, 0], expected)


def test_equal_classes_share_the_hard_label():
    smoothed = smooth_labels(torch.tensor([0.4, 0.4, 0.2])[None, :, None, None], 0.5)
    assert smoothed.flatten().tolist() == pytest.approx([0.7, 0.7, 0.1])


def test_background_survives_masking():
    masked = mask_by_labels(torch.ones(1, 5, 2, 2), torch.zeros(1, 4))
    assert masked.sum((2, 3)).tolist() == [[4, 0, 0, 0, 0]]


def self_training_slowly(refined, image_labels):
    """Cut refined maps (B, C, h, w) as the formula says."""
    target = np.zeros(refined.shape, dtype=bool)
    for b in range(len(refined)):
        keep = np.concatenate(([1], image_labels[b]))
        masked = refined[b] * keep[:, None, None]
        for c in range(len(masked)):
            factor = 0.7 if c == 0 else 0.6
            target[b, c] = masked[c] > max(factor * masked[c].max(), 0.2)
        target[b][:, target[b].sum(0) >= 2] = False
    return target


@pytest.mark.parametrize("seed", range(3))
def test_self_training_target_matches_the_formula(seed):
    cam_logits, _, image_labels = random_case(seed=seed, height=12, width=12)
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    refinement = PixelAdaptiveRefinement(num_iterations=2)
    target = self_training_target(cam_logits, images, image_labels, refinement)
    refined = refinement(images, torch.softmax(cam_logits, dim=1))  # all channels, as published
    np.testing.assert_array_equal(target.numpy(), self_training_slowly(refined.numpy(), image_labels.numpy()))
    assert target.any()
    assert int(target.sum(1).max()) == 1


@pytest.mark.parametrize(("probability", "is_taught"), [(0.19, False), (0.21, True)])
def test_a_class_that_is_weak_everywhere_teaches_nothing(probability, is_taught):
    rest = (1 - 0.1 - probability) / 3
    probs = torch.tensor([[0.9, 0.025, 0.025, 0.025, 0.025], [0.1, rest, rest, probability, rest]])  # (pixels, C)
    cam_logits = probs.log().T.reshape(1, 5, 1, 2)
    tags = torch.tensor([[0.0, 0, 1, 0]])
    target = self_training_target(cam_logits, torch.zeros(1, 3, 1, 2), tags, lambda images, maps: maps)
    assert target[0, :, 0].tolist() == [[True, False], [False] * 2, [False] * 2, [False, is_taught], [False] * 2]


def test_images_do_not_influence_each_other():
    cam_logits, old_probs, image_labels = random_case()
    images = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    refinement = PixelAdaptiveRefinement(num_iterations=2)
    order = [2, 0, 1]
    target = self_training_target(cam_logits, images, image_labels, refinement)
    permuted = self_training_target(cam_logits[order], images[order], image_labels[order], refinement)
    assert torch.equal(permuted, target[order])
    alone = semantic_target(cam_logits[1:2].softmax(1), old_probs[1:2], image_labels[1:2], 0.5)
    torch.testing.assert_close(alone[0], semantic_target(cam_logits.softmax(1), old_probs, image_labels, 0.5)[1])


def test_random_dropout_mask_asks_tagged_new_classes_alone():
    cam_logits = torch.full((1, 5, 1, 5), -4.0)
    for column, channel in enumerate((0, 1, 3, 4)):  # background, old, tagged new, untagged new, nothing
        cam_logits[0, channel, 0, column] = 4.0
    mask = random_dropout_mask(cam_logits, torch.tensor([[1.0, 0, 1, 0]]), SPLIT)
    assert mask.tolist() == [[[False, False, True, False, False]]]


def test_targets_carry_no_gradient():
    cam_logits, old_probs, image_labels = random_case()
    cam_logits.requires_grad_()
    assert not semantic_target(cam_logits.softmax(1), old_probs, image_labels, 0.5).requires_grad
    assert not random_dropout_mask(cam_logits, image_labels, SPLIT).requires_grad


def test_old_classes_win_the_hard_label_where_they_may_compete():
    cam_logits = torch.tensor([0.0, 3.0, 1.0]).view(1, 3, 1, 1)  # background, old, new
    background, _, new = torch.softmax(cam_logits.flatten(), 0).tolist()
    old_probs = torch.tensor([0.9, 0.8]).view(1, 2, 1, 1)
    labels = torch.tensor([[0.0, 1.0]])
    published = semantic_target(cam_logits.softmax(1), old_probs, labels, alpha=0.5)
    competing = semantic_target(cam_logits.softmax(1), old_probs, labels, alpha=0.5, old_classes_compete=True)
    assert published.flatten().tolist() == pytest.approx([0.5 * background, 0.8, 0.5 + 0.5 * new])
    assert competing.flatten().tolist() == pytest.approx([0.5 * background, 0.8, 0.5 * new])


def test_old_classes_yield_to_new_ones_where_asked():
    cam_logits = torch.tensor([0.0, 0.0, 40.0]).view(1, 3, 1, 1)  # certain of the new class
    old_probs = torch.tensor([0.5, 0.8]).view(1, 2, 1, 1)
    labels = torch.tensor([[0.0, 1.0]])
    published = semantic_target(cam_logits.softmax(1), old_probs, labels, alpha=0.5)
    halved, suppressed = (
        semantic_target(cam_logits.softmax(1), old_probs, labels, alpha=0.5, suppress_old=strength)
        for strength in (0.5, 1.0)
    )
    assert halved.flatten().tolist() == pytest.approx([0.0, 0.4, 1.0], abs=1e-6)
    assert published.flatten().tolist() == pytest.approx([0.0, 0.8, 1.0], abs=1e-6)
    assert suppressed.flatten().tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("keep_rest", [True, False])
def test_pixels_of_a_proposal_share_its_mean(keep_rest):
    probs = random_case()[0].softmax(1)
    proposals = torch.zeros(3, 12, 14, dtype=torch.int32)  # twice as fine as the maps
    proposals[0, 2:8, 4:10] = 7
    proposals[0, 8:, :2] = 2
    proposals[1, :4] = 7  # the same number in another image is another proposal
    found = average_over_proposals(probs, proposals, keep_rest)
    for b, y, x in np.ndindex(3, 6, 7):
        number = proposals[b, 2 * y + 1, 2 * x + 1]
        if number:
            members = proposals[b, 1::2, 1::2] == number
            expected = probs[b][:, members].mean(1)
        else:
            expected = probs[b, :, y, x] if keep_rest else torch.eye(5)[0]
        torch.testing.assert_close(found[b, :, y, x], expected)


def test_without_any_proposal_nothing_is_averaged():
    probs = random_case()[0].softmax(1)
    proposals = torch.zeros(3, 6, 7, dtype=torch.int32)
    torch.testing.assert_close(average_over_proposals(probs, proposals, keep_rest=True), probs)
    assert average_over_proposals(probs, proposals, keep_rest=False)[:, 0].min() == 1
