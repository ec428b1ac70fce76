"""Measure a network on a plan's evaluation images, with the preprocessing and grouping that are deployed.

The grouping profile ``paper`` is not deployed. With it the maps are brought to the resolution of each image first, as
the published inference does, and grouped there.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cl4wsis.datasets import EvaluationSample, load_evaluation_set
from cl4wsis.geometry import FitTransform, fit_image, restore_instances
from cl4wsis.grouping import GroupingSpec, group_instances
from cl4wsis.instances import Instances
from cl4wsis.metrics import Evaluation, EvaluationReport
from cl4wsis.preprocess import pad_color
from cl4wsis.recipe import Recipe
from cl4wsis.tasks import Plan
from cl4wsis_train.models.maps import GroupingMaps, grouping_maps
from cl4wsis_train.models.network import InstanceSegmenter, SegmenterOutput

_BATCH_SIZE = 8


def evaluate_network(
    network: InstanceSegmenter, plan: Plan, step: int, progress: Callable[[int, int], None] | None = None
) -> EvaluationReport:
    """Measure a network on all evaluation images; objects of classes it cannot know yet count as background.

    Args:
        network: after training ``step``, on any device.
        plan: gives images, input size and grouping.
        step: step number.
        progress: called with the number of images done and of all.
    """
    samples = load_evaluation_set(plan, step)
    evaluation = Evaluation(plan.split(step))
    for batch in sample_batches(samples):
        answers = predict_batch(network, [sample.image for sample in batch], plan)
        for sample, (instances, semantic_map) in zip(batch, answers, strict=True):
            evaluation.add(instances, sample.true_instances(), semantic_map)
        if progress is not None:
            progress(len(evaluation), len(samples))
    return evaluation.report()


@torch.inference_mode()
def predict_batch(
    network: InstanceSegmenter, images: Sequence[NDArray[np.uint8]], plan: Plan
) -> list[tuple[Instances, NDArray[np.int32]]]:
    """Segment images with the network itself; the exported graph answers the same.

    Args:
        network: in evaluation mode.
        images: (h, w, 3) uint8 RGB each.
        plan: gives input size and grouping.

    Returns:
        For each image its instances and its class map (h, w; 0 background), both in pixels of that image.
    """
    recipe = plan.recipe
    output, transforms = run_network(network, images, recipe.input_size)
    if recipe.grouping.profile == "paper":
        return [_group_in_image(output, index, transform, recipe) for index, transform in enumerate(transforms)]
    exact = grouping_maps(output, recipe.input_size, "exact")
    maps = exact if recipe.grouping.profile == "exact" else grouping_maps(output, recipe.input_size, "fast")
    return restored_groups(maps, exact.semantic_probs, transforms, recipe.grouping)


def run_network(
    network: InstanceSegmenter, images: Sequence[NDArray[np.uint8]], input_size: tuple[int, int]
) -> tuple[SegmenterOutput, list[FitTransform]]:
    """Fit images into the network input and run the network on them.

    Args:
        network: set to evaluation mode here.
        images: (h, w, 3) uint8 RGB each.
        input_size: (height, width) of the network input, px.

    Returns:
        The raw maps of the batch, and how each image lies in its frame.
    """
    network.eval()
    padding = pad_color(network.mean)
    frames, transforms = zip(*(fit_image(image, input_size, padding) for image in images), strict=True)
    device = next(network.parameters()).device
    batch = torch.from_numpy(np.stack(frames)).to(device).permute(0, 3, 1, 2)
    return network(network.normalize(batch)), list(transforms)


def restored_groups(
    maps: GroupingMaps, full_probs: Tensor, transforms: Sequence[FitTransform], spec: GroupingSpec
) -> list[tuple[Instances, NDArray[np.int32]]]:
    """Group the pixels of a batch in the network input and bring the results back to the images.

    Args:
        maps: on the grid of the profile.
        full_probs: (B, C, H, W) class probabilities at network-input resolution.
        transforms: how each image lies in its frame.
        spec: of the grouping.

    Returns:
        For each image its instances and its class map (h, w; 0 background), both in pixels of that image.
    """
    arrays = [values.cpu().numpy() for values in maps]
    classes = full_probs.argmax(dim=1).to(torch.int32).cpu().numpy()
    return [
        (
            restore_instances(group_instances(probs, heatmap, offsets, spec), transform, spec.min_area),
            transform.restore_ids(class_map),
        )
        for probs, heatmap, offsets, class_map, transform in zip(*arrays, classes, transforms, strict=True)
    ]


def _group_in_image(
    output: SegmenterOutput, index: int, transform: FitTransform, recipe: Recipe
) -> tuple[Instances, NDArray[np.int32]]:
    """Group one image of a batch at its own resolution, as published; offsets become pixels of the image."""
    logits, heatmap, offsets = (
        _enlarged_to_image(maps[index : index + 1], transform, recipe.evaluation.align_corners) for maps in output
    )
    if recipe.evaluation.rescale_offsets:
        scale = offsets.new_tensor(transform.scale).view(1, 2, 1, 1)
        offsets = offsets / scale
    probs = logits.softmax(dim=1)
    arrays = [maps[0].cpu().numpy() for maps in (probs, heatmap, offsets)]
    class_map = probs[0].argmax(dim=0).to(torch.int32).cpu().numpy()
    return group_instances(arrays[0], arrays[1], arrays[2], recipe.grouping), class_map


def _enlarged_to_image(maps: Tensor, transform: FitTransform, align_corners: bool) -> Tensor:
    """Bring maps (1, D, h, w) to the network input, cut off the padding, and bring the rest to the image's size."""
    frame = F.interpolate(maps.float(), size=transform.frame_size, mode="bilinear", align_corners=align_corners)
    height, width = transform.content_size
    content = frame[:, :, :height, :width]
    return F.interpolate(content, size=transform.source_size, mode="bilinear", align_corners=False)


def sample_batches(samples: Sequence[EvaluationSample]) -> Iterator[list[EvaluationSample]]:
    """Load samples a batch at a time."""
    for start in range(0, len(samples), _BATCH_SIZE):
        yield [samples[index] for index in range(start, min(start + _BATCH_SIZE, len(samples)))]
