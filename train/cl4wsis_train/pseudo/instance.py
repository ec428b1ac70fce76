"""Instance pseudo labels of phase 2: peaks of the activation maps that stand alone in a region of their class.

Source: CL4WSIS (ICCV 2023), section 3.3, and BESTIE (CVPR 2022), section 3.2, on which it builds.

Shapes: B batch, C classes with background, n new classes, P peaks, H W the network input (the crop). Lengths of the
settings hold for crops of the recipe's reference size and are multiplied by ``length_scale``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cl4wsis.recipe import PeakSettings
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.data.targets import InstanceTargets, pixel_points, render_center_heatmap, scatter_pixels
from cl4wsis_train.pseudo.regions import (
    Regions,
    find_local_maxima,
    flat_nonzero,
    rank_in_group,
    running_maximum,
    scale_window,
)
from cl4wsis_train.pseudo.semantic import with_background


class SemanticMap(NamedTuple):
    """The frozen Segmenter's answer for a batch, restricted to what the tags allow."""

    semantic_map: Tensor
    """(B, H, W) int64 semantic channel of each pixel, 0 background."""
    new_class_probs: Tensor
    """(B, H, W) float32 softmax probability of the pixel's class on pixels of new classes, 0 elsewhere."""

    def old_pixels(self, split: ClassSplit) -> Tensor:
        """Return the pixels of old classes, (B, 1, H, W) bool."""
        return ((self.semantic_map >= 1) & (self.semantic_map <= split.num_old_classes)).unsqueeze(1)


class Peaks(NamedTuple):
    """Local maxima of the new classes' activation maps, ordered by image, class and falling score."""

    image_index: Tensor
    """(P,) int64."""
    labels: Tensor
    """(P,) int64 class of each peak, from 0 without background."""
    points: Tensor
    """(P, 2) int64, (y, x) in pixels of the crop."""
    scores: Tensor
    """(P,) float32 activation."""


class SynthesizedTargets(NamedTuple):
    """Targets of the isolated instances, with the regions they were found in."""

    targets: InstanceTargets
    """Center target (B, n, H, W) of the new classes alone, offsets (B, 2, H, W), weight (B, 1, H, W): 1 on isolated
    instances."""
    regions: Regions
    """All regions of tagged new classes that are large enough."""
    num_regions: Tensor
    """(B,) int64 regions per image."""
    num_isolated: Tensor
    """(B,) int64 regions taken for one instance, per image."""
    num_peaks: Tensor
    """(B,) int64 peaks per image."""


def semantic_map_from_logits(
    logits: Tensor,
    flipped_logits: Tensor,
    image_labels: Tensor,
    split: ClassSplit,
    size: tuple[int, int],
    all_seen_labels: bool = False,
) -> SemanticMap:
    """Turn the Segmenter's logits into a class map without new classes that the tags do not name.

    Args:
        logits: (B, C, h, w) of the images.
        flipped_logits: (B, C, h, w) of the mirrored images, still mirrored; averaged with the others.
        image_labels: (B, C - 1) 0/1, the visible tags.
        split: the step's classes.
        size: (H, W) of the crop.
        all_seen_labels: the tags name old classes too, so these are restricted as well.

    Returns:
        The map, and the probability of the class on pixels of new classes.
    """
    with torch.no_grad():
        logits = (logits.float() + flipped_logits.float().flip(3)) / 2
        allowed = with_background(image_labels) > 0  # (B, C)
        if not all_seen_labels:
            allowed[:, split.semantic_old] = True
        # One image at a time: C full-size maps are by far the largest tensors of the synthesis.
        images = [
            _classify_pixels(logits[image : image + 1], allowed[image], split.num_old_classes + 1, size)
            for image in range(len(logits))
        ]
        semantic_maps, probs = zip(*images, strict=True)
        return SemanticMap(torch.stack(semantic_maps), torch.stack(probs))


def find_peaks(
    activation: Tensor,
    image_labels: Tensor,
    split: ClassSplit,
    settings: PeakSettings,
    size: tuple[int, int],
    length_scale: float,
) -> Peaks:
    """Find the local maxima of the activation maps of tagged new classes.

    The maps are averaged over 3x3 cells (zeros outside count), resized to the crop, and searched for values that
    nothing in the window exceeds. The strongest ``max_peaks`` of a map stay if they reach the threshold. Where
    neighbouring pixels are equal, as at image borders, the published method reports each as a peak of its own; here one
    of them stays.

    Args:
        activation: (B, n, h, w) in [0, 1], from the peak generator.
        image_labels: (B, C - 1) 0/1, the visible tags.
        split: the step's classes.
        settings: window, threshold, number and smoothing.
        size: (H, W) of the crop.
        length_scale: factor on lengths.

    Returns:
        The peaks of all images.
    """
    with torch.no_grad():
        image_index, classes = (image_labels[:, split.center_new] > 0).nonzero(as_tuple=True)  # (M,) maps to search
        maps = activation[image_index, classes].float().unsqueeze(1)  # (M, 1, h, w)
        if len(maps) and settings.smoothing:
            maps = F.avg_pool2d(maps, 3, stride=1, padding=1)
        if len(maps):
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        window = scale_window(settings.window, length_scale)
        around = F.pad(maps, (window // 2,) * 4, value=-torch.inf)
        is_peak = maps == running_maximum(running_maximum(around, window, 2), window, 3)
        pixels = flat_nonzero(is_peak & (maps >= settings.threshold))
        scores = maps.view(-1).index_select(0, pixels)
        points = pixel_points(pixels, *size)
        which = torch.div(pixels, size[0] * size[1], rounding_mode="floor")
        kept = flat_nonzero(find_local_maxima(points, scores, which, 3))  # one of a plateau
        kept = kept[torch.argsort(scores[kept], descending=True, stable=True)]
        kept = kept[torch.argsort(which[kept], stable=True)]
        kept = kept[rank_in_group(which[kept]) < settings.max_peaks]
        which = which[kept]
        return Peaks(image_index[which], classes[which] + split.num_old_classes, points[kept], scores[kept])


def synthesize_targets(
    semantic_map: Tensor,
    peaks: Peaks,
    image_labels: Tensor,
    split: ClassSplit,
    settings: PeakSettings,
    length_scale: float,
    sigma: float,
) -> SynthesizedTargets:
    """Make targets of the regions that hold exactly one peak of their class, or none where the settings accept that.

    Such a region counts as one instance: its center is its centroid in whole pixels, at which the offsets of all its
    pixels point. Other regions get nothing here.

    Args:
        semantic_map: (B, H, W) integers, semantic channels; old classes are ignored.
        peaks: the peaks of the batch.
        image_labels: (B, C - 1) 0/1, the visible tags; untagged classes are ignored.
        split: the step's classes.
        settings: the smallest area, in square pixels at the reference size.
        length_scale: factor on lengths; areas scale with its square.
        sigma: standard deviation of the Gaussians in pixels of the crop.

    Returns:
        Targets, regions for the refinement, and counts per image.
    """
    with torch.no_grad():
        batch, height, width = semantic_map.shape
        regions = find_regions(semantic_map, image_labels, split, settings.min_area * length_scale**2)
        num_peaks = count_peaks(regions, peaks)
        isolated = (num_peaks == 1) | ((num_peaks == 0) & settings.accept_peakless)
        chosen = isolated.nonzero()[:, 0]
        center_target = render_center_heatmap(
            regions.image_index[chosen],
            regions.centroids[chosen],
            regions.labels[chosen] - split.num_old_classes,
            (batch, split.num_new_classes, height, width),
            sigma,
        )
        inside = flat_nonzero(isolated.index_select(0, regions.pixel_regions))
        pixels = regions.pixels.index_select(0, inside)
        owners = regions.pixel_regions.index_select(0, inside)
        offsets = [
            (center.index_select(0, owners) - own).float()
            for center, own in zip(regions.centroids.unbind(1), regions.axes_of(inside), strict=True)
        ]
        targets = InstanceTargets(
            center_target,
            scatter_pixels(pixels, offsets, batch, height, width),
            scatter_pixels(pixels, [torch.ones_like(offsets[0])], batch, height, width),
        )
        return SynthesizedTargets(
            targets,
            regions,
            num_regions=torch.bincount(regions.image_index, minlength=batch),
            num_isolated=torch.bincount(regions.image_index[chosen], minlength=batch),
            num_peaks=torch.bincount(peaks.image_index, minlength=batch),
        )


def find_regions(semantic_map: Tensor, image_labels: Tensor, split: ClassSplit, min_area: float) -> Regions:
    """Find the 8-connected regions of tagged new classes.

    Args:
        semantic_map: (B, H, W) integers, semantic channels.
        image_labels: (B, C - 1) 0/1, the visible tags.
        split: the step's classes.
        min_area: smaller regions are left out, square pixels of the map.
    """
    channels = F.pad(image_labels > 0, (1, 0))  # (B, C)
    channels[:, split.semantic_old] = False
    batch, num_channels = channels.shape
    values = torch.arange(num_channels, device=semantic_map.device) * channels  # 0 where a class does not count
    rows = torch.arange(batch, device=semantic_map.device)[:, None, None] * num_channels
    new_map = values.to(torch.int32).view(-1).index_select(0, (semantic_map + rows).view(-1))
    return Regions.from_class_map(new_map.view_as(semantic_map), connectivity=8, min_area=min_area)


def count_peaks(regions: Regions, peaks: Peaks) -> Tensor:
    """Count the peaks of its own class in every region, (R,) int64."""
    found = regions.region_ids[peaks.image_index, peaks.points[:, 0], peaks.points[:, 1]].long() - 1
    hits = found >= 0
    hits[hits.clone()] = regions.labels[found[hits]] == peaks.labels[hits]
    return torch.bincount(found[hits], minlength=len(regions))


def _classify_pixels(logits: Tensor, allowed: Tensor, first_new: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return class map and probability of new classes, (H, W) each, of one image's logits (1, C, h, w)."""
    channels = allowed.nonzero()[:, 0]  # (A,)
    # Channels last: both the interpolation and the choice of a class run along the channels of a pixel.
    candidates = logits.index_select(1, channels).contiguous(memory_format=torch.channels_last)
    maps = F.interpolate(candidates, size=size, mode="bilinear", align_corners=False)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, len(channels))  # (H * W, A)
    classes = channels.index_select(0, rows.argmax(1))

    # All channels take part in the softmax, but only its values on new classes are needed.
    pixels = flat_nonzero(classes >= first_new)
    points = (2 * pixel_points(pixels, *size) + 1) / logits.new_tensor(size) - 1  # pixel centers in -1..1
    sampled = F.grid_sample(
        logits, points.flip(1)[None, None], mode="bilinear", padding_mode="border", align_corners=False
    )[0, :, 0]  # (C, P)
    chosen = torch.softmax(sampled, dim=0).gather(0, classes.index_select(0, pixels).unsqueeze(0))
    probs = torch.zeros_like(classes, dtype=torch.float32).scatter_(0, pixels, chosen[0])
    return classes.view(size), probs.view(size)
