import numpy as np
import pytest
from cases import grouping_scene
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cl4wsis.grouping import GroupingSpec, argmax_channels, find_peaks, group_instances

SMALL = GroupingSpec(nms_kernel_size=3, min_area=0)


def maps_from(class_rows, centers=(), offsets=(), num_classes=2, confidence=0.75):
    """Network maps from a drawing: rows of digits (class-map values), centers (class, y, x, value), offsets."""
    class_map = np.array([[int(digit) for digit in row] for row in class_rows])
    probs = np.full((num_classes + 1, *class_map.shape), (1 - confidence) / num_classes, np.float32)
    np.put_along_axis(probs, class_map[None], confidence, axis=0)
    heatmap = np.zeros((num_classes, *class_map.shape), np.float32)
    for label, y, x, value in centers:
        heatmap[label, y, x] = value
    offset_map = np.zeros((2, *class_map.shape), np.float32)
    for y, x, dy, dx in offsets:
        offset_map[:, y, x] = dy, dx
    return probs, heatmap, offset_map


def drawn(instances):
    return ["".join(str(value) for value in row) for row in instances.instance_ids.tolist()]


def test_pixels_go_to_the_nearest_center_of_their_region():
    found = group_instances(*maps_from(["1111110", "1111110"], [(0, 0, 1, 0.5), (0, 1, 5, 0.8)]), SMALL)
    assert drawn(found) == ["2222110", "2221110"]  # (0, 3) is as far from both in x, but one row closer to (0, 1)
    assert found.labels.tolist() == [0, 0]
    np.testing.assert_allclose(found.scores, [0.8 * 0.75, 0.5 * 0.75], rtol=1e-6)
    np.testing.assert_array_equal(found.boxes, [[3, 0, 6, 2], [0, 0, 4, 2]])


def test_offsets_decide_against_distance():
    offsets = [(0, x, 0, 4) for x in (0, 1, 2)] + [(0, x, 0, -4) for x in (4, 5, 6)]
    found = group_instances(*maps_from(["1111111"], [(0, 0, 1, 0.9), (0, 0, 5, 0.5)], offsets), SMALL)
    assert drawn(found) == ["2221111"]  # (0, 3) has no offset and is equally far from both: the first center wins


def test_assignment_tie_goes_to_the_higher_center():
    for left, right, expected in ((0.5, 0.9, "22111"), (0.9, 0.5, "11122")):
        found = group_instances(*maps_from(["11111"], [(0, 0, 0, left), (0, 0, 4, right)]), SMALL)
        assert drawn(found) == [expected]


def test_equal_centers_are_ordered_by_falling_pixel_index():
    found = group_instances(*maps_from(["11111"], [(0, 0, 0, 0.5), (0, 0, 4, 0.5)]), SMALL)
    assert drawn(found) == ["22111"]


def test_region_without_peak_is_one_instance_scored_by_its_probability():
    found = group_instances(*maps_from(["11022", "11022"], [(1, 0, 4, 0.4)]), SMALL)
    assert drawn(found) == ["22011", "22011"]
    np.testing.assert_allclose(found.scores, [0.4 * 0.75, 0.75], rtol=1e-6)
    assert found.labels.tolist() == [1, 0]


def test_pseudo_centers_follow_peaks_from_the_last_pixel_backwards():
    found = group_instances(*maps_from(["10201", "00000", "22011"], [(0, 0, 0, 0.2)]), SMALL)
    assert drawn(found) == ["10504", "00000", "33022"]


def test_center_counts_only_inside_its_own_class():
    found = group_instances(*maps_from(["1122"], [(0, 0, 3, 0.9), (1, 0, 0, 0.9)]), SMALL)
    np.testing.assert_allclose(found.scores, [0.75, 0.75])  # two pseudo-centers
    assert drawn(found) == ["2211"]


def test_window_ignores_pixels_of_other_classes():
    maps = maps_from(["1212"], [(0, 0, 0, 0.3), (0, 0, 1, 0.9), (0, 0, 2, 0.2)])
    assert find_peaks(maps[1][0], np.array([[True, False, True, False]]), 0.1, 3).tolist() == [0, 2]


def test_window_reaches_into_other_regions_of_the_class():
    maps = maps_from(["101"], [(0, 0, 0, 0.3), (0, 0, 2, 0.9)])
    found = group_instances(*maps, GroupingSpec(nms_kernel_size=5, min_area=0))
    np.testing.assert_allclose(found.scores, [0.9 * 0.75, 0.75])  # the weaker one is suppressed, its region stays


def test_center_must_exceed_the_threshold_in_float32():
    for value, expected in ((0.1, 0.75), (np.nextafter(np.float32(0.1), np.float32(1)), 0.075)):
        found = group_instances(*maps_from(["1"], [(0, 0, 0, value)]), SMALL)
        np.testing.assert_allclose(found.scores, [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "window", "expected"),
    [
        (["55", "55"], 3, [3]),
        (["5555555"], 3, [6]),
        (["5000005"], 3, [0, 6]),
        (["5005"], 7, [3]),
        (["5054"], 3, [0, 2]),
        (["0550", "0000", "0055"], 3, [2, 11]),
        (["3"], 41, [0]),
        (["000"], 3, []),
    ],
)
def test_last_pixel_of_a_plateau_survives(rows, window, expected):
    values = np.array([[int(digit) for digit in row] for row in rows], np.float32)
    assert find_peaks(values, np.ones(values.shape, bool), 0.1, window).tolist() == expected


def test_diagonal_pixels_belong_to_one_region():
    assert drawn(group_instances(*maps_from(["100", "010", "001"]), SMALL)) == ["100", "010", "001"]


def test_lowest_channel_wins_a_tie():
    probs = np.full((3, 1, 2), 1 / 3, np.float32)
    probs[1:, 0, 1] = 0.4
    channels, largest = argmax_channels(probs)
    assert channels.tolist() == [[0, 1]]
    np.testing.assert_array_equal(largest, np.float32([[1 / 3, 0.4]]))


def test_argmax_handles_more_channels_than_a_byte_counts():
    values = np.random.default_rng(0).random((300, 4, 5), dtype=np.float32)
    np.testing.assert_array_equal(argmax_channels(values)[0], values.argmax(axis=0))


def test_small_regions_are_dropped_and_take_no_slot():
    maps = maps_from(["1100", "1101", "0000", "1111"], [(0, 0, 0, 0.5), (0, 1, 3, 0.9)])
    found = group_instances(*maps, GroupingSpec(nms_kernel_size=1, min_area=4, max_instances=1))
    assert drawn(found) == ["1100", "1100", "0000", "0000"]


def test_peak_of_a_dropped_region_still_suppresses():
    maps = maps_from(["1101"], [(0, 0, 1, 0.5), (0, 0, 3, 0.9)])
    found = group_instances(*maps, GroupingSpec(nms_kernel_size=5, min_area=2))
    np.testing.assert_allclose(found.scores, [0.75])  # a pseudo-center


def test_small_instances_are_dropped_and_ids_close_up():
    maps = maps_from(["1111111"], [(0, 0, 0, 0.9), (0, 0, 6, 0.5)], [(0, x, 0, 6) for x in (2, 3, 4, 5)])
    found = group_instances(*maps, GroupingSpec(nms_kernel_size=3, min_area=3))
    assert drawn(found) == ["0011111"]
    np.testing.assert_allclose(found.scores, [0.5 * 0.75], rtol=1e-6)


def test_center_without_pixels_leaves_no_row():
    maps = maps_from(["111"], [(0, 0, 0, 0.5), (0, 0, 2, 0.9)], [(0, 1, 0, -1), (0, 2, 0, -2)])
    found = group_instances(*maps, SMALL)
    assert drawn(found) == ["111"]
    np.testing.assert_allclose(found.scores, [0.5 * 0.75], rtol=1e-6)


def test_top_centers_share_their_region_and_a_region_without_any_is_lost():
    maps = maps_from(["11111", "00000", "22200"], [(0, 0, 0, 0.5), (0, 0, 4, 0.9), (1, 2, 1, 0.4)])
    assert drawn(group_instances(*maps, SMALL)) == ["22111", "00000", "33300"]
    for count, expected in ((2, ["22111", "00000", "00000"]), (1, ["11111", "00000", "00000"])):
        spec = GroupingSpec(nms_kernel_size=3, min_area=0, max_instances=count)
        assert drawn(group_instances(*maps, spec)) == expected


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_empty_and_full_images(profile):
    spec = GroupingSpec(profile=profile)
    side = 16 * spec.stride
    empty = group_instances(*maps_from(["0" * 16] * 16), spec)
    assert len(empty) == 0
    assert empty.instance_ids.shape == (side, side)
    full = group_instances(*maps_from(["2" * 16] * 16, [(1, 8, 8, 0.5)]), spec)
    assert (full.instance_ids == 1).all()
    assert full.labels.tolist() == [1]
    np.testing.assert_array_equal(full.boxes, [[0, 0, side, side]])


@pytest.mark.parametrize(
    ("size", "profile", "expected"),
    [(41, "exact", 41), (40, "exact", 41), (1, "exact", 1), (41, "fast", 11), (44, "fast", 11), (45, "fast", 13)],
)
def test_window_covers_the_given_length(size, profile, expected):
    assert GroupingSpec(profile=profile, nms_kernel_size=size).window_size == expected


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4, 4), (3, 4, 4), (2, 4, 4)), r"center_heatmap must be \(2, 4, 4\)"),
        (((3, 4, 4), (2, 4, 4), (2, 8, 8)), r"offset_map must be \(2, 4, 4\)"),
        (((1, 4, 4), (0, 4, 4), (2, 4, 4)), "C >= 2"),
        (((1, 3, 4, 4), (2, 4, 4), (2, 4, 4)), "one image"),
    ],
)
def test_maps_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        group_instances(*(np.zeros(shape, np.float32) for shape in shapes), GroupingSpec())


# A second, slow reading of the rules: one pixel at a time, without OpenCV.


def slow_class_map(probs):
    return np.argmax(probs, axis=0)


def slow_regions(class_map):
    regions, region_map = [], np.full(class_map.shape, -1)
    for start in zip(*np.nonzero(class_map), strict=True):
        if region_map[start] >= 0:
            continue
        members, queue = [], [start]
        region_map[start] = len(regions)
        while queue:
            y, x = queue.pop()
            members.append((int(y), int(x)))
            for v in range(max(y - 1, 0), min(y + 2, class_map.shape[0])):
                for u in range(max(x - 1, 0), min(x + 2, class_map.shape[1])):
                    if class_map[v, u] == class_map[start] and region_map[v, u] < 0:
                        region_map[v, u] = len(regions)
                        queue.append((v, u))
        regions.append(sorted(members))
    return regions


def slow_peaks(class_map, heatmap, threshold, window):
    height, width = class_map.shape
    reach = window // 2
    value = np.where(class_map > 0, np.take_along_axis(heatmap, np.maximum(class_map - 1, 0)[None], 0)[0], 0)

    def neighbours(y, x):
        ys, xs = slice(max(y - reach, 0), y + reach + 1), slice(max(x - reach, 0), x + reach + 1)
        return ys, xs, class_map[ys, xs] == class_map[y, x]

    candidate = np.zeros(class_map.shape, bool)
    for y, x in np.argwhere((class_map > 0) & (value > np.float32(threshold))):
        ys, xs, same = neighbours(y, x)
        candidate[y, x] = value[y, x] == value[ys, xs][same].max()
    index = np.arange(height * width).reshape(height, width)
    peaks = {}
    for y, x in np.argwhere(candidate):
        ys, xs, same = neighbours(y, x)
        if index[ys, xs][same & candidate[ys, xs]].max() == index[y, x]:
            peaks[int(y), int(x)] = float(value[y, x])
    return peaks


def slow_bilinear(channel, factor=4):
    height, width = channel.shape
    result = np.zeros((height * factor, width * factor))
    for row in range(height * factor):
        for column in range(width * factor):
            y, x = (row + 0.5) / factor - 0.5, (column + 0.5) / factor - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            for v, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
                for u, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
                    v_in, u_in = min(max(v, 0), height - 1), min(max(u, 0), width - 1)
                    result[row, column] += weight_y * weight_x * channel[v_in, u_in]
    return result


def slow_group(probs, heatmap, offset_map, spec):
    stride = spec.stride
    class_map = slow_class_map(probs)
    width = class_map.shape[1]
    regions = [r for r in slow_regions(class_map) if len(r) * stride**2 >= spec.min_area]
    peaks = slow_peaks(class_map, heatmap, spec.center_threshold, spec.window_size)
    centers = []  # (is peak, value, index, region)
    for number, members in enumerate(regions):
        own = [(1, peaks[p], p[0] * width + p[1], number) for p in members if p in peaks]
        centers += own or [(0, 0.0, members[-1][0] * width + members[-1][1], number)]
    centers = sorted(centers, reverse=True)[: spec.max_instances]
    ids = np.zeros(class_map.shape, np.int32)
    for number, members in enumerate(regions):
        own = [(i, *divmod(c[2], width)) for i, c in enumerate(centers) if c[3] == number]
        for y, x in members if own else []:
            q = np.float32([y, x]) + offset_map[:, y, x] / np.float32(stride)
            distances = [((q - np.float32(c[1:])) ** 2).sum() for c in own]
            ids[y, x] = own[int(np.argmin(distances))][0] + 1
    classes = [class_map[divmod(c[2], width)] for c in centers]
    scores = [
        (c[1] if c[0] else 1) * (probs[classes[i]][ids == i + 1].mean() if (ids == i + 1).any() else 0)
        for i, c in enumerate(centers)
    ]
    if spec.profile == "fast":
        padded = np.pad(ids, 1)
        around = [padded[v : v + ids.shape[0], u : u + width] for v in range(3) for u in range(3)]
        ids = np.where(ids == 0, np.max(around, axis=0), ids).repeat(4, 0).repeat(4, 1)
        full_class_map = slow_class_map(np.stack([slow_bilinear(channel) for channel in probs]))
        ids[np.array([0, *classes])[ids] != full_class_map] = 0
    kept = [i for i in range(len(centers)) if (ids == i + 1).sum() >= max(spec.min_area, 1)]
    result = np.zeros_like(ids)
    for new, old in enumerate(kept):
        result[ids == old + 1] = new + 1
    return result, [classes[i] - 1 for i in kept], [scores[i] for i in kept]


@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize("max_instances", [64, 5])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_slow_reading_of_the_rules(profile, max_instances, seed):
    spec = GroupingSpec(profile=profile, min_area=12 if profile == "exact" else 60, max_instances=max_instances)
    spec = spec.model_copy(update={"nms_kernel_size": 9 * spec.stride})
    scene = grouping_scene(seed, 4, 40, 28, 10, pseudo_fraction=0.3, noise=0.25, stride=spec.stride)
    found = group_instances(scene.semantic_probs, scene.center_heatmap, scene.offset_map, spec)
    ids, labels, scores = slow_group(scene.semantic_probs, scene.center_heatmap, scene.offset_map, spec)
    np.testing.assert_array_equal(found.instance_ids, ids)
    assert found.labels.tolist() == labels
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


@pytest.mark.parametrize("profile", ["exact", "fast", "paper"])
def test_renaming_classes_renames_labels(profile):
    scene = grouping_scene(5, 4, 64, 64, 8)
    spec = GroupingSpec(profile=profile)
    order = np.array([2, 0, 3, 1])  # new class i was class order[i]
    found = group_instances(scene.semantic_probs, scene.center_heatmap, scene.offset_map, spec)
    renamed = group_instances(
        scene.semantic_probs[[0, *(order + 1)]], scene.center_heatmap[order], scene.offset_map, spec
    )
    assert len(found) == len(renamed)
    # ``paper`` lists instances by class, the others by center, which the names of classes do not touch.
    rows = np.argsort(order[renamed.labels], kind="stable") if profile == "paper" else np.arange(len(found))
    for old, new in enumerate(rows):
        assert found.labels[old] == order[renamed.labels[new]]
        np.testing.assert_array_equal(found.instance_ids == old + 1, renamed.instance_ids == new + 1)


@settings(max_examples=15, deadline=None)
@example(seed=850, top=1, left=0, profile="paper")  # parts that OpenCV numbers in another order then
@given(
    seed=st.integers(0, 10_000),
    top=st.integers(0, 8),
    left=st.integers(0, 8),
    profile=st.sampled_from(["exact", "fast", "paper"]),
)
def test_shifting_the_maps_shifts_the_answer(seed, top, left, profile):
    spec = GroupingSpec(profile=profile, min_area=20)
    scene = grouping_scene(seed, 3, 40, 40, 6, noise=0.1, stride=spec.stride)
    frame = ((0, 0), (4 + top, 12 - top), (4 + left, 12 - left))
    probs = np.pad(scene.semantic_probs, frame)
    # Background of its own beyond the old border, so that nothing there joins a region.
    outside = np.pad(np.zeros((40, 40)), frame[1:], constant_values=1) == 1
    probs[0, outside] = 1
    reference = np.pad(scene.semantic_probs, ((0, 0), (4, 12), (4, 12)))
    reference[0, np.pad(np.zeros((40, 40)), ((4, 12), (4, 12)), constant_values=1) == 1] = 1
    fixed = ((0, 0), (4, 12), (4, 12))
    first = group_instances(reference, np.pad(scene.center_heatmap, fixed), np.pad(scene.offset_map, fixed), spec)
    moved = group_instances(probs, np.pad(scene.center_heatmap, frame), np.pad(scene.offset_map, frame), spec)
    shifted = np.roll(first.instance_ids, (top * spec.stride, left * spec.stride), axis=(0, 1))
    np.testing.assert_array_equal(moved.instance_ids, shifted)
    np.testing.assert_allclose(moved.scores, first.scores, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), profile=st.sampled_from(["exact", "fast"]), noise=st.floats(0, 0.6))
def test_instances_are_whole_ordered_and_within_limits(seed, profile, noise):
    spec = GroupingSpec(profile=profile, max_instances=6)
    scene = grouping_scene(seed, 3, 48, 56, 9, noise=noise, stride=spec.stride)
    found = group_instances(scene.semantic_probs, scene.center_heatmap, scene.offset_map, spec)
    assert len(found) <= 6
    assert (found.areas >= spec.min_area).all()
    if profile == "exact":
        class_map = scene.semantic_probs.argmax(axis=0)
        for number, label in enumerate(found.labels):
            assert (class_map[found.instance_ids == number + 1] == label + 1).all()


def test_a_clean_scene_comes_back_as_drawn():
    scene = grouping_scene(3, 5, 96, 96, 6, pseudo_fraction=0, noise=0)
    found = group_instances(
        scene.semantic_probs, scene.center_heatmap, scene.offset_map, GroupingSpec(nms_kernel_size=5)
    )
    drawn_areas = np.bincount(scene.instance_ids.reshape(-1))[1:]
    visible = np.flatnonzero(drawn_areas >= 50)
    for number in visible:
        mask = scene.instance_ids == number + 1
        own = np.bincount(found.instance_ids[mask]).argmax()
        overlap = ((found.instance_ids == own) & mask).sum() / ((found.instance_ids == own) | mask).sum()
        assert own > 0
        assert overlap > 0.95
    assert len(found) == len(visible)


# The published profile.


def test_published_plateau_keeps_every_seed():
    maps = maps_from(["11111111"] * 8, [(0, 4, 1, 0.5), (0, 4, 6, 0.5)])
    found = group_instances(*maps, GroupingSpec(profile="paper"))
    assert drawn(found) == ["11112222"] * 8
    exact = group_instances(*maps, GroupingSpec())
    assert len(exact) == 1


def test_published_window_sees_one_part_only():
    maps = maps_from(["11111111011111111"] * 8, [(0, 4, 4, 0.5), (0, 4, 12, 0.9)])
    found = group_instances(*maps, GroupingSpec(profile="paper"))
    np.testing.assert_allclose(found.scores, [0.5 * 0.75, 0.9 * 0.75], rtol=1e-6)


def test_published_score_may_be_negative_and_is_kept():
    probs, heatmap, offsets = maps_from(["1" * 8] * 8)
    found = group_instances(probs, heatmap - 0.5, offsets, GroupingSpec(profile="paper"))
    np.testing.assert_allclose(found.scores, [-0.5 * 0.75])


def test_published_sinks_split_a_part_without_seeds():
    """Two sinks of 21 pixels; offsets elsewhere point at the nearer one."""
    width, sinks = 40, ((10, 10), (10, 30))
    probs, heatmap, offsets = maps_from(["1" * width] * 20)
    rows, columns = np.mgrid[:20, :width]
    target = np.where(columns < 20, 10, 30)
    offsets[0], offsets[1] = 10 - rows, target - columns
    for y, x in sinks:
        heatmap[0, y, x] = 0.08
    found = group_instances(probs, heatmap, offsets, GroupingSpec(profile="paper"))
    assert drawn(found) == ["1" * 20 + "2" * 20] * 20
    np.testing.assert_allclose(found.scores, [0.75, 0.75])  # sinks count as centers of value 1: the mean alone
    larger = offsets.copy()
    larger[:, 10, 33:36] = 0  # 24 pixels are no sink
    assert len(group_instances(probs, heatmap, larger, GroupingSpec(profile="paper"))) == 1
    larger[:, 10, 35] = 9
    assert len(group_instances(probs, heatmap, larger, GroupingSpec(profile="paper"))) == 2
    heatmap[0, 10, 30] = 0.05
    assert len(group_instances(probs, heatmap, offsets, GroupingSpec(profile="paper"))) == 1
    heatmap[0, 10, 10] = 0.5  # a real seed within 100 px keeps the sinks out
    heatmap[0, 10, 30] = 0.08
    assert len(group_instances(probs, heatmap, offsets, GroupingSpec(profile="paper"))) == 1


def test_published_empty_answer_has_one_empty_row():
    found = group_instances(*maps_from(["0" * 8] * 8), GroupingSpec(profile="paper"))
    assert (found.labels.tolist(), found.scores.tolist()) == ([0], [0.0])
    assert not found.instance_ids.any()


def test_published_part_of_min_area_is_kept():
    maps = maps_from(["1" * 10] * 5)
    assert drawn(group_instances(*maps, GroupingSpec(profile="paper", min_area=50))) == ["1" * 10] * 5
    assert not group_instances(*maps, GroupingSpec(profile="paper", min_area=51)).instance_ids.any()
