"""Grouping straight from the network's maps: the same answer as enlarging everything first."""

import numpy as np
import pytest
from cases import NetworkScene, network_scene
from hypothesis import given, settings
from hypothesis import strategies as st

from cl4wsis.grouping import GroupingSpec, group_instances, group_maps
from cl4wsis.instances import Instances

PROFILES = pytest.mark.parametrize("profile", ["exact", "fast", "paper"])


def enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation at half-pixel centers, clamped at the border, spelled out in float64."""
    for axis, length in ((1, size[0]), (2, size[1])):
        count = maps.shape[axis]
        position = np.clip((np.arange(length) + 0.5) * count / length - 0.5, 0, count - 1)
        before = np.floor(position).astype(int)
        after = np.minimum(before + 1, count - 1)
        weight = (position - before).reshape([-1 if i == axis else 1 for i in range(3)])
        maps = maps.take(before, axis) * (1 - weight) + maps.take(after, axis) * weight
    return maps


def plain(scene: NetworkScene, spec: GroupingSpec) -> Instances:
    grid = tuple(side // spec.stride for side in scene.input_size)
    logits, heatmap, offsets = (
        enlarged(maps, grid) for maps in (scene.semantic_logits, scene.center_heatmap, scene.offset_map)
    )
    exponentials = np.exp(logits - logits.max(axis=0))
    return group_instances(exponentials / exponentials.sum(axis=0), heatmap, offsets, spec)


def fast_path(scene: NetworkScene, spec: GroupingSpec) -> Instances:
    return group_maps(scene.semantic_logits, scene.center_heatmap, scene.offset_map, scene.input_size, spec)


def assert_same(found: Instances, expected: Instances) -> None:
    assert (found.instance_ids != expected.instance_ids).mean() <= 0.001
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1)


@PROFILES
@pytest.mark.parametrize("semantic_stride", [4, 8, 16])
@pytest.mark.parametrize(("seed", "instances", "noise"), [(0, 0, 0.0), (1, 6, 0.0), (2, 10, 0.1), (3, 25, 0.25)])
def test_drawn_scenes(profile: str, semantic_stride: int, seed: int, instances: int, noise: float) -> None:
    scene = network_scene(seed, 5, 192, 256, instances, noise, semantic_stride)
    spec = GroupingSpec(profile=profile)
    expected = plain(scene, spec)
    assert bool(len(expected)) == (instances > 0 or profile == "paper")
    assert_same(fast_path(scene, spec), expected)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    profile=st.sampled_from(["exact", "fast"]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    classes=st.sampled_from([1, 3, 20]),
    scale=st.sampled_from([1.0, 6.0, 60.0]),
)
def test_random_maps(seed: int, profile: str, rows: int, columns: int, classes: int, scale: float) -> None:
    """Noise of any strength, with classes, borders and peaks everywhere."""
    generator = np.random.default_rng(seed)
    scene = NetworkScene(
        semantic_logits=generator.normal(0, scale, (classes + 1, 2 * rows, 2 * columns)).astype(np.float32),
        center_heatmap=generator.normal(0, 0.3, (classes, 8 * rows, 8 * columns)).astype(np.float32),
        offset_map=generator.normal(0, 9, (2, 8 * rows, 8 * columns)).astype(np.float32),
        input_size=(32 * rows, 32 * columns),
    )
    spec = GroupingSpec(profile=profile, nms_kernel_size=13, min_area=20)
    assert_same(fast_path(scene, spec), plain(scene, spec))


@PROFILES
def test_maps_on_the_grid_already_are_taken_as_they_are(profile: str) -> None:
    spec = GroupingSpec(profile=profile, min_area=10)
    small = network_scene(4, 3, 64, 96, 5)
    grid = (64 // spec.stride, 96 // spec.stride)
    maps = [enlarged(m, grid) for m in (small.semantic_logits, small.center_heatmap, small.offset_map)]
    scene = NetworkScene(*(m.astype(np.float32) for m in maps), input_size=(64, 96))
    assert_same(fast_path(scene, spec), plain(scene, spec))


@PROFILES
def test_half_precision_maps_and_views_are_welcome(profile: str) -> None:
    scene = network_scene(5, 3, 64, 96, 5)
    halves = NetworkScene(
        *(m.astype(np.float16) for m in (scene.semantic_logits, scene.center_heatmap, scene.offset_map)), (64, 96)
    )
    spec = GroupingSpec(profile=profile)
    assert_same(fast_path(halves, spec), plain(halves, spec))
    batch = np.stack([scene.semantic_logits] * 2).transpose(0, 2, 3, 1)[1].transpose(2, 0, 1)
    found = group_maps(batch, scene.center_heatmap, scene.offset_map, (64, 96), spec)
    np.testing.assert_array_equal(found.instance_ids, fast_path(scene, spec).instance_ids)


def test_more_classes_than_a_byte_counts() -> None:
    scene = network_scene(7, 300, 64, 64, 5)
    spec = GroupingSpec(min_area=10)
    expected = plain(scene, spec)
    assert expected.labels.max() > 255
    assert_same(fast_path(scene, spec), expected)


@pytest.mark.parametrize(
    ("shapes", "size", "message"),
    [
        (((3, 4, 4), (3, 16, 16), (2, 16, 16)), (64, 64), r"center_heatmap must be \(2, h, w\)"),
        (((3, 4, 4), (2, 16, 16), (1, 16, 16)), (64, 64), r"offset_map must be \(2, h, w\)"),
        (((1, 4, 4), (0, 16, 16), (2, 16, 16)), (64, 64), "C >= 2"),
        (((1, 3, 4, 4), (2, 16, 16), (2, 16, 16)), (64, 64), "one image"),
        (((3, 4, 4), (2, 16, 16), (2, 16, 16)), (64, 72), r"semantic_logits of size \(4, 4\) cannot be enlarged"),
        (((3, 4, 4), (2, 15, 16), (2, 16, 16)), (64, 64), r"center_heatmap of size \(15, 16\) cannot"),
        (((3, 4, 4), (2, 16, 16), (2, 8, 16)), (64, 64), r"offset_map of size \(8, 16\) cannot be enlarged"),
        (((3, 128, 128), (2, 16, 16), (2, 16, 16)), (64, 64), r"semantic_logits of size \(128, 128\) cannot"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    shapes: tuple[tuple[int, ...], ...], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_maps(*(np.zeros(shape, np.float32) for shape in shapes), size, GroupingSpec())
