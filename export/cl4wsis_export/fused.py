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
NETWORK_INPUT = "network_input"
"""Value of the graph at which the network begins: (B, 3, H, W) float32, normalised."""
MAP_NAMES = SegmenterOutput._fields
"""Values of the graph at which the network ends."""


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
        return self.group(self.network(self.normalize(images)))

    def normalize(self, images: Tensor) -> Tensor:
        """Turn (B, H, W, 3) uint8 RGB images into the (B, 3, H, W) float32 input of the network."""
        return self.network.normalize(images.float().permute(0, 3, 1, 2))

    def network_maps(self, images: Tensor) -> SegmenterOutput:
        """Return what the network says about (B, H, W, 3) uint8 RGB images, on the grid of the grouping."""
        return maps_on_grid(self.network(self.normalize(images)), self.input_size, self.spec.profile)

    def group(self, output: SegmenterOutput) -> FusedOutput:
        """Make instances of the network's raw maps."""
        instances = self._group(maps_on_grid(output, self.input_size, self.spec.profile))
        return FusedOutput(
            instance_ids=instances.instance_ids.to(torch.uint8),  # last of all: TensorRT has uint8 at its borders only
            labels=instances.labels.to(torch.int32),
            scores=instances.scores,
            areas=instances.areas.to(torch.int32),
            boxes=instances.boxes,
        )

    def _group(self, maps: SegmenterOutput) -> GroupingOutput:
        class_map, class_probs, probs = _classify(maps.semantic_logits)
        full_class_map = enlarged_class_map(probs) if self.spec.profile == "fast" else class_map
        return self.grouping.group(class_map, class_probs, full_class_map, maps.center_heatmap, maps.offset_map)


class TracedSegmenter(nn.Module):
    """The fused module with the borders of its network as further outputs, so that the graph can be cut there.

    Args:
        segmenter: in evaluation mode.
    """

    OUTPUT_NAMES = (*FusedOutput._fields, NETWORK_INPUT, *MAP_NAMES)

    def __init__(self, segmenter: FusedSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the instances, the network's input and its three maps for (B, H, W, 3) uint8 RGB images."""
        network_input = self.segmenter.normalize(images)
        output = self.segmenter.network(network_input)
        return (*self.segmenter.group(output), network_input, *output)


def _classify(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return class map (B, h, w), its probability, and all probabilities (B, C, h, w).

    The softmax is written out because runtimes compute it slowly along channels; where nobody needs all probabilities,
    they drop out of the graph.
    """
    exponentials = (logits - logits.amax(dim=1, keepdim=True)).exp()
    class_probs = 1 / exponentials.sum(dim=1, keepdim=True)  # the largest exponential is 1
    return logits.argmax(dim=1), class_probs.squeeze(1), exponentials * class_probs
