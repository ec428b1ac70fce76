"""What bounds a trained step: evaluations in which parts of the network's answer are replaced by the truth.

The network runs once per image. Then its maps are grouped several times, each time with other maps taken from the
ground truth, in pixels of the network input and with the profile ``exact``. A part that gains much by being replaced is
a part that costs much.

``true centers`` stand on the object's own pixel that is nearest to its mean, which is where true offsets point as well.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl4wsis.datasets import EvaluationSample, load_evaluation_set
from cl4wsis.geometry import FitTransform
from cl4wsis.grouping import GroupingSpec
from cl4wsis.instances import Instances
from cl4wsis.metrics import Evaluation, EvaluationReport
from cl4wsis.tasks import Plan
from cl4wsis_train.data.targets import pixel_points, render_center_heatmap, semantic_target_from_ids
from cl4wsis_train.evaluate import restored_groups, run_network, sample_batches
from cl4wsis_train.models.maps import GroupingMaps, grouping_maps
from cl4wsis_train.models.network import InstanceSegmenter

SUBSTITUTIONS: dict[str, frozenset[str]] = {
    "as it is": frozenset(),
    "absent classes ruled out": frozenset({"tags"}),
    "true classes": frozenset({"classes"}),
    "true centers": frozenset({"centers"}),
    "true centers and offsets": frozenset({"centers", "offsets"}),
    "true classes and centers": frozenset({"classes", "centers"}),
    "everything true": frozenset({"classes", "centers", "offsets"}),
}
"""What is taken from the ground truth in each evaluation. The last one shows what resizing and grouping themselves
lose."""

_TRUE_CENTER_WINDOW = 3  # true centers need no suppression of neighbours: each is a maximum of its own


def diagnose_network(
    network: InstanceSegmenter, plan: Plan, step: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, EvaluationReport]:
    """Measure a network with parts of its answer replaced by the truth.

    Args:
        network: after training ``step``, on any device.
        plan: gives images, input size and grouping.
        step: step number.
        progress: called with the number of images done and of all.

    Returns:
        A report for each entry of :data:`SUBSTITUTIONS`.
    """
    samples = load_evaluation_set(plan, step)
    evaluations = {name: Evaluation(plan.split(step)) for name in SUBSTITUTIONS}
    done = 0
    for batch in sample_batches(samples):
        truths = [sample.true_instances() for sample in batch]
        for name, found in substituted_predictions(network, batch, plan).items():
            for truth, (instances, semantic_map) in zip(truths, found, strict=True):
                evaluations[name].add(instances, truth, semantic_map)
        done += len(batch)
        if progress is not None:
            progress(done, len(samples))
    return {name: evaluation.report() for name, evaluation in evaluations.items()}


@torch.inference_mode()
def substituted_predictions(
    network: InstanceSegmenter, samples: Sequence[EvaluationSample], plan: Plan
) -> dict[str, list[tuple[Instances, NDArray[np.int32]]]]:
    """Segment images with each set of substitutions.

    Args:
        network: set to evaluation mode here.
        samples: images with their true instances.
        plan: gives input size, grouping and the width of centers.

    Returns:
        For each entry of :data:`SUBSTITUTIONS` and each image its instances and its class map (h, w; 0 background).
    """
    recipe = plan.recipe
    output, transforms = run_network(network, [sample.image for sample in samples], recipe.input_size)
    maps = grouping_maps(output, recipe.input_size, "exact")
    sigma = recipe.base.instance_loss.center_sigma * recipe.length_scale
    truth = true_maps(samples, transforms, maps.center_heatmap.shape[1], sigma)
    truth = GroupingMaps(*(values.to(maps.semantic_probs.device) for values in truth))
    absent = ~_held_classes(samples, maps.semantic_probs.shape[1]).to(maps.semantic_probs.device)
    exact = recipe.grouping.model_copy(update={"profile": "exact"})
    found = {}
    for name, parts in SUBSTITUTIONS.items():
        probs = truth.semantic_probs if "classes" in parts else maps.semantic_probs
        if "tags" in parts:
            probs = probs.masked_fill(absent[:, :, None, None], 0.0)
        chosen = GroupingMaps(
            probs,
            truth.center_heatmap if "centers" in parts else maps.center_heatmap,
            truth.offset_map if "offsets" in parts else maps.offset_map,
        )
        found[name] = restored_groups(chosen, probs, transforms, _spec_for(exact, parts))
    return found


def true_maps(
    samples: Sequence[EvaluationSample], transforms: Sequence[FitTransform], num_classes: int, sigma: float
) -> GroupingMaps:
    """Draw the maps of a network that knows everything, in pixels of the network input.

    Args:
        samples: B images with their true instances.
        transforms: how each image lies in its frame.
        num_classes: foreground classes.
        sigma: standard deviation of the Gaussians at centers, px.

    Returns:
        One-hot classes (B, C, H, W), centers (B, C - 1, H, W), and offsets (B, 2, H, W) that are 0 outside objects.
    """
    frames = [transform.fit_ids(sample.instance_ids) for sample, transform in zip(samples, transforms, strict=True)]
    instance_ids = torch.from_numpy(np.stack(frames)).long()  # (B, H, W)
    num_slots = max(len(sample.labels) for sample in samples)
    labels = torch.full((len(samples), num_slots), -1)
    for row, sample in zip(labels, samples, strict=True):
        row[: len(sample.labels)] = torch.from_numpy(sample.labels)
    heatmap, offsets = _true_centers(instance_ids, labels, num_classes, sigma)
    return GroupingMaps(semantic_target_from_ids(instance_ids, labels, num_classes), heatmap, offsets)


def _true_centers(instance_ids: Tensor, labels: Tensor, num_classes: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Draw a Gaussian on each object's pixel nearest to its mean, and the offsets of all its pixels to there."""
    batch, height, width = instance_ids.shape
    num_slots = labels.shape[1]
    pixels = instance_ids.view(-1).nonzero()[:, 0]  # (P,)
    image_index = torch.div(pixels, height * width, rounding_mode="floor")
    slots = image_index * num_slots + instance_ids.view(-1)[pixels] - 1
    points = pixel_points(pixels, height, width)  # (P, 2)
    areas = torch.bincount(slots, minlength=batch * num_slots)
    sums = torch.zeros(batch * num_slots, 2, dtype=torch.int64).index_add_(0, slots, points)
    means = sums / areas.clamp(min=1)[:, None].double()
    distances = (points - means[slots]).square().sum(dim=1)
    order = torch.argsort(distances, stable=True)
    order = order[torch.argsort(slots[order], stable=True)]  # by object, the nearest pixel first
    first = areas.cumsum(0) - areas
    shown = areas.nonzero()[:, 0]  # objects that the frame shows
    centers = torch.zeros(batch * num_slots, 2, dtype=torch.int64)
    centers[shown] = points[order[first[shown]]]
    heatmap = render_center_heatmap(
        torch.div(shown, max(num_slots, 1), rounding_mode="floor"),
        centers[shown],
        labels.reshape(-1)[shown],
        (batch, num_classes, height, width),
        sigma,
    )
    offsets = torch.zeros(2, batch * height * width)
    offsets[:, pixels] = (centers[slots] - points).float().T
    return heatmap, offsets.view(2, batch, height, width).transpose(0, 1)


def _held_classes(samples: Sequence[EvaluationSample], num_channels: int) -> Tensor:
    """Tell which semantic channels the images hold, background always: (B, C) bool."""
    held = torch.zeros(len(samples), num_channels, dtype=torch.bool)
    held[:, 0] = True
    for row, sample in zip(held, samples, strict=True):
        row[torch.from_numpy(sample.labels).long() + 1] = True
    return held


def _spec_for(spec: GroupingSpec, parts: frozenset[str]) -> GroupingSpec:
    if "centers" not in parts:
        return spec
    return spec.model_copy(update={"nms_kernel_size": _TRUE_CENTER_WINDOW})
