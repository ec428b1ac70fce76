import numpy as np
import pytest
import torch
from cases import connected_parts

from cl4wsis.recipe import RefineSettings
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.data.targets import InstanceTargets, encode_instance_targets
from cl4wsis_train.pseudo.instance import find_regions
from cl4wsis_train.pseudo.refine import merge_targets, refine_targets

SPLIT = ClassSplit(step=1, old_names=("a", "b"), new_names=("c", "d"))  # channels: 0 | 1 2 | 3 4
BOTH = torch.tensor([[0.0, 0, 1, 1]])


def find_seeds_slowly(center, part, offsets, window, far):
    """Seeds of one region by the text, and the center map with 1 at accepted sinks; ``center`` is 0 outside it."""
    radius = window // 2
    inside = np.zeros(center.shape, dtype=bool)
    inside[tuple(np.transpose(part))] = True
    hot = np.where(inside & (center > 0.3), center, 0)
    maxima = []
    for y, x in part:
        near = hot[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1]
        if hot[y, x] > 0 and hot[y, x] == near.max():
            maxima.append((y, x))
    sinks = []
    for spot in connected_parts(inside & (np.hypot(*offsets) < 2.5), 4):
        y, x = np.mean(spot, axis=0).astype(int)
        if 18 < len(spot) < 24 and center[y, x] > 0.05 and all(np.hypot(y - a, x - b) > far for a, b in maxima):
            sinks.append((int(y), int(x)))
    modified = center.copy()
    for point in sinks:
        modified[point] = 1.0
    return maxima + sinks, modified


def refine_slowly(heatmap, offsets, probs, maps, image_labels, window, far, min_area, sigma, max_instances=5):
    """One image, region by region, by the text."""
    side = maps.shape[0]
    grid = np.mgrid[:side, :side]
    center_target, offset_target, weight = np.zeros((2, side, side)), np.zeros((2, side, side)), np.zeros((side, side))
    for label in (2, 3):
        if not image_labels[label]:
            continue
        for part in connected_parts(maps == label + 1, 8):
            if len(part) < min_area:
                continue
            mask = np.zeros(maps.shape, dtype=bool)
            mask[tuple(np.transpose(part))] = True
            seeds, center = find_seeds_slowly(heatmap[label] * mask, part, offsets, window, far)
            if not seeds:
                continue
            groups = {}
            for y, x in part:
                target = np.array([y, x]) + offsets[:, y, x]
                nearest = int(np.argmin([((target - seed) ** 2).sum() for seed in seeds]))
                groups.setdefault(nearest, []).append((y, x))
            if len(groups) > max_instances:
                continue
            for pixels in groups.values():
                index = tuple(np.transpose(pixels))
                s, q = probs[index].mean(), center[index].max()
                if q < 0.3:
                    point, confidence = np.mean(part, axis=0).astype(int), s
                else:
                    point, confidence = np.array(pixels[int(np.argmax(center[index]))]), q * s
                for y, x in pixels:
                    offset_target[:, y, x] = point - (y, x)
                    weight[y, x] = np.clip(confidence, 0, 1)
                distance = grid - point[:, None, None]
                gaussian = np.exp(-(distance**2).sum(0) / (2 * sigma**2)) * (abs(distance).max(0) <= 3 * sigma + 1)
                center_target[label - 2] = np.maximum(center_target[label - 2], gaussian)
    return center_target, offset_target, weight[None]


def random_batch(seed, batch=2, side=48):
    """Blocky class maps with smooth heatmaps, offsets with sinks, and noise."""
    rng = np.random.default_rng(seed)
    maps = rng.choice(5, (batch, 4, 4), p=[0.3, 0.05, 0.05, 0.35, 0.25]).repeat(side // 4, 1).repeat(side // 4, 2)
    image_labels = np.tile([0.0, 0, 1, 1], (batch, 1))
    image_labels[-1, 3] = 0
    heatmap = np.zeros((batch, 4, side, side))
    offsets = rng.normal(0, 4, (batch, 2, side, side))
    grid = np.mgrid[:side, :side]
    for image in range(batch):
        for _ in range(8 + 6 * seed):
            point = rng.integers(2, side - 2, 2)
            distance = grid - point[:, None, None]
            bump = rng.choice([0.15, rng.uniform(0.3, 1.1)]) * np.exp(-(distance**2).sum(0) / 8)
            heatmap[image, rng.integers(2, 4)] += bump
            disc = (distance**2).sum(0) < rng.choice([30, 80])
            offsets[image][:, disc] = rng.uniform(-0.3, 0.3, (2, 1)) - distance[:, disc]
    heatmap += rng.normal(0, 0.01, heatmap.shape)
    return heatmap.astype(np.float32), offsets.astype(np.float32), rng.random((batch, side, side)), maps, image_labels


def refine(heatmap, offsets, probs, maps, image_labels, settings=None, scale=1.0, sigma=2.0, min_area=20):
    tensors = [torch.as_tensor(array) for array in (heatmap, offsets, probs, maps, image_labels)]
    regions = find_regions(tensors[3], tensors[4], SPLIT, min_area)
    return refine_targets(*tensors[:3], regions, SPLIT, settings or RefineSettings(), scale, sigma)


@pytest.mark.parametrize("seed", range(8))
def test_matches_the_formula(seed):
    batch = random_batch(seed)
    scale = 0.25  # windows of 11 px, sinks beyond 12.5 px
    settings = RefineSettings(sink_distance=50)
    targets = refine(*batch, settings=settings, scale=scale)
    for image in range(2):
        expected = refine_slowly(*(array[image] for array in batch), window=11, far=12.5, min_area=20, sigma=2)
        for target, reference in zip(targets, expected, strict=True):
            np.testing.assert_allclose(target[image].numpy(), reference, atol=1e-5)
    assert targets.loss_weight.any()


def test_random_cases_reach_every_rule():
    """The cases above hold sinks alone, sinks beside maxima, crowded regions and regions without a seed."""
    seen = {"sinks alone": 0, "sinks added": 0, "crowded": 0, "no seed": 0}
    for seed in range(8):
        heatmap, offsets, _, maps, image_labels = random_batch(seed)
        for image in range(2):
            for label in (2, 3):
                if not image_labels[image, label]:
                    continue
                for part in connected_parts(maps[image] == label + 1, 8):
                    mask = np.zeros(maps[image].shape, dtype=bool)
                    mask[tuple(np.transpose(part))] = True
                    center = heatmap[image, label] * mask
                    seeds, modified = find_seeds_slowly(center, part, offsets[image], 11, 12.5)
                    num_sinks = int((modified != center).sum())
                    seen["sinks alone"] += 0 < num_sinks == len(seeds)
                    seen["sinks added"] += 0 < num_sinks < len(seeds)
                    seen["crowded"] += len(seeds) > 5
                    seen["no seed"] += not seeds
    assert all(seen.values()), seen


def two_squares():
    """One region of class 2 that holds two instances side by side, their true maps, and its class map."""
    ids = torch.zeros(1, 16, 32, dtype=torch.int32)
    ids[0, 4:12, 4:16] = 1
    ids[0, 4:12, 16:28] = 2
    truth = encode_instance_targets(ids, torch.tensor([[2, 2]]), 4, sigma=2)
    return ids, truth, (ids > 0) * 3


def test_true_maps_split_touching_instances():
    ids, truth, class_map = two_squares()
    probs = torch.full((1, 16, 32), 0.8)
    settings = RefineSettings(nms_kernel_size=9)
    refined = refine(truth.center_target, truth.offset_target, probs, class_map, BOTH, settings)
    torch.testing.assert_close(refined.loss_weight, 0.8 * (ids > 0).float().unsqueeze(1))
    # Centers stand on the truncated means, so the offsets are half a pixel short.
    torch.testing.assert_close(refined.offset_target, truth.offset_target - 0.5 * (ids > 0).unsqueeze(1))
    torch.testing.assert_close(refined.center_target, truth.center_target[:, 2:])


def test_full_probabilities_are_read_at_the_pixels_class():
    _, truth, class_map = two_squares()
    probs = torch.rand(1, 5, 16, 32, generator=torch.Generator().manual_seed(0))
    settings = RefineSettings(nms_kernel_size=9)
    own = refine(truth.center_target, truth.offset_target, probs[:, 3], class_map, BOTH, settings)
    every = refine(truth.center_target, truth.offset_target, probs, class_map, BOTH, settings)
    for one, other in zip(own, every, strict=True):
        torch.testing.assert_close(one, other)


def test_perfect_sink_seeds_a_region_without_maxima():
    heatmap = torch.full((1, 4, 20, 20), 0.06)
    grid = torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij"))
    offsets = (torch.tensor([9.0, 10.0])[:, None, None] - grid)[None]
    probs, class_map = torch.full((1, 20, 20), 0.5), torch.full((1, 20, 20), 3)
    targets = refine(heatmap, offsets, probs, class_map, BOTH)
    assert int((offsets.square().sum(1) < 2.5**2).sum()) == 21
    assert targets.center_target[0, 0, 9, 10] == 1
    torch.testing.assert_close(targets.offset_target, offsets)
    torch.testing.assert_close(targets.loss_weight, torch.full((1, 1, 20, 20), 0.5))  # the map is 1 at the sink
    assert not refine(heatmap - 0.02, offsets, probs, class_map, BOTH).loss_weight.any()  # 0.04 is too little


def test_crowded_regions_are_ignored():
    heatmap = torch.zeros(1, 4, 8, 64)
    heatmap[0, 2, 4, 4::10] = 0.9  # six maxima
    maps = torch.full((1, 8, 64), 3)
    probs, offsets = torch.ones(1, 8, 64), torch.zeros(1, 2, 8, 64)
    few = RefineSettings(nms_kernel_size=9, max_instances=5)
    many = RefineSettings(nms_kernel_size=9, max_instances=6)
    assert not any(target.any() for target in refine(heatmap, offsets, probs, maps, BOTH, few))
    assert refine(heatmap, offsets, probs, maps, BOTH, many).loss_weight.min() > 0


def test_seeds_that_win_no_pixel_do_not_crowd_a_region():
    heatmap = torch.zeros(1, 4, 8, 64)
    heatmap[0, 2, 4, 4::10] = 0.9
    maps, probs = torch.full((1, 8, 64), 3), torch.ones(1, 8, 64)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(64.0), indexing="ij"))
    offsets = (torch.tensor([4.0, 14.0])[:, None, None] - grid)[None]  # all point at the second maximum
    targets = refine(heatmap, offsets, probs, maps, BOTH, RefineSettings(nms_kernel_size=9))
    torch.testing.assert_close(targets.loss_weight, torch.full((1, 1, 8, 64), 0.9))
    assert targets.center_target[0, 0].eq(1).sum() == 1


def test_weights_stay_in_the_unit_interval():
    heatmap = torch.zeros(1, 4, 8, 8)
    heatmap[0, 2, 4, 4] = 3.0
    targets = refine(heatmap, torch.zeros(1, 2, 8, 8), torch.full((1, 8, 8), 0.9), torch.full((1, 8, 8), 3), BOTH)
    assert targets.loss_weight.unique().tolist() == [1.0]


def test_batch_equals_single_images_in_any_order():
    batch = random_batch(3)
    together = refine(*batch, scale=0.25)
    swapped = refine(*(array[::-1].copy() for array in batch), scale=0.25)
    for target, other in zip(together, swapped, strict=True):
        torch.testing.assert_close(other.flip(0), target)
    for image in range(2):
        alone = refine(*(array[image : image + 1] for array in batch), scale=0.25)
        for target, single in zip(together, alone, strict=True):
            torch.testing.assert_close(target[image], single[0])


def test_mirrored_maps_give_mirrored_targets():
    heatmap, offsets, probs, maps, image_labels = random_batch(5)
    settings = RefineSettings(sink_radius=1e-3)  # no sinks: truncating their centroids is not symmetric
    plain = refine(heatmap, offsets, probs, maps, image_labels, settings, scale=0.25)
    turned = offsets * np.array([1, -1], dtype=np.float32)[:, None, None]
    mirrored = refine(
        *(array[..., ::-1].copy() for array in (heatmap, turned, probs, maps)), image_labels, settings, scale=0.25
    )
    assert plain.loss_weight.any()
    torch.testing.assert_close(mirrored.loss_weight.flip(3), plain.loss_weight)


@pytest.mark.parametrize("tags", [[0.0, 0, 0, 0], [0.0, 0, 1, 1]])
def test_nothing_to_refine(tags):
    maps = torch.full((1, 8, 8), 3 if not any(tags) else 0)
    zeros = torch.zeros(1, 4, 8, 8)
    targets = refine(zeros + 1, zeros[:, :2], torch.ones(1, 8, 8), maps, torch.tensor([tags]))
    assert [target.shape for target in targets] == [(1, 2, 8, 8), (1, 2, 8, 8), (1, 1, 8, 8)]
    assert not any(target.any() for target in targets)


def test_predictions_get_no_gradient():
    _, truth, class_map = two_squares()
    heatmap = truth.center_target.clone().requires_grad_()
    targets = refine(heatmap, truth.offset_target, torch.ones(1, 16, 32), class_map, BOTH)
    assert not any(target.requires_grad for target in targets)


def test_merge_prefers_isolated_instances():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 5), (2, 2, 5, 5), (2, 1, 5, 5)]
    refined = InstanceTargets(*(torch.rand(shape, generator=generator) for shape in shapes))
    isolated = InstanceTargets(*(torch.rand(shape, generator=generator).round() for shape in shapes))
    merged = merge_targets(isolated, refined)
    certain = isolated.loss_weight
    torch.testing.assert_close(
        merged.center_target, certain * isolated.center_target + (1 - certain) * refined.center_target
    )
    torch.testing.assert_close(
        merged.offset_target, certain * isolated.offset_target + (1 - certain) * refined.offset_target
    )
    torch.testing.assert_close(merged.loss_weight, torch.maximum(certain, refined.loss_weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_equals_cpu():
    batch = random_batch(1)
    expected = refine(*batch, scale=0.25)
    on_gpu = refine(*(torch.as_tensor(array).cuda() for array in batch), scale=0.25)
    for target, cpu in zip(on_gpu, expected, strict=True):
        torch.testing.assert_close(target.cpu(), cpu, rtol=1e-4, atol=1e-5)
