"""Measure a network on a plan's evaluation images, with the preprocessing and grouping that are deployed."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cl4wsis.datasets import EvaluationSample, load_evaluation_set
from cl4wsis.geometry import FitTransform, fit_image, restore_instances
from cl4wsis.grouping import GroupingSpec, group_instances
from cl4wsis.instances import Instances
from cl4wsis.metrics import EvaluationReport, evaluate_predictions
from cl4wsis.tasks import Plan
from cl4wsis_train.models.maps import grouping_maps
from cl4wsis_train.models.network import InstanceSegmenter

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
    predictions: list[Instances] = []
    semantic_maps: list[NDArray[np.int32]] = []
    ground_truths: list[Instances] = []
    for batch in _batches(samples):
        for instances, semantic_map in predict_batch(network, [s.image for s in batch], plan):
            predictions.append(instances)
            semantic_maps.append(semantic_map)
        ground_truths += [
            Instances.from_ids(sample.instance_ids, sample.labels, np.ones(len(sample.labels), np.float32))
            for sample in batch
        ]
        if progress is not None:
            progress(len(predictions), len(samples))
    return evaluate_predictions(predictions, ground_truths, plan.split(step), semantic_maps=semantic_maps)


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
    network.eval()
    recipe = plan.recipe
    padding = [round(value) for value in network.mean]
    fitted = [fit_image(image, recipe.input_size, padding) for image in images]
    device = next(network.parameters()).device
    frames = torch.from_numpy(np.stack([frame for frame, _ in fitted])).to(device).permute(0, 3, 1, 2)
    output = network(network.normalize(frames))
    maps = [m.cpu().numpy() for m in grouping_maps(output, recipe.input_size, recipe.grouping.profile)]
    exact = grouping_maps(output, recipe.input_size, "exact").semantic_probs
    classes = exact.argmax(dim=1).to(torch.int32).cpu().numpy()
    return [
        _restored(probs, heatmap, offsets, class_map, transform, recipe.grouping)
        for probs, heatmap, offsets, class_map, (_, transform) in zip(*maps, classes, fitted, strict=True)
    ]


def _restored(
    semantic_probs: NDArray[np.float32],
    center_heatmap: NDArray[np.float32],
    offset_map: NDArray[np.float32],
    class_map: NDArray[np.int32],
    transform: FitTransform,
    spec: GroupingSpec,
) -> tuple[Instances, NDArray[np.int32]]:
    instances = group_instances(semantic_probs, center_heatmap, offset_map, spec)
    return restore_instances(instances, transform), transform.restore_ids(class_map)


def _batches(samples: Sequence[EvaluationSample]) -> Iterator[list[EvaluationSample]]:
    """Load samples a batch at a time."""
    for start in range(0, len(samples), _BATCH_SIZE):
        yield [samples[index] for index in range(start, min(start + _BATCH_SIZE, len(samples)))]
