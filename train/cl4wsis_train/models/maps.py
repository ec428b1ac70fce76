"""From the network's answer to the maps that grouping reads; one function for evaluation and for the exported graph.

B = batch, C = classes with background, H x W = network input, h x w = the grid on which grouping runs.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from cl4wsis_train.models.network import SegmenterOutput

FAST_STRIDE = 4
"""Network-input pixels per cell of the ``fast`` profile's grid."""


class GroupingMaps(NamedTuple):
    """What grouping/1 reads, as a batch on one grid, float32."""

    semantic_probs: Tensor
    """(B, C, h, w); channel 0 is background."""
    center_heatmap: Tensor
    """(B, C - 1, h, w), about [0, 1]."""
    offset_map: Tensor
    """(B, 2, h, w), (dy, dx), center minus pixel in network-input pixels."""


def grouping_grid(input_size: tuple[int, int], profile: Literal["exact", "fast", "paper"]) -> tuple[int, int]:
    """Return (h, w) of the grid on which a grouping profile runs, for a network input of (height, width)."""
    if profile == "fast":
        return input_size[0] // FAST_STRIDE, input_size[1] // FAST_STRIDE
    return input_size


def maps_on_grid(
    output: "SegmenterOutput", input_size: tuple[int, int], profile: Literal["exact", "fast", "paper"]
) -> "SegmenterOutput":
    """Bring the network's maps to the grid of a grouping profile, bilinearly (half-pixel convention).

    Args:
        output: of the network, for a batch.
        input_size: (height, width) of the network input, px.
        profile: ``fast`` groups at stride 4, the others at network-input resolution.

    Returns:
        The same maps, still raw, as float32 whatever the network's precision.
    """
    grid = grouping_grid(input_size, profile)
    return output._replace(
        semantic_logits=_resized(output.semantic_logits, grid),
        center_heatmap=_resized(output.center_heatmap, grid),
        offset_map=_resized(output.offset_map, grid),
    )


def grouping_maps(
    output: "SegmenterOutput", input_size: tuple[int, int], profile: Literal["exact", "fast", "paper"]
) -> GroupingMaps:
    """Make what grouping/1 reads of the network's maps: as :func:`maps_on_grid`, then the softmax over classes."""
    logits, center_heatmap, offset_map = maps_on_grid(output, input_size, profile)
    return GroupingMaps(logits.softmax(dim=1), center_heatmap, offset_map)


def _resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    maps = maps.float()
    if tuple(maps.shape[-2:]) == grid:
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)  # (B, ?, h, w)
