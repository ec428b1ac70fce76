"""The exported module: raw images in, instances out, with normalisation and grouping inside.

Legend: B images, H x W network input, h x w the grid of the grouping, C classes with background, K center slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl4wsis.grouping import GroupingSpec
from cl4wsis_export.grouping import StaticGrouping, enlarged_class_map
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
        self.rounds = rounds
        self.map_grouping = MapGrouping(spec, input_size, rounds)

    @property
    def grouping(self) -> StaticGrouping:
        """The grouping itself."""
        return self.map_grouping.grouping

    def forward(self, images: Tensor) -> FusedOutput:
        """Segment a batch.

        Args:
            images: (B, H, W, 3) uint8 RGB.
        """
        output: FusedOutput = self.map_grouping(*self.network(self.normalize(images)))
        return output

    def normalize(self, images: Tensor) -> Tensor:
        """Turn (B, H, W, 3) uint8 RGB images into the (B, 3, H, W) float32 input of the network."""
        return self.network.normalize(images.float().permute(0, 3, 1, 2))

    def network_maps(self, images: Tensor) -> SegmenterOutput:
        """Return what the network says about (B, H, W, 3) uint8 RGB images, on the grid of the grouping."""
        return maps_on_grid(self.network(self.normalize(images)), self.input_size, self.spec.profile)


class TracedNetwork(nn.Module):
    """The part of the fused module before the grouping, its borders as outputs; used for export alone.

    Args:
        segmenter: in evaluation mode.
    """

    OUTPUT_NAMES = (*MAP_NAMES, NETWORK_INPUT)

    def __init__(self, segmenter: FusedSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the three maps of the network, and its input, for (B, H, W, 3) uint8 RGB images."""
        network_input = self.segmenter.normalize(images)
        return (*self.segmenter.network(network_input), network_input)


class MapGrouping(nn.Module):
    """The part of the fused module behind the network; used for export alone.

    Args:
        spec: of the grouping.
        input_size: (height, width) of the network input, px.
        rounds: of region labelling.

    Raises:
        ConfigError: the grouping profile cannot be a graph.
    """

    def __init__(self, spec: GroupingSpec, input_size: tuple[int, int], rounds: int) -> None:
        super().__init__()
        self.spec = spec
        self.input_size = input_size
        self.grouping = StaticGrouping(spec, grouping_grid(input_size, spec.profile), rounds)

    def forward(self, semantic_logits: Tensor, center_heatmap: Tensor, offset_map: Tensor) -> FusedOutput:
        """Make instances of the network's raw maps, as :class:`SegmenterOutput` describes them."""
        output = SegmenterOutput(semantic_logits, center_heatmap, offset_map)
        logits, center_heatmap, offset_map = maps_on_grid(output, self.input_size, self.spec.profile)
        class_map, class_probs, probs = _classify(logits)
        full_class_map = enlarged_class_map(probs) if self.spec.profile == "fast" else class_map
        instances = self.grouping.group(class_map, class_probs, full_class_map, center_heatmap, offset_map)
        return FusedOutput(
            instance_ids=instances.instance_ids.to(torch.uint8),  # last of all: TensorRT has uint8 at its borders only
            labels=instances.labels.to(torch.int32),
            scores=instances.scores,
            areas=instances.areas.to(torch.int32),
            boxes=instances.boxes,
        )


def _classify(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return class map (B, h, w), its probability, and all probabilities (B, C, h, w).

    The softmax is written out because runtimes compute it slowly along channels; where nobody needs all probabilities,
    they drop out of the graph.
    """
    exponentials = (logits - logits.amax(dim=1, keepdim=True)).exp()
    class_probs = 1 / exponentials.sum(dim=1, keepdim=True)  # the largest exponential is 1
    return logits.argmax(dim=1), class_probs.squeeze(1), exponentials * class_probs
