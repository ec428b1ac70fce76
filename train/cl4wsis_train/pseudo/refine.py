"""Self-refinement of phase 2: the instance branch's own maps split the regions that peaks alone do not settle.

Source: CL4WSIS (ICCV 2023), section 3.3, and BESTIE (CVPR 2022), section 3.3. Seeds are maxima of the center heatmap,
supplemented by offset sinks, small spots at which offsets vanish.

Shapes: B batch, n new classes, R regions, P region pixels, K seeds, H W the network input (the crop).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl4wsis.recipe import RefineSettings
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.data.targets import InstanceTargets, render_center_heatmap, scatter_pixels
from cl4wsis_train.pseudo.regions import Regions, find_local_maxima, flat_nonzero, scale_window


class Seeds(NamedTuple):
    """Points from which the instances of a region grow; those of one region stand together."""

    points: Tensor
    """(K, 2) int64, (y, x)."""
    regions: Tensor
    """(K,) int64, ascending."""


def refine_targets(
    center_heatmap: Tensor,
    offset_map: Tensor,
    class_probs: Tensor,
    regions: Regions,
    split: ClassSplit,
    settings: RefineSettings,
    length_scale: float,
    sigma: float,
) -> InstanceTargets:
    """Make targets of the instances that the network's own centers and offsets show in each region.

    Every pixel of a region joins the seed nearest to where its offset points. Regions without a seed, or with more than
    ``max_instances`` instances, get nothing. An instance's center is where the heatmap is largest in it, with value q;
    if q is below the threshold, it is the region's centroid. The weight of its pixels is the mean class probability,
    times q in the first case.

    Args:
        center_heatmap: (B, C - 1, H, W), at the size of the crop, detached.
        offset_map: (B, 2, H, W), (dy, dx) in pixels, detached.
        class_probs: (B, H, W) probability of the pixel's own class, or (B, C, H, W) of all semantic channels.
        regions: the regions of new classes in the batch.
        split: the step's classes.
        settings: thresholds and windows.
        length_scale: factor on lengths; the sinks are measured in pixels as they stand.
        sigma: standard deviation of the Gaussians in pixels of the crop.

    Returns:
        Center target (B, n, H, W) of the new classes alone, offsets (B, 2, H, W), weight (B, 1, H, W) in [0, 1].
    """
    with torch.no_grad():
        batch, _, height, width = center_heatmap.shape
        channels = regions.labels.index_select(0, regions.pixel_regions)
        values = _values_at(center_heatmap, regions, channels).float()  # (P,)
        offsets = [_values_at(offset_map, regions, channel).float() for channel in (0, 1)]  # (P,) each
        if class_probs.ndim == 4:
            probs = _values_at(class_probs, regions, channels + 1).float()
        else:
            probs = class_probs.reshape(-1).index_select(0, regions.pixels).float()

        maxima = _find_center_seeds(values, regions, settings, length_scale)
        sinks = _find_sink_seeds(values, offsets, maxima, regions, settings, length_scale)
        if len(sinks.points):
            values = values.index_fill(0, _pixel_positions(sinks, regions), 1.0)
        seeds = _join(maxima, sinks)

        grouped, instance = _group_pixels(seeds, offsets, regions)  # (G,) positions in the pixel list, their seeds
        grouped, instance = _drop_crowded(grouped, instance, seeds, settings.max_instances)
        centers, confidence = _score_instances(grouped, instance, values, probs, seeds, regions, settings)

        shown = torch.bincount(instance, minlength=len(seeds.points)).nonzero()[:, 0]
        seed_regions = seeds.regions[shown]
        center_target = render_center_heatmap(
            regions.image_index[seed_regions],
            centers[shown],
            regions.labels[seed_regions] - split.num_old_classes,
            (batch, split.num_new_classes, height, width),
            sigma,
        )
        pixels = regions.pixels.index_select(0, grouped)
        to_center = [
            (center.index_select(0, instance) - own).float()
            for center, own in zip(centers.unbind(1), regions.axes_of(grouped), strict=True)
        ]
        return InstanceTargets(
            center_target,
            scatter_pixels(pixels, to_center, batch, height, width),
            scatter_pixels(pixels, [confidence.index_select(0, instance)], batch, height, width),
        )


def merge_targets(isolated: InstanceTargets, refined: InstanceTargets) -> InstanceTargets:
    """Keep the targets of isolated instances on their pixels and take the refined ones elsewhere.

    Old classes need no merging: they have pixels, and a loss, of their own.

    Args:
        isolated: targets with weight 0 or 1, from :func:`cl4wsis_train.pseudo.instance.synthesize_targets`.
        refined: targets from :func:`refine_targets`.

    Returns:
        Targets with the larger of both weights.
    """
    certain = isolated.loss_weight
    return InstanceTargets(
        torch.lerp(refined.center_target, isolated.center_target, certain),
        torch.lerp(refined.offset_target, isolated.offset_target, certain),
        torch.maximum(isolated.loss_weight, refined.loss_weight),
    )


def _values_at(maps: Tensor, regions: Regions, channels: Tensor | int) -> Tensor:
    """Read maps (B, D, H, W) at the region pixels, each in its channel, (P,)."""
    area = maps.shape[2] * maps.shape[3]
    first = (regions.image_index * ((maps.shape[1] - 1) * area)).index_select(0, regions.pixel_regions)
    return maps.reshape(-1).index_select(0, regions.pixels + first + channels * area)


def _pixel_positions(seeds: Seeds, regions: Regions) -> Tensor:
    """Return where the seeds stand in the pixel list, (K,)."""
    _, height, width = regions.region_ids.shape
    rows = regions.image_index[seeds.regions] * height + seeds.points[:, 0]
    return torch.searchsorted(regions.pixels, rows * width + seeds.points[:, 1])


def _find_center_seeds(values: Tensor, regions: Regions, settings: RefineSettings, length_scale: float) -> Seeds:
    """Find the maxima of the heatmap above the threshold, counting only pixels of the same region."""
    hot = flat_nonzero(values > settings.center_threshold)
    window = scale_window(settings.nms_kernel_size, length_scale)
    maxima = hot[find_local_maxima(regions.points[hot], values[hot], regions.pixel_regions[hot], window)]
    return Seeds(regions.points[maxima], regions.pixel_regions[maxima])


def _find_sink_seeds(
    values: Tensor,
    offsets: Sequence[Tensor],
    maxima: Seeds,
    regions: Regions,
    settings: RefineSettings,
    length_scale: float,
) -> Seeds:
    """Find the offset sinks that add to the heatmap's maxima.

    A sink is a 4-connected spot of about ``sink_area`` pixels of a region with short offsets. It counts where its
    centroid has a center value above the threshold, and in regions with maxima only if it is far from all of them.
    """
    short = flat_nonzero(offsets[0].square() + offsets[1].square() < settings.sink_radius**2)
    spot_map = torch.zeros_like(regions.region_ids)
    spot_map.view(-1)[regions.pixels[short]] = regions.labels[regions.pixel_regions[short]].to(torch.int32) + 1
    spots = Regions.from_class_map(spot_map, connectivity=4, min_area=settings.sink_area - settings.sink_area_tolerance)
    # Regions of one class do not touch, so every pixel of a spot is in the same region.
    owners = torch.zeros_like(spots.labels)
    owners[spots.pixel_regions] = regions.region_ids.view(-1)[spots.pixels].long() - 1

    rows, columns = spots.centroids.unbind(1)
    fits = (spots.areas - settings.sink_area).abs() < settings.sink_area_tolerance
    fits &= regions.region_ids[spots.image_index, rows, columns].long() - 1 == owners
    sinks = Seeds(spots.centroids[fits], owners[fits])
    bright = values[_pixel_positions(sinks, regions)] > settings.sink_center_threshold
    sinks = Seeds(sinks.points[bright], sinks.regions[bright])

    steps = (sinks.points[:, None] - maxima.points).double()
    apart = steps.square().sum(2) > (settings.sink_distance * length_scale) ** 2
    apart |= sinks.regions[:, None] != maxima.regions
    far = apart.all(1)
    return Seeds(sinks.points[far], sinks.regions[far])


def _join(maxima: Seeds, sinks: Seeds) -> Seeds:
    """List the seeds region by region, maxima first."""
    seeds = Seeds(torch.cat((maxima.points, sinks.points)), torch.cat((maxima.regions, sinks.regions)))
    order = torch.argsort(seeds.regions, stable=True)
    return Seeds(seeds.points[order], seeds.regions[order])


def _group_pixels(seeds: Seeds, offsets: Sequence[Tensor], regions: Regions) -> tuple[Tensor, Tensor]:
    """Assign the pixels of regions with seeds; the first seed wins a tie.

    Returns:
        (G,) positions of those pixels in the pixel list, ascending, and (G,) their seeds.
    """
    counts = torch.bincount(seeds.regions, minlength=len(regions))  # (R,)
    first_seed = counts.cumsum(0) - counts
    grouped = flat_nonzero((counts > 0).index_select(0, regions.pixel_regions))  # (G,)
    owners = regions.pixel_regions.index_select(0, grouped)
    instance = first_seed.index_select(0, owners)

    # Only regions with several seeds ask for distances: theirs are compared one seed at a time.
    contested = flat_nonzero((counts > 1).index_select(0, owners))
    owners = owners.index_select(0, contested)
    positions = grouped.index_select(0, contested)
    rows, columns = (
        own + offset.index_select(0, positions) for own, offset in zip(regions.axes_of(positions), offsets, strict=True)
    )
    nearest = torch.full_like(rows, torch.inf)
    choice = torch.zeros_like(owners)
    for slot, points in enumerate(_pad_seeds(seeds, counts, first_seed).unbind(1)):
        seed_rows, seed_columns = (axis.index_select(0, owners) for axis in points.unbind(1))
        distances = (rows - seed_rows).square() + (columns - seed_columns).square()
        choice.masked_fill_(distances < nearest, slot)
        nearest = torch.minimum(nearest, distances)
    return grouped, instance.index_add(0, contested, choice)


def _pad_seeds(seeds: Seeds, counts: Tensor, first_seed: Tensor) -> Tensor:
    """Return the seeds of every region in equal numbers, (R, S, 2) float32, filled up with infinity."""
    num_slots = int(counts.max()) if len(counts) else 0
    table = torch.full((len(counts), num_slots, 2), torch.inf, device=counts.device)
    slots = torch.arange(len(seeds.regions), device=counts.device) - first_seed[seeds.regions]
    table[seeds.regions, slots] = seeds.points.float()
    return table


def _drop_crowded(grouped: Tensor, instance: Tensor, seeds: Seeds, max_instances: int) -> tuple[Tensor, Tensor]:
    """Leave out the pixels of regions that fall into too many instances; seeds without pixels do not count."""
    filled = torch.bincount(instance, minlength=len(seeds.points)) > 0
    num_regions = int(seeds.regions[-1]) + 1 if len(seeds.regions) else 0
    crowded = torch.bincount(seeds.regions[filled], minlength=num_regions) > max_instances
    if not bool(crowded.any()):
        return grouped, instance
    kept = (~crowded[seeds.regions]).index_select(0, instance).nonzero()[:, 0]
    return grouped.index_select(0, kept), instance.index_select(0, kept)


def _score_instances(
    grouped: Tensor,
    instance: Tensor,
    values: Tensor,
    probs: Tensor,
    seeds: Seeds,
    regions: Regions,
    settings: RefineSettings,
) -> tuple[Tensor, Tensor]:
    """Return the center, (K, 2), and the confidence, (K,), of the instance of every seed."""
    num_seeds = len(seeds.points)
    areas = torch.bincount(instance, minlength=num_seeds)
    mean_probs = probs.new_zeros(num_seeds).index_add_(0, instance, probs.index_select(0, grouped)) / areas.clamp(min=1)
    inside = values.index_select(0, grouped)
    peaks = inside.new_zeros(num_seeds).scatter_reduce_(0, instance, inside, "amax", include_self=False)
    # The first pixel that holds the maximum.
    highest = flat_nonzero(inside == peaks.index_select(0, instance))
    positions = torch.zeros_like(areas)
    positions.scatter_reduce_(0, instance[highest], grouped[highest], "amin", include_self=False)
    weak = peaks < settings.center_threshold
    centers = torch.where(weak[:, None], regions.centroids[seeds.regions], regions.points[positions])
    confidence = torch.where(weak, mean_probs, peaks * mean_probs).clamp(0, 1)
    return centers, confidence
