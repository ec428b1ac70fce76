"""Targets from instance masks: class map, center heatmap, offsets and the pixels on which they count.

Source: CL4WSIS (ICCV 2023), base training; the encoding is that of Panoptic-DeepLab (CVPR 2020), with one center
channel per class.

Shapes: B batch, N instance slots, K centers, H W the network input. Class ``c`` is center channel ``c`` and semantic
channel ``c + 1``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class InstanceTargets(NamedTuple):
    """What the instance branch should answer, and where it is asked."""

    center_target: Tensor
    """(B, num_classes, H, W) float32 in [0, 1]."""
    offset_target: Tensor
    """(B, 2, H, W) float32, (dy, dx), center minus pixel in pixels; 0 outside instances."""
    loss_weight: Tensor
    """(B, 1, H, W) float32; 0 where the targets do not count."""


def encode_instance_targets(instance_ids: Tensor, labels: Tensor, num_classes: int, sigma: float) -> InstanceTargets:
    """Encode instance masks as center heatmap, offsets and weight.

    An instance's center is the mean of its pixels. The offsets point at that float mean; the Gaussian stands on the
    mean truncated to whole pixels. The weight is 1 on instances. Slots that the map does not show are left out, and so
    are pixels whose slot is padding.

    Args:
        instance_ids: (B, H, W) or (H, W) integers; ``i + 1`` is slot ``i``, 0 is none.
        labels: (B, N) or (N,) class of each slot; -1 is padding.
        num_classes: number of foreground classes.
        sigma: standard deviation of the Gaussians in pixels.

    Returns:
        Targets with the batch dimension of the input: without one for a single map.

    Raises:
        ValueError: the shapes do not fit together, or an id or a label is out of range.

    Source: CL4WSIS (ICCV 2023), supplement; Panoptic-DeepLab (CVPR 2020), section 3.2.
    """
    if instance_ids.ndim == 2 and labels.ndim == 1:
        batched = encode_instance_targets(instance_ids[None], labels[None], num_classes, sigma)
        return InstanceTargets(*(target[0] for target in batched))
    _check_ids(instance_ids, labels, num_classes)
    batch, height, width = instance_ids.shape
    num_slots = labels.shape[1]
    pixels, slots = _instance_pixels(instance_ids, labels)  # (P,), (P,)
    points = pixel_points(pixels, height, width)  # (P, 2)
    areas = torch.bincount(slots, minlength=batch * num_slots)  # (B * N,)
    sums = torch.zeros(batch * num_slots, 2, dtype=torch.int64, device=instance_ids.device).index_add_(0, slots, points)
    means = sums / areas.clamp(min=1)[:, None].double()  # (B * N, 2)

    shown = areas.nonzero()[:, 0]  # (K,)
    center_target = render_center_heatmap(
        shown // max(num_slots, 1),
        means[shown].long(),
        labels.reshape(-1)[shown].long(),
        (batch, num_classes, height, width),
        sigma,
    )
    offsets = [
        (mean.index_select(0, slots) - own).float() for mean, own in zip(means.unbind(1), points.unbind(1), strict=True)
    ]
    offset_target = scatter_pixels(pixels, offsets, batch, height, width)
    loss_weight = scatter_pixels(pixels, [torch.ones_like(offsets[0])], batch, height, width)
    return InstanceTargets(center_target, offset_target, loss_weight)


def render_center_heatmap(
    image_index: Tensor, centers: Tensor, labels: Tensor, shape: tuple[int, int, int, int], sigma: float
) -> Tensor:
    """Draw a Gaussian at every center, in the channel of its class; where several overlap, the largest value stays.

    The Gaussian is cut to the square of ``2 r + 1`` pixels with ``r = ceil(3 sigma) + 1``, which for whole sigmas is
    the published window of ``6 sigma + 3``.

    Args:
        image_index: (K,) image of each center in the batch.
        centers: (K, 2) whole pixels, (y, x).
        labels: (K,) channel of each center.
        shape: (B, num_classes, H, W) of the result.
        sigma: standard deviation in pixels.

    Returns:
        (B, num_classes, H, W) float32 with exp(-d^2 / (2 sigma^2)) around the centers and 0 elsewhere.
    """
    _, num_channels, height, width = shape
    heatmap = torch.zeros(shape, dtype=torch.float32, device=centers.device)
    if len(centers) == 0:
        return heatmap
    radius = math.ceil(3 * sigma) + 1
    steps = torch.arange(-radius, radius + 1, device=centers.device)
    gaussian = torch.exp((steps[:, None] ** 2 + steps[None, :] ** 2) / (-2.0 * sigma**2))  # (win, win)
    rows, columns = centers[:, :1] + steps, centers[:, 1:] + steps  # (K, win) each
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    plane = (image_index * num_channels + labels)[:, None] * height
    positions = ((plane + rows) * width)[:, :, None] + columns[:, None, :]  # (K, win, win)
    values = gaussian.float().expand_as(positions)
    heatmap.view(-1).scatter_reduce_(0, positions[inside], values[inside], "amax")
    return heatmap


def semantic_map_from_ids(instance_ids: Tensor, labels: Tensor) -> Tensor:
    """Turn instance ids into a class map.

    Args:
        instance_ids: (B, H, W) or (H, W) integers; ``i + 1`` is slot ``i``, 0 is none.
        labels: (B, N) or (N,) class of each slot; -1 is padding and becomes background.

    Returns:
        (B, H, W) or (H, W) int64 semantic channels: 0 background, class ``c`` as ``c + 1``.
    """
    if instance_ids.ndim == 2:
        return semantic_map_from_ids(instance_ids[None], labels[None])[0]
    channels = F.pad(labels.long() + 1, (1, 0))  # (B, 1 + N), background first
    return channels.gather(1, instance_ids.long().flatten(1)).view_as(instance_ids)


def semantic_target_from_ids(instance_ids: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Turn instance ids into a one-hot semantic target.

    Args:
        instance_ids: (B, H, W) or (H, W) integers; ``i + 1`` is slot ``i``, 0 is none.
        labels: (B, N) or (N,) class of each slot; -1 is padding and becomes background.
        num_classes: number of foreground classes.

    Returns:
        (B, num_classes + 1, H, W) float32, or without B for a single map; channel 0 is background.
    """
    semantic_map = semantic_map_from_ids(instance_ids, labels).unsqueeze(-3)  # (..., 1, H, W)
    shape = (*semantic_map.shape[:-3], num_classes + 1, *semantic_map.shape[-2:])
    return torch.zeros(shape, device=semantic_map.device).scatter_(-3, semantic_map, 1.0)


def pixel_points(pixels: Tensor, height: int, width: int) -> Tensor:
    """Split flat pixel numbers of a batch, ``(b * H + y) * W + x``, into points.

    Returns:
        (P, 2) int64, (y, x).
    """
    rows = torch.div(pixels, width, rounding_mode="floor")
    return torch.stack((rows % height, pixels - rows * width), dim=1)


def scatter_pixels(pixels: Tensor, channels: Sequence[Tensor], batch: int, height: int, width: int) -> Tensor:
    """Write values at flat pixel numbers into maps that are 0 elsewhere.

    Args:
        pixels: (P,) distinct numbers ``(b * H + y) * W + x``.
        channels: D times (P,), the values of each channel, of one type.
        batch: B.
        height: H.
        width: W.

    Returns:
        (B, D, H, W) of the values' type.
    """
    area, depth = height * width, len(channels)
    maps = channels[0].new_zeros(batch * depth * area)
    if depth > 1 and batch > 1:  # position in channel 0
        pixels = pixels + torch.div(pixels, area, rounding_mode="floor") * (area * (depth - 1))
    for channel, values in enumerate(channels):
        maps.narrow(0, channel * area, len(maps) - channel * area).scatter_(0, pixels, values)
    return maps.view(batch, depth, height, width)


def _instance_pixels(instance_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat numbers of all instance pixels, (P,), and their slots ``b * N + i``, (P,)."""
    batch, num_slots = labels.shape
    pixels = instance_ids.reshape(-1).nonzero()[:, 0]
    image_index = torch.div(pixels, instance_ids[0].numel(), rounding_mode="floor")
    slots = image_index * num_slots + instance_ids.reshape(-1).index_select(0, pixels).long() - 1
    if bool((labels < 0).any()) and batch * num_slots:
        known = labels.reshape(-1).index_select(0, slots) >= 0
        pixels, slots = pixels[known], slots[known]
    return pixels, slots


def _check_ids(instance_ids: Tensor, labels: Tensor, num_classes: int) -> None:
    if instance_ids.ndim != 3 or labels.ndim != 2 or len(instance_ids) != len(labels):
        raise ValueError(
            f"instance_ids and labels must be (B, H, W) and (B, N), or (H, W) and (N,); "
            f"got {tuple(instance_ids.shape)} and {tuple(labels.shape)}"
        )
    if instance_ids.numel() and int(instance_ids.max()) > labels.shape[1]:
        raise ValueError(f"instance_ids go up to {int(instance_ids.max())}, but labels has {labels.shape[1]} slots")
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}, or be -1 for padding; "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
