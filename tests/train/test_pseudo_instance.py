import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import connected_parts

from cl4wsis.recipe import PeakSettings
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.pseudo.instance import Peaks, find_peaks, semantic_map_from_logits, synthesize_targets
from cl4wsis_train.pseudo.regions import Regions, find_local_maxima, rank_in_group, scale_window

SPLIT = ClassSplit(step=1, old_names=("a", "b"), new_names=("c", "d"))  # channels: 0 | 1 2 | 3 4
BOTH = torch.tensor([[0.0, 0, 1, 1]])
SMALL = PeakSettings(min_area=3)


def make_peaks(*rows):
    """Peaks from rows of (image, label, y, x)."""
    table = torch.tensor(rows).reshape(-1, 4)
    return Peaks(table[:, 0], table[:, 1], table[:, 2:], torch.ones(len(table)))


# Regions


@pytest.mark.parametrize("connectivity", [4, 8])
def test_regions_match_flooding(connectivity):
    rng = np.random.default_rng(connectivity)
    maps = rng.choice(3, (2, 14, 17), p=[0.5, 0.3, 0.2])
    regions = Regions.from_class_map(torch.from_numpy(maps), connectivity, min_area=2)
    expected = [
        (image, value - 1, part)
        for image in range(2)
        for value in (1, 2)
        for part in connected_parts(maps[image] == value, connectivity)
        if len(part) >= 2
    ]
    found = [
        (int(image), int(label), sorted(map(tuple, regions.points[regions.pixel_regions == index].tolist())))
        for index, (image, label) in enumerate(zip(regions.image_index, regions.labels, strict=True))
    ]
    assert sorted(found) == sorted(expected)
    assert len(regions) == len(expected)
    for index, (_, _, part) in enumerate(found):
        assert int(regions.areas[index]) == len(part)
        assert regions.centroids[index].tolist() == np.mean(part, axis=0).astype(int).tolist()
        assert int((regions.region_ids == index + 1).sum()) == len(part)


def test_empty_map_has_no_regions():
    regions = Regions.from_class_map(torch.zeros(2, 4, 5, dtype=torch.int64), 8)
    assert len(regions) == 0
    assert len(regions.pixels) == 0


# Local maxima


def maxima_slowly(points, values, groups, window):
    radius, maximal = window // 2, []
    for p, (y, x) in enumerate(points):
        near = (groups == groups[p]) & (abs(points[:, 0] - y) <= radius) & (abs(points[:, 1] - x) <= radius)
        maximal.append(values[p] >= values[near].max())
    maximal = np.array(maximal)
    return np.array(
        [
            maximal[p]
            and not any(
                maximal[q] and groups[q] == groups[p] and abs(points[q] - points[p]).max() <= 1
                for q in range(p + 1, len(points))
            )
            for p in range(len(points))
        ]
    )


@pytest.mark.parametrize("window", [1, 3, 5, 13])
@pytest.mark.parametrize("distinct", [True, False])
def test_local_maxima_match_the_definition(window, distinct):
    rng = np.random.default_rng(window)
    points = np.argwhere(rng.random((20, 25)) < 0.7)
    values = rng.permutation(len(points)).astype(np.float32) if distinct else rng.integers(0, 6, len(points)) * 0.5
    groups = rng.choice([0, 1, 4], len(points))  # groups 2 and 3 are empty
    found = find_local_maxima(*(torch.from_numpy(array) for array in (points, values, groups)), window)
    np.testing.assert_array_equal(found.numpy(), maxima_slowly(points, values, groups, window))


def test_plateau_has_one_maximum():
    points = torch.tensor([(y, x) for y in range(3) for x in range(4)])
    found = find_local_maxima(points, torch.ones(12), torch.zeros(12, dtype=torch.int64), 5)
    assert found.nonzero().tolist() == [[11]]


def test_no_pixels_have_no_maxima():
    none = torch.zeros(0, dtype=torch.int64)
    assert find_local_maxima(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0), none, 5).shape == (0,)


def test_rank_in_group():
    assert rank_in_group(torch.tensor([2, 0, 2, 2, 0])).tolist() == [0, 0, 1, 2, 1]
    assert rank_in_group(torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("window", "scale", "expected"), [(15, 1.0, 15), (41, 1.0, 41), (15, 0.3125, 5), (41, 0.3125, 13), (3, 0.1, 1)]
)
def test_windows_stay_odd(window, scale, expected):
    assert scale_window(window, scale) == expected


# Class map


@pytest.mark.parametrize("all_seen_labels", [False, True])
def test_semantic_map_matches_the_formula(all_seen_labels):
    generator = torch.Generator().manual_seed(0)
    logits, mirrored = (3 * torch.randn(3, 5, 6, 6, generator=generator) for _ in range(2))
    image_labels = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]])
    result = semantic_map_from_logits(logits, mirrored, image_labels, SPLIT, (40, 48), all_seen_labels)

    averaged = (logits + mirrored.flip(3)) / 2
    probs = torch.softmax(F.interpolate(averaged, (40, 48), mode="bilinear", align_corners=False), dim=1)
    keep = torch.cat((torch.ones(3, 1), image_labels), 1)
    if not all_seen_labels:
        keep[:, :3] = 1
    best, expected = (probs * keep[:, :, None, None]).max(1)
    assert torch.equal(result.semantic_map, expected)
    torch.testing.assert_close(result.new_class_probs, best * (expected >= 3), rtol=0, atol=1e-5)
    assert torch.equal(result.old_pixels(SPLIT)[:, 0], (expected == 1) | (expected == 2))


def test_mirrored_pair_gives_mirrored_map():
    logits, mirrored = torch.randn(2, 1, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    plain = semantic_map_from_logits(logits, mirrored, BOTH, SPLIT, (32, 32))
    swapped = semantic_map_from_logits(mirrored, logits, BOTH, SPLIT, (32, 32))
    assert torch.equal(swapped.semantic_map, plain.semantic_map.flip(2))


# Peaks


@pytest.mark.parametrize("seed", range(3))
def test_peaks_match_the_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    activation = F.avg_pool2d(torch.rand(2, 2, 8, 8, generator=generator), 3, 1, 1)
    activation = activation / activation.amax((2, 3), keepdim=True)
    image_labels = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 1]])
    settings = PeakSettings(threshold=0.5, max_peaks=2)
    peaks = find_peaks(activation, image_labels, SPLIT, settings, (64, 64), length_scale=0.5)  # window 7

    pooled = F.avg_pool2d(activation, 3, 1, 1, count_include_pad=True)
    maps = F.interpolate(pooled, (64, 64), mode="bilinear", align_corners=False)
    expected = []
    for image, channel in [(0, 0), (0, 1), (1, 1)]:
        values = maps[image, channel].numpy()
        points = np.argwhere(values >= 0)
        flat = values.reshape(-1)
        kept = np.flatnonzero(maxima_slowly(points, flat, np.zeros(len(flat)), 7))
        kept = [p for p in sorted(kept, key=lambda p: -flat[p])[:2] if flat[p] >= 0.5]
        expected += [(image, channel + 2, *points[p].tolist()) for p in kept]
    found = torch.column_stack((peaks.image_index, peaks.labels, peaks.points)).tolist()
    assert found == [list(row) for row in expected]
    assert len(found) >= 3


def test_isolated_cell_gives_no_peak_but_a_full_core_does():
    activation = torch.zeros(1, 2, 9, 9)
    activation[0, 0, 4, 4] = 1
    activation[0, 1, 1:4, 1:4] = 1
    settings = PeakSettings()
    peaks = find_peaks(activation, BOTH, SPLIT, settings, (144, 144), length_scale=1.0)
    assert peaks.labels.tolist() == [3]
    assert abs(peaks.points[0] - 40).max() <= 8  # cell 2 covers pixels 32..47
    unsmoothed = find_peaks(activation, BOTH, SPLIT, PeakSettings(smoothing=False), (144, 144), length_scale=1.0)
    assert 2 in unsmoothed.labels.tolist()


def test_peak_at_the_image_border_is_counted_once():
    # Between border and the first cell's center resized maps are constant: eight equal pixels.
    activation = torch.tensor([[1.0, 0.4, 0.1], [0.4, 0.2, 0.1], [0.1, 0.1, 0.1]]).expand(1, 2, 3, 3)
    peaks = find_peaks(activation, BOTH, SPLIT, PeakSettings(smoothing=False), (48, 48), length_scale=1.0)
    assert peaks.labels.tolist() == [2, 3]


def test_untagged_images_have_no_peaks():
    peaks = find_peaks(torch.ones(2, 2, 4, 4), torch.zeros(2, 4), SPLIT, PeakSettings(), (64, 64), 1.0)
    assert [len(field) for field in peaks] == [0, 0, 0, 0]
    assert peaks.points.shape == (0, 2)


# Isolated instances


def test_one_peak_isolates_a_region():
    semantic_map = torch.tensor(
        [
            [3, 3, 0, 0, 4, 4],
            [3, 3, 0, 0, 4, 4],
            [0, 0, 3, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 3, 3, 3],
        ]
    )[None]
    peaks = make_peaks((0, 2, 0, 0), (0, 3, 0, 4), (0, 3, 1, 5), (0, 3, 4, 4))
    result = synthesize_targets(semantic_map, peaks, BOTH, SPLIT, SMALL, length_scale=1.0, sigma=1.0)
    # Class 2 top left, 5 px with the corner-connected pixel: one peak. Class 3: two peaks. The lower bar of class 2
    # holds a peak of class 3 only.
    center_target, offset_target, loss_weight = (target[0] for target in result.targets)
    assert loss_weight[0].tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    # Mean (0.8, 0.8), truncated to (0, 0).
    assert offset_target[:, 2, 2].tolist() == [-2, -2]
    assert offset_target[:, 0, 1].tolist() == [0, -1]
    assert center_target.shape == (2, 5, 6)
    assert center_target[0, 0, 0] == 1
    assert center_target[0, 1, 1] == pytest.approx(np.exp(-1))
    assert not center_target[1].any()
    assert (result.num_regions.item(), result.num_isolated.item(), result.num_peaks.item()) == (3, 1, 4)


def test_small_and_untagged_regions_are_left_out():
    semantic_map = torch.zeros(1, 8, 8, dtype=torch.int64)
    semantic_map[0, :2, :2] = 3
    semantic_map[0, 4:, 4:] = 4
    tags = torch.tensor([[0.0, 0, 1, 0]])
    peaks = make_peaks((0, 2, 0, 0), (0, 3, 5, 5))
    few = synthesize_targets(semantic_map, peaks, tags, SPLIT, PeakSettings(min_area=16), 0.5, 1.0)  # 16 / 4 = 4 px
    none = synthesize_targets(semantic_map, peaks, tags, SPLIT, PeakSettings(min_area=17), 0.5, 1.0)
    assert (len(few.regions), len(none.regions)) == (1, 0)
    assert int(few.targets.loss_weight.sum()) == 4
    assert not any(target.any() for target in none.targets)


def test_regions_without_a_peak_count_where_they_are_accepted():
    semantic_map = torch.zeros(1, 6, 6, dtype=torch.int64)
    semantic_map[0, :2, :2] = 3  # one peak
    semantic_map[0, :2, 4:] = 3  # none
    semantic_map[0, 4:, :] = 3  # two
    peaks = make_peaks((0, 2, 0, 0), (0, 2, 4, 0), (0, 2, 5, 5))
    settings = SMALL.model_copy(update={"accept_peakless": True})
    published, accepting = (
        synthesize_targets(semantic_map, peaks, BOTH, SPLIT, chosen, 1.0, 1.0) for chosen in (SMALL, settings)
    )
    assert (int(published.num_isolated), int(accepting.num_isolated)) == (1, 2)
    assert published.targets.loss_weight[0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert accepting.targets.loss_weight[0, 0, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert not accepting.targets.loss_weight[0, 0, 4:].any()


def random_batch(seed, batch=3, side=24):
    rng = np.random.default_rng(seed)
    maps = rng.choice(5, (batch, side // 4, side // 4)).repeat(4, 1).repeat(4, 2)
    image_labels = torch.tensor(rng.integers(0, 2, (batch, 4)), dtype=torch.float32)
    image_labels[:, :2] = 0
    rows = rng.integers((0, 2, 0, 0), (batch, 4, side, side), (12 * batch, 4))
    return torch.from_numpy(maps), make_peaks(*rows.tolist()), image_labels


@pytest.mark.parametrize("seed", range(4))
def test_isolated_instances_match_the_formula(seed):
    maps, peaks, image_labels = random_batch(seed)
    result = synthesize_targets(maps, peaks, image_labels, SPLIT, SMALL, 1.0, sigma=2.0)
    weight, offsets = np.zeros((3, 24, 24)), np.zeros((3, 2, 24, 24))
    heatmap = np.zeros((3, 2, 24, 24))
    grid = np.mgrid[:24, :24]
    for image in range(3):
        for label in (2, 3):
            if not image_labels[image, label]:
                continue
            for part in connected_parts(maps[image].numpy() == label + 1, 8):
                inside = {
                    index
                    for index in range(len(peaks.labels))
                    if peaks.image_index[index] == image
                    and peaks.labels[index] == label
                    and tuple(peaks.points[index].tolist()) in part
                }
                if len(part) < 3 or len(inside) != 1:
                    continue
                center = np.mean(part, axis=0).astype(int)
                for y, x in part:
                    weight[image, y, x] = 1
                    offsets[image, :, y, x] = center - (y, x)
                distance = grid - center[:, None, None]
                gaussian = np.exp(-(distance**2).sum(0) / 8) * (abs(distance).max(0) <= 7)
                heatmap[image, label - 2] = np.maximum(heatmap[image, label - 2], gaussian)
    np.testing.assert_array_equal(result.targets.loss_weight[:, 0].numpy(), weight)
    np.testing.assert_array_equal(result.targets.offset_target.numpy(), offsets)
    np.testing.assert_allclose(result.targets.center_target.numpy(), heatmap, atol=1e-6)


def test_batch_equals_single_images_in_any_order():
    maps, peaks, image_labels = random_batch(9)
    together = synthesize_targets(maps, peaks, image_labels, SPLIT, SMALL, 1.0, 2.0)
    for image in range(3):
        chosen = peaks.image_index == image
        own = Peaks(*(field[chosen] for field in peaks))._replace(image_index=torch.zeros(int(chosen.sum())).long())
        alone = synthesize_targets(maps[[image]], own, image_labels[[image]], SPLIT, SMALL, 1.0, 2.0)
        for batched, single in zip(together.targets, alone.targets, strict=True):
            assert torch.equal(batched[image], single[0])
        assert together.num_isolated[image] == alone.num_isolated[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_equals_cpu():
    maps, peaks, image_labels = random_batch(2)
    expected = synthesize_targets(maps, peaks, image_labels, SPLIT, SMALL, 1.0, 2.0)
    on_gpu = Peaks(*(field.cuda() for field in peaks))
    result = synthesize_targets(maps.cuda(), on_gpu, image_labels.cuda(), SPLIT, SMALL, 1.0, 2.0)
    for target, cpu in zip(result.targets, expected.targets, strict=True):
        torch.testing.assert_close(target.cpu(), cpu)
