"""Label rules and poolings follow what is done to the images: turns, flips, order of classes and of images."""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl4wsis.recipe import PeakSettings, RefineSettings
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.data.targets import InstanceTargets, encode_instance_targets
from cl4wsis_train.losses.cam import flac_loss
from cl4wsis_train.models.affinity import PixelAdaptiveRefinement
from cl4wsis_train.models.localizer import PeakGenerator, normalized_global_weighted_pooling
from cl4wsis_train.pseudo.instance import (
    Peaks,
    SemanticMap,
    find_peaks,
    find_regions,
    semantic_map_from_logits,
    synthesize_targets,
)
from cl4wsis_train.pseudo.refine import refine_targets
from cl4wsis_train.pseudo.semantic import random_dropout_mask, self_training_target, semantic_target

SPLIT = ClassSplit(step=1, old_names=("a", "b"), new_names=("c", "d"))  # channels: 0 | 1 2 | 3 4
TAGS = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
SIDE = 31
CLASS_ORDER = [0, 1, 2, 4, 3]  # of channels, with the two new classes exchanged
IMAGE_ORDER = [2, 0, 1]


class Motion(NamedTuple):
    """A motion of the image plane: quarter turns counter-clockwise, then a mirror image."""

    turns: int
    mirrored: bool

    def __call__(self, maps: Tensor) -> Tensor:
        """Move maps (..., H, W)."""
        turned = torch.rot90(maps, self.turns, (-2, -1))
        return turned.flip(-1) if self.mirrored else turned

    def offsets(self, maps: Tensor) -> Tensor:
        """Move maps (B, 2, H, W) of (dy, dx), and turn the arrows with them."""
        dy, dx = self(maps).unbind(1)
        for _ in range(self.turns):
            dy, dx = -dx, dy
        return torch.stack((dy, -dx if self.mirrored else dx), dim=1)


MOTIONS = [Motion(turns, mirrored) for turns, mirrored in product(range(4), (False, True))][1:]
moved = pytest.mark.parametrize("motion", MOTIONS, ids=lambda motion: f"{motion.turns}{'m' * motion.mirrored}")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def scene() -> tuple[Tensor, Tensor]:
    """Ids (3, SIDE, SIDE) and labels (3, 4) of rectangles with odd sides, so that centroids fall on pixels."""
    ids = torch.zeros(3, SIDE, SIDE, dtype=torch.int64)
    boxes = [(1, 1, 10, 8), (1, 12, 8, 23), (15, 3, 28, 10), (14, 16, 29, 29)]
    for image, (slot, (top, left, bottom, right)) in product(range(3), enumerate(boxes)):
        ids[image, top + image : bottom + image, left:right] = slot + 1
    return ids, torch.tensor([[2, 3, 2, 0], [2, 1, 2, 3], [3, 3, 2, 1]])


def class_map(ids: Tensor, labels: Tensor) -> Tensor:
    return F.pad(labels + 1, (1, 0)).gather(1, ids.flatten(1)).view_as(ids)


# --- maps in, maps out: rules that treat pixels alike -----------------------------------------------------------------

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
REFINEMENT = PixelAdaptiveRefinement(dilations=(1, 2), num_iterations=3)


def peak_generator() -> PeakGenerator:
    """A generator whose two classes are treated alike."""
    generator = PeakGenerator(2)
    with torch.no_grad():
        generator.conv.weight.copy_(torch.tensor([[1.0, -0.25], [-0.25, 1.0]])[:, :, None, None])
    return generator


def activation(cam_logits: Tensor, old_probs: Tensor, images: Tensor, tags: Tensor) -> Tensor:
    generator = peak_generator()
    return generator.activation(generator(cam_logits[:, 3:]), tags[:, 2:]).detach()


def semantic_map(cam_logits: Tensor, tags: Tensor) -> SemanticMap:
    return semantic_map_from_logits(cam_logits, cam_logits.flip(3), tags, SPLIT, (36, 36))


RULES: dict[str, Rule] = {
    "semantic target": lambda cam, old, _, tags: semantic_target(cam.softmax(1), old, tags, 0.5),
    "semantic target, competing": lambda cam, old, _, tags: semantic_target(cam.softmax(1), old, tags, 0.9, True, 0.5),
    "self-training target": lambda cam, _, images, tags: self_training_target(cam, images, tags, REFINEMENT),
    "refinement": lambda cam, _, images, __: REFINEMENT(images, cam.softmax(1)),
    "peak maps": activation,
    "random dropout": lambda cam, _, __, tags: random_dropout_mask(cam, tags, SPLIT)[:, None],
    "class map": lambda cam, _, __, tags: semantic_map(cam, tags).semantic_map[:, None],
    "probabilities": lambda cam, _, __, tags: semantic_map(cam, tags).new_class_probs[:, None],
}
by_rule = pytest.mark.parametrize("name", RULES)


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return 3 * randn(0, 3, 5, 12, 12), rand(1, 3, 3, 12, 12), rand(2, 3, 3, 12, 12), TAGS


@by_rule
@moved
def test_rule_moves_with_the_image(name: str, motion: Motion) -> None:
    cam, old, images, tags = inputs()
    found = RULES[name](motion(cam), motion(old), motion(images), tags)
    expected = motion(RULES[name](cam, old, images, tags))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.any()


@by_rule
def test_rule_does_not_mix_images(name: str) -> None:
    values = inputs()
    found = RULES[name](*(value[IMAGE_ORDER] for value in values))
    torch.testing.assert_close(found, RULES[name](*values)[IMAGE_ORDER], rtol=1e-4, atol=1e-5)
    single = RULES[name](*(value[:1] for value in values))
    torch.testing.assert_close(single[0], found[1], rtol=1e-4, atol=1e-5)


@by_rule
def test_rule_does_not_depend_on_the_order_of_new_classes(name: str) -> None:
    cam, old, images, tags = inputs()
    found = RULES[name](cam[:, CLASS_ORDER], old, images, tags[:, [0, 1, 3, 2]])
    expected = RULES[name](cam, old, images, tags)
    if name == "class map":
        expected = torch.tensor(CLASS_ORDER)[expected]
    elif name == "peak maps":
        expected = expected.flip(1)
    elif expected.shape[1] == 5:
        expected = expected[:, CLASS_ORDER]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- poolings and losses: numbers that motions must not change --------------------------------------------------------


@moved
@pytest.mark.parametrize("focal", [True, False])
def test_pooling_is_the_same_for_a_moved_image(motion: Motion, focal: bool) -> None:
    logits = randn(3, 3, 5, 8, 8)
    expected = normalized_global_weighted_pooling(logits, focal)
    torch.testing.assert_close(normalized_global_weighted_pooling(motion(logits), focal), expected)
    shuffled = normalized_global_weighted_pooling(logits[IMAGE_ORDER][:, CLASS_ORDER], focal)
    torch.testing.assert_close(shuffled, expected[IMAGE_ORDER][:, CLASS_ORDER])


@moved
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_consistency_is_the_same_for_a_moved_image(motion: Motion, average: str) -> None:
    """Move the image; then its mirror image and its turned image move as well."""
    branches = [randn(seed, 2, 5, 8, 8) for seed in (4, 5, 6)]  # in the frame of the image

    def loss(maps: list[Tensor], quarter_turns: int) -> float:
        plain, flipped, rotated = maps
        turned = torch.rot90(rotated, quarter_turns, (2, 3))
        return flac_loss(plain, flipped.flip(3), turned, quarter_turns, 2, average).item()  # type: ignore[arg-type]

    expected = loss(branches, 1)
    for quarter_turns in (1, 2, 3):
        assert loss([motion(maps) for maps in branches], quarter_turns) == pytest.approx(expected, rel=1e-5)
    assert loss([maps[:, CLASS_ORDER] for maps in branches], 1) == pytest.approx(expected, rel=1e-5)


def test_refinement_is_linear_and_its_gradient_is_that_of_finite_differences() -> None:
    images = rand(7, 1, 3, 6, 7)
    probs, weight = rand(8, 1, 2, 6, 7).requires_grad_(), randn(9, 1, 2, 6, 7)
    (REFINEMENT(images, probs) * weight).sum().backward()
    assert probs.grad is not None
    for channel, y, x in product(range(2), (0, 3, 5), (0, 2, 6)):
        bump = torch.zeros_like(probs)
        bump[0, channel, y, x] = 1.0
        slope = ((REFINEMENT(images, probs.detach() + bump) - REFINEMENT(images, probs.detach())) * weight).sum()
        assert probs.grad[0, channel, y, x].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-4)


# --- instances: centers and offsets -----------------------------------------------------------------------------------


def assert_moved(found: InstanceTargets, original: InstanceTargets, motion: Motion) -> None:
    torch.testing.assert_close(found.center_target, motion(original.center_target), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.offset_target, motion.offsets(original.offset_target), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss_weight, motion(original.loss_weight), rtol=1e-4, atol=1e-5)
    assert original.loss_weight.any()


@moved
def test_encoded_instances_move_with_the_image(motion: Motion) -> None:
    ids, labels = scene()
    original = encode_instance_targets(ids, labels, 4, sigma=2)
    assert_moved(encode_instance_targets(motion(ids), labels, 4, sigma=2), original, motion)


def test_encoded_instances_follow_the_order_of_classes_images_and_slots() -> None:
    ids, labels = scene()
    original = encode_instance_targets(ids, labels, 4, sigma=2)
    classes = encode_instance_targets(ids, torch.tensor([0, 1, 3, 2])[labels], 4, sigma=2)
    torch.testing.assert_close(classes.center_target, original.center_target[:, [0, 1, 3, 2]])
    torch.testing.assert_close(classes.offset_target, original.offset_target)
    images = encode_instance_targets(ids[IMAGE_ORDER], labels[IMAGE_ORDER], 4, sigma=2)
    reversed_slots = encode_instance_targets(torch.where(ids > 0, 5 - ids, 0), labels.flip(1), 4, sigma=2)
    for target, shuffled, renumbered in zip(original, images, reversed_slots, strict=True):
        torch.testing.assert_close(shuffled, target[IMAGE_ORDER])
        torch.testing.assert_close(renumbered, target)


def move_points(points: Tensor, motion: Motion) -> Tensor:
    """Move points (P, 2), (y, x) of a square map."""
    for _ in range(motion.turns):
        points = torch.stack((SIDE - 1 - points[:, 1], points[:, 0]), dim=1)
    return torch.stack((points[:, 0], SIDE - 1 - points[:, 1]), dim=1) if motion.mirrored else points


def synthesize(ids: Tensor, labels: Tensor, points: Tensor, tags: Tensor = TAGS) -> InstanceTargets:
    """Make targets of a scene with one peak in its first, third and fourth object, and two in its second."""
    slots = torch.tensor([0, 1, 1, 2, 3])
    image_index = torch.arange(3).repeat_interleave(len(slots))
    peaks = Peaks(image_index, labels[:, slots].flatten(), points, torch.ones(len(points)))
    return synthesize_targets(class_map(ids, labels), peaks, tags, SPLIT, PeakSettings(min_area=3), 1.0, 2.0).targets


PEAKS = torch.tensor([[5, 4], [4, 14], [4, 20], [20, 6], [20, 22]]).repeat(3, 1)


@moved
def test_isolated_instances_move_with_the_image(motion: Motion) -> None:
    ids, labels = scene()
    original = synthesize(ids, labels, PEAKS)
    assert_moved(synthesize(motion(ids), labels, move_points(PEAKS, motion)), original, motion)


def test_isolated_instances_follow_the_order_of_new_classes() -> None:
    ids, labels = scene()
    original = synthesize(ids, labels, PEAKS)
    found = synthesize(ids, torch.tensor([0, 1, 3, 2])[labels], PEAKS, TAGS[:, [0, 1, 3, 2]])
    torch.testing.assert_close(found.center_target, original.center_target.flip(1))
    torch.testing.assert_close(found.offset_target, original.offset_target)
    torch.testing.assert_close(found.loss_weight, original.loss_weight)


@moved
def test_peaks_move_with_the_image(motion: Motion) -> None:
    maps = F.avg_pool2d(rand(10, 3, 2, 16, 16), 3, 1, 1)
    maps = maps / maps.amax((2, 3), keepdim=True)

    def peaks_of(moving: Tensor) -> Peaks:
        settings = PeakSettings(threshold=0.5, max_peaks=100, smoothing=False)
        return find_peaks(moving, TAGS, SPLIT, settings, (SIDE, SIDE), length_scale=0.3)

    def rows(peaks: Peaks, points: Tensor) -> list[list[int]]:
        return sorted(torch.column_stack((peaks.image_index, peaks.labels, points)).tolist())

    original, found = peaks_of(maps), peaks_of(motion(maps))
    assert rows(found, found.points) == rows(original, move_points(original.points, motion))
    assert len(original.points) > 10


def refine(ids: Tensor, labels: Tensor, truth: InstanceTargets, probs: Tensor, tags: Tensor = TAGS) -> InstanceTargets:
    regions = find_regions(class_map(ids, labels), tags, SPLIT, 3)
    settings = RefineSettings(nms_kernel_size=9, sink_radius=1e-3)  # no sinks: truncated centroids are not symmetric
    return refine_targets(truth.center_target, truth.offset_target, probs, regions, SPLIT, settings, 1.0, 2.0)


@moved
def test_refined_instances_move_with_the_image(motion: Motion) -> None:
    ids, labels = scene()
    maps, probs = encode_instance_targets(ids, labels, 4, sigma=2), rand(11, 3, SIDE, SIDE)
    moving = InstanceTargets(motion(maps.center_target), motion.offsets(maps.offset_target), motion(maps.loss_weight))
    original = refine(ids, labels, maps, probs)
    assert_moved(refine(motion(ids), labels, moving, motion(probs)), original, motion)


def test_refined_instances_follow_the_order_of_new_classes() -> None:
    ids, labels = scene()
    maps, probs = encode_instance_targets(ids, labels, 4, sigma=2), rand(11, 3, SIDE, SIDE)
    original = refine(ids, labels, maps, probs)
    exchanged = maps._replace(center_target=maps.center_target[:, [0, 1, 3, 2]])
    found = refine(ids, torch.tensor([0, 1, 3, 2])[labels], exchanged, probs, TAGS[:, [0, 1, 3, 2]])
    torch.testing.assert_close(found.center_target, original.center_target.flip(1))
    torch.testing.assert_close(found.offset_target, original.offset_target)
    torch.testing.assert_close(found.loss_weight, original.loss_weight)
