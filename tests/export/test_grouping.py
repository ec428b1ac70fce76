"""The static grouping on inputs one can check by eye, and on shapes that are hard to label."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch twin needs the extra 'export'")

import torch

from cl4wsis.errors import ConfigError
from cl4wsis.grouping import GroupingSpec, group_instances
from cl4wsis_export.grouping import GroupingOutput, StaticGrouping, enlarged_class_map

SMALL = GroupingSpec(nms_kernel_size=3, min_area=0, max_instances=4)


def spiral(side: int, turns: float) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    return (((radius * turns * 2 / side - angle / (2 * np.pi)) % 1) < 0.5) & (radius < side / 2)


def serpentine(side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[::4] = True
    for turn, row in enumerate(range(0, side - 4, 4)):
        mask[row : row + 4, -1 if turn % 2 == 0 else 0] = True
    return mask


def comb(side: int) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[1] = mask[1:, ::4] = True
    return mask


def maze(side: int, seed: int) -> np.ndarray:
    """Carve a perfect maze: one path between any two cells."""
    generator = np.random.default_rng(seed)
    mask, path = np.zeros((side, side), bool), [(1, 1)]
    mask[1, 1] = True
    while path:
        y, x = path[-1]
        steps = [(dy, dx) for dy, dx in ((0, 2), (2, 0), (0, -2), (-2, 0)) if 0 < y + dy < side and 0 < x + dx < side]
        steps = [(dy, dx) for dy, dx in steps if not mask[y + dy, x + dx]]
        if not steps:
            path.pop()
            continue
        dy, dx = steps[generator.integers(len(steps))]
        mask[y + dy // 2, x + dx // 2] = mask[y + dy, x + dx] = True
        path.append((y + dy, x + dx))
    return mask


def label(classes: np.ndarray, rounds: int) -> tuple[np.ndarray, bool]:
    grouping = StaticGrouping(SMALL, classes.shape, rounds)
    labels, finished = grouping.label_regions(torch.from_numpy(classes.astype(np.float32))[None])
    return labels[0].numpy().astype(int), bool(finished.item())


def run(spec: GroupingSpec, *maps: np.ndarray) -> GroupingOutput:
    return StaticGrouping(spec, maps[0].shape[1:], rounds=4)(*(torch.from_numpy(m)[None] for m in maps))


def maps_from_classes(classes: np.ndarray, num_classes: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    probs = np.where(classes == np.arange(num_classes + 1)[:, None, None], 0.8, 0.2 / num_classes).astype(np.float32)
    shape = classes.shape
    return probs, np.zeros((num_classes, *shape), np.float32), np.zeros((2, *shape), np.float32)


def test_label_is_that_of_the_last_pixel_of_the_region() -> None:
    classes = np.array(
        [
            [1, 1, 0, 2],
            [0, 0, 1, 2],
            [2, 0, 0, 1],
            [2, 2, 0, 0],
        ]
    )
    expected = np.array(
        [
            [12, 12, 0, 8],
            [0, 0, 12, 8],
            [14, 0, 0, 12],
            [14, 14, 0, 0],
        ]
    )
    labels, finished = label(classes, rounds=2)
    assert finished
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    "mask",
    [spiral(96, 4), spiral(96, 12), serpentine(96), comb(96), maze(97, 0), np.ones((96, 96), bool), np.eye(96) > 0],
    ids=["spiral", "thin spiral", "serpentine", "comb", "maze", "full", "diagonal"],
)
def test_six_rounds_finish_intricate_shapes(mask: np.ndarray) -> None:
    import cv2

    labels, finished = label(mask, rounds=6)
    assert finished
    count, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    pairs = np.unique(np.stack([labels[mask], parts[mask]]), axis=1)
    assert pairs.shape[1] == count - 1  # one label for every part, one part for every label


def test_unfinished_regions_are_reported() -> None:
    _, finished = label(serpentine(96), rounds=1)
    assert not finished


def test_first_center_in_priority_wins_a_tie() -> None:
    probs, heatmap, offsets = maps_from_classes(np.ones((1, 7), int))
    heatmap[0, 0, 0], heatmap[0, 0, 6] = 0.5, 0.9  # both three pixels from the middle
    output = run(SMALL, probs, heatmap, offsets)
    np.testing.assert_array_equal(output.instance_ids[0, 0], [2, 2, 2, 1, 1, 1, 1])


def test_ties_among_many_centers_go_to_the_first() -> None:
    probs, heatmap, offsets = maps_from_classes(np.ones((40, 40), int))
    heatmap[0, ::4, ::4] = np.random.default_rng(0).permutation(100).reshape(10, 10) / 200 + 0.25
    spec = GroupingSpec(nms_kernel_size=3, min_area=0, max_instances=100)
    assert assert_agrees_with_the_reference(spec, 4, probs, heatmap, offsets) == 100


def test_equal_neighbours_give_one_peak_the_last() -> None:
    probs, heatmap, offsets = maps_from_classes(np.ones((5, 5), int))
    heatmap[0, 1:3, 1:3] = 0.7
    output = run(SMALL, probs, heatmap, offsets)
    assert (output.areas[0] > 0).sum() == 1
    np.testing.assert_allclose(output.scores[0, 0], 0.7 * 0.8, rtol=1e-6)


def test_region_without_peak_is_one_instance_with_the_mean_probability() -> None:
    output = run(SMALL, *maps_from_classes(np.pad(np.full((3, 4), 2), 1)))
    assert output.labels[0, 0] == 1
    assert output.areas[0].tolist() == [12, 0, 0, 0]
    assert output.boxes[0, 0].tolist() == [1, 1, 5, 4]
    np.testing.assert_allclose(output.scores[0, 0], 0.8, rtol=1e-6)


def test_small_regions_take_no_slot_from_larger_ones() -> None:
    classes = np.zeros((16, 32), int)
    classes[1:4, 1:5] = 1
    classes[8::2, ::2] = 1  # specks with higher pixel indices, more than there are slots
    spec = SMALL.model_copy(update={"min_area": 6})
    output = run(spec, *maps_from_classes(classes))
    assert output.areas[0].tolist() == [12, 0, 0, 0]


def test_fewer_pixels_than_slots_leave_slots_empty() -> None:
    spec = GroupingSpec(nms_kernel_size=3, min_area=0, max_instances=64)
    output = run(spec, *maps_from_classes(np.ones((4, 4), int)))
    assert output.labels.shape == (1, 64)
    assert output.boxes.shape == (1, 64, 4)
    assert output.areas[0].sum() == 16


@pytest.mark.parametrize("num_slots", [1, 3, 17, 200])
def test_any_number_of_slots_agrees_with_the_reference(num_slots: int) -> None:
    generator = np.random.default_rng(num_slots)
    classes = generator.integers(0, 3, (12, 10)).repeat(2, 0).repeat(2, 1)
    probs, heatmap, offsets = maps_from_classes(classes)
    heatmap += generator.random(heatmap.shape).astype(np.float32)
    offsets += generator.normal(0, 3, offsets.shape).astype(np.float32)
    spec = GroupingSpec(nms_kernel_size=5, min_area=2, max_instances=num_slots)
    assert_agrees_with_the_reference(spec, 4, probs, heatmap, offsets)


def assert_agrees_with_the_reference(spec: GroupingSpec, rounds: int, *maps: np.ndarray) -> int:
    """Compare the twin with the reference, and return the number of instances."""
    output = StaticGrouping(spec, maps[0].shape[1:], rounds)(*(torch.from_numpy(m)[None] for m in maps))
    reference = group_instances(*maps, spec)
    used = output.areas[0] > 0
    new_ids = torch.nn.functional.pad(used.cumsum(0) * used, (1, 0))
    np.testing.assert_array_equal(new_ids[output.instance_ids[0].long()], reference.instance_ids)
    np.testing.assert_array_equal(output.labels[0][used], reference.labels)
    np.testing.assert_allclose(output.scores[0][used], reference.scores, rtol=1e-5)
    return len(reference)


@pytest.mark.parametrize("window", [17, 19, 21, 41])
@pytest.mark.parametrize("levels", [1, 2, 3, 8, 1000])
def test_equal_values_in_large_windows_agree_with_the_reference(levels: int, window: int) -> None:
    for seed in range(4):
        generator = np.random.default_rng([levels, window, seed])
        classes = generator.integers(0, 3, (8, 10)).repeat(8, 0).repeat(8, 1)
        classes[generator.random(classes.shape) < 0.02 * seed] = 1  # specks within the other regions
        probs, heatmap, offsets = maps_from_classes(classes)
        coarse = generator.integers(0, levels + 1, (2, 32, 40)) / np.float32(levels)
        heatmap += coarse.repeat(2, 1).repeat(2, 2).astype(np.float32)  # plateaus of 2x2 pixels and more
        offsets += generator.normal(0, 3, offsets.shape).astype(np.float32)
        spec = GroupingSpec(nms_kernel_size=window, min_area=0, max_instances=200)
        assert assert_agrees_with_the_reference(spec, 6, probs, heatmap, offsets) > 5


@pytest.mark.parametrize(
    "mask",
    [spiral(96, 12), serpentine(96), comb(96), np.pad(maze(95, 1), ((0, 1), (0, 1)))],
    ids=["spiral", "serpentine", "comb", "maze"],
)
def test_intricate_regions_agree_with_the_reference(mask: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    classes = np.where(mask, 1, 2)
    probs, heatmap, offsets = maps_from_classes(classes)
    heatmap += generator.random(heatmap.shape).astype(np.float32)
    spec = GroupingSpec(nms_kernel_size=41, min_area=50, max_instances=64)
    assert assert_agrees_with_the_reference(spec, 6, probs, heatmap, offsets) > 5


def test_a_larger_value_at_the_very_edge_of_a_window_counts() -> None:
    radius = 20
    for row in range(4):
        for column in range(4):
            probs, heatmap, offsets = maps_from_classes(np.ones((64, 64), int))
            heatmap[0, row + 4, column + 4] = 0.5
            heatmap[0, row + 4 + radius, column + 4 - row % 2] = 0.9  # within the window of the first
            heatmap[0, row + 4, column + 4 + radius + 1] = 0.9  # one pixel beyond it
            spec = GroupingSpec(nms_kernel_size=2 * radius + 1, min_area=0, max_instances=4)
            assert assert_agrees_with_the_reference(spec, 4, probs, heatmap, offsets) == 2
            heatmap[0, row + 4 + radius, column + 4 - row % 2] = 0
            assert assert_agrees_with_the_reference(spec, 4, probs, heatmap, offsets) == 2


def test_enlarged_class_map_is_bilinear_with_half_pixel_centers() -> None:
    probs = torch.rand(2, 5, 6, 7, generator=torch.Generator().manual_seed(0)).softmax(1)
    expected = torch.nn.functional.interpolate(probs, scale_factor=4, mode="bilinear", align_corners=False)
    found = enlarged_class_map(probs)
    margin = expected.topk(2, dim=1)[0].diff(dim=1).abs().squeeze(1)
    assert found.shape == (2, 24, 28)
    assert (found == expected.argmax(1))[margin > 1e-6].all()


def test_paper_profile_cannot_be_a_graph() -> None:
    with pytest.raises(ConfigError, match="host only"):
        StaticGrouping(GroupingSpec(profile="paper"), (32, 32), rounds=4)


def test_grid_beyond_exact_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="not exact in float32"):
        StaticGrouping(GroupingSpec(), (4096, 4096), rounds=4)
