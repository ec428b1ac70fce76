"""From the network's answer to the maps that grouping reads; one function for evaluation and for the exported graph.

B = batch, C = classes with background, H x W = network input, h x w = the grid on which grouping runs.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from cl4wsis_train.models.network import SegmenterOutput

FAST_STRIDE = 4
"""Network-input pixels per cell of the ``fast`` profile's grid."""

_SMALLEST_SHARE = 1e-3
_SMALLEST_MASS = 1e-12  # where background is so sure that all other probabilities are 0


class GroupingMaps(NamedTuple):
    """What grouping/1 reads, as a batch on one grid, float32."""

    semantic_probs: Tensor
    """(B, C, h, w); channel 0 is background."""
    center_heatmap: Tensor
    """(B, C - 1, h, w), about [0, 1]."""
    offset_map: Tensor
    """(B, 2, h, w), (dy, dx), center minus pixel in network-input pixels."""


def apply_image_prior(semantic_logits: Tensor, exponent: float) -> Tensor:
    """Multiply the probabilities of each pixel by those of the whole image, so that objects keep to one class.

    The share of class c is ``q_c = sum_x p_c(x) / sum_x sum_k p_k(x)`` over all pixels x and classes k but background;
    the result is ``p_c(x) * ((q_c + 0.001) / max_k (q_k + 0.001)) ** exponent``, normalised. Background and the most
    frequent class keep their ratio.

    Args:
        semantic_logits: (B, C, h, w), raw; channel 0 is background.
        exponent: 0 changes nothing, 1 takes the shares as prior probabilities.
    """
    mass = semantic_logits.softmax(dim=1)[:, 1:].mean(dim=(2, 3), keepdim=True) + _SMALLEST_MASS
    share = mass / mass.sum(dim=1, keepdim=True) + _SMALLEST_SHARE
    prior = exponent * (share / share.amax(dim=1, keepdim=True)).log()
    return torch.cat([semantic_logits[:, :1], semantic_logits[:, 1:] + prior], dim=1)


def share_centers(semantic_logits: Tensor, center_heatmap: Tensor) -> Tensor:
    """Give each class its share of the centers of all classes, so that an object's center is found under its class.

    Which class a center belongs to is told less well by the heatmaps than by the class map: where the two disagree, an
    object has no center under its own class. The result is ``p_k(x) / sum_j p_j(x) * (1 - prod_j (1 - h_j(x)))``: the
    share of the class, and that any class has a center there (noisy-or). Values of h below 0 count as 0, those above 1
    as 1; the class probabilities p are enlarged bilinearly, and background is left out.

    Args:
        semantic_logits: (B, C, h, w), raw; channel 0 is background.
        center_heatmap: (B, C - 1, H / 4, W / 4), raw.

    Returns:
        (B, C - 1, H / 4, W / 4), in [0, 1].
    """
    shares = upsample(semantic_logits[:, 1:].softmax(dim=1), (center_heatmap.shape[2], center_heatmap.shape[3]))
    any_center = center_heatmap.relu().clamp(max=1)
    while any_center.shape[1] > 1:  # in pairs: not every runtime has a product over channels, and 1 - x loses digits
        first, second, odd = any_center.tensor_split([any_center.shape[1] // 2, any_center.shape[1] // 2 * 2], dim=1)
        any_center = torch.cat([first + second - first * second, odd], dim=1)
    return shares * any_center


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
        semantic_logits=upsample(output.semantic_logits, grid),
        center_heatmap=_with_flat_rim(upsample(output.center_heatmap, grid), output.center_heatmap),
        offset_map=upsample(output.offset_map, grid),
    )


def grouping_maps(
    output: "SegmenterOutput", input_size: tuple[int, int], profile: Literal["exact", "fast", "paper"]
) -> GroupingMaps:
    """Make what grouping/1 reads of the network's maps: as :func:`maps_on_grid`, then the softmax over classes."""
    logits, center_heatmap, offset_map = maps_on_grid(output, input_size, profile)
    return GroupingMaps(logits.softmax(dim=1), center_heatmap, offset_map)


def _with_flat_rim(maps: Tensor, coarse: Tensor) -> Tensor:
    """Make enlarged maps exactly constant where they are so but for rounding: outside the outermost coarse pixels.

    An object that the image cuts off often has its peak there, and of equal pixels the last one is the center. Runtimes
    that weigh a value with itself disagree in the last digit, and so on the center and the pixels nearest to it.
    """
    height, width = maps.shape[-2:]
    down, right = (height // coarse.shape[-2] - 1) // 2, (width // coarse.shape[-1] - 1) // 2
    if not (down or right):
        return maps
    inner = maps[..., down : height - down, right : width - right]
    return F.pad(inner, (right, right, down, down), mode="replicate")


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly (half-pixel convention) in float32.

    Args:
        maps: (B, C, h, w).
        size: (H, W).

    Returns:
        (B, C, H, W) float32.
    """
    if tuple(maps.shape[2:]) == tuple(size):
        return maps.float()
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)
