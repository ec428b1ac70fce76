"""The exported module: raw images in, instances out, with normalisation and grouping inside.

Legend: B images, H x W network input, h x w the grid of the grouping, C classes with background, K center slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl4wsis.grouping import GroupingSpec
from cl4wsis_export.grouping import GroupingOutput, StaticGrouping, enlarged_class_map
from cl4wsis_train.models.maps import grouping_grid, maps_on_grid
from cl4wsis_train.models.network import InstanceSegmenter, SegmenterOutput

INPUT_NAME = "images"


class FusedOutput(NamedTuple):
    """Outputs of the graph, in order; unused slots are zero."""

    instance_ids: Tensor
    """(B, H, W) uint8; 0 none, ``k + 1`` for slot ``k``."""
    labels: Tensor
    """(B, K) int32, class number from 0."""
    scores: Tensor
    """(B, K) float32."""
    areas: Tensor
    """(B, K) int32, pixels."""
    boxes: Tensor
    """(B, K, 4) float32, xyxy in pixels of the network input."""


class FusedSegmenter(nn.Module):
    """A trained network between normalisation and grouping; used for export alone.

    Args:
        network: in evaluation mode.
        spec: of the grouping.
        input_size: (height, width) of the network input, px.
        rounds: of region labelling.

    Raises:
        ConfigError: the grouping profile cannot be a graph.
    """

    def __init__(
        self, network: InstanceSegmenter, spec: GroupingSpec, input_size: tuple[int, int], rounds: int
    ) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.input_size = input_size
        self.grouping = StaticGrouping(spec, grouping_grid(input_size, spec.profile), rounds)

    def forward(self, images: Tensor) -> FusedOutput:
        """Segment a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB.
        """
        output = self._group(self.network_maps(images))
        return FusedOutput(
            instance_ids=output.instance_ids.to(torch.uint8),  # last of all: TensorRT has uint8 at its borders only
            labels=output.labels.to(torch.int32),
            scores=output.scores,
            areas=output.areas.to(torch.int32),
            boxes=output.boxes,
        )

    def network_maps(self, images: Tensor) -> SegmenterOutput:
        """Return what the network says about (B, H, W, 3) uint8 RGB images, on the grid of the grouping."""
        network_input = self.network.normalize(images.float().permute(0, 3, 1, 2))  # (B, 3, H, W)
        return maps_on_grid(self.network(network_input), self.input_size, self.spec.profile)

    def _group(self, maps: SegmenterOutput) -> GroupingOutput:
        class_map, class_probs, probs = _classify(maps.semantic_logits)
        full_class_map = enlarged_class_map(probs) if self.spec.profile == "fast" else class_map
        return self.grouping.group(class_map, class_probs, full_class_map, maps.center_heatmap, maps.offset_map)


def _classify(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return class map (B, h, w), its probability, and all probabilities (B, C, h, w).

    The softmax is written out because runtimes compute it slowly along channels; where nobody needs all probabilities,
    they drop out of the graph.
    """
    exponentials = (logits - logits.amax(dim=1, keepdim=True)).exp()
    class_probs = 1 / exponentials.sum(dim=1, keepdim=True)  # the largest exponential is 1
    return logits.argmax(dim=1), class_probs.squeeze(1), exponentials * class_probs
