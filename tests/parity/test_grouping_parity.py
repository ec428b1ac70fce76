"""One specification, three placements: NumPy reference, torch twin and exported graph give the same instances."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the torch twin needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="running the graph needs the extra 'cpu'")

import torch
from cases import GroupingScene, grouping_scene

from cl4wsis.grouping import GroupingSpec, group_instances, group_maps
from cl4wsis.instances import Instances
from cl4wsis.metrics import overlap_matrix
from cl4wsis_export.fused import MapGrouping
from cl4wsis_export.graph import export_module, serialize
from cl4wsis_export.grouping import GroupingOutput, StaticGrouping
from cl4wsis_export.verify import open_session

SIDE, NUM_CLASSES, ROUNDS = 64, 4, 6
NUM_SCENES = 200
SPECS = {
    "exact": GroupingSpec(profile="exact", nms_kernel_size=9, min_area=12, max_instances=20),
    "fast": GroupingSpec(profile="fast", nms_kernel_size=41, min_area=50, max_instances=20),
}
PROFILES = pytest.mark.parametrize("profile", list(SPECS))

Outputs = dict[str, np.ndarray]


@cache
def scene(profile: str, seed: int) -> GroupingScene:
    return grouping_scene(
        seed,
        num_classes=NUM_CLASSES,
        height=SIDE,
        width=SIDE,
        num_instances=(0, 3, 8, 14, 30)[seed % 5],
        pseudo_fraction=(0.1, 0.6)[seed % 2],
        noise=(0.0, 0.2, 0.35)[seed % 3],
        stride=SPECS[profile].stride,
    )


def batch_of(profile: str, seeds: list[int]) -> list[np.ndarray]:
    scenes = [scene(profile, seed) for seed in seeds]
    return [np.stack([getattr(s, name) for s in scenes]) for name in ("semantic_probs", "center_heatmap", "offset_map")]


@cache
def twin(profile: str) -> StaticGrouping:
    return StaticGrouping(SPECS[profile], (SIDE, SIDE), ROUNDS).eval()


@cache
def session(profile: str) -> Any:
    examples = dict(
        zip(
            ("semantic_probs", "center_heatmap", "offset_map"),
            map(torch.from_numpy, batch_of(profile, [0, 1])),
            strict=True,
        )
    )
    model = export_module(twin(profile), examples, GroupingOutput._fields, opset=18)
    return open_session(serialize(model))


def run_twin(profile: str, seeds: list[int]) -> Outputs:
    with torch.inference_mode():
        return {
            k: v.numpy() for k, v in twin(profile)(*map(torch.from_numpy, batch_of(profile, seeds)))._asdict().items()
        }


def run_graph(profile: str, seeds: list[int]) -> Outputs:
    names = [value.name for value in session(profile).get_inputs()]
    arrays = session(profile).run(list(GroupingOutput._fields), dict(zip(names, batch_of(profile, seeds), strict=True)))
    return dict(zip(GroupingOutput._fields, arrays, strict=True))


def instances_of(outputs: Outputs, row: int) -> Instances:
    ids = outputs["instance_ids"][row].astype(np.int32)
    slots = Instances.from_ids(ids, outputs["labels"][row].astype(np.int32), outputs["scores"][row])
    return slots.select(outputs["areas"][row] > 0)


@cache
def answers(profile: str, run: Callable[[str, list[int]], Outputs]) -> Outputs:
    parts = [run(profile, list(range(start, start + 5))) for start in range(0, NUM_SCENES, 5)]
    return {name: np.concatenate([part[name] for part in parts]) for name in GroupingOutput._fields}


@PROFILES
def test_graph_and_torch_give_the_same_ids_on_every_scene(profile: str) -> None:
    graph, module = answers(profile, run_graph), answers(profile, run_twin)
    for name in ("instance_ids", "labels", "areas", "boxes"):
        np.testing.assert_array_equal(graph[name], module[name], err_msg=name)
    np.testing.assert_allclose(graph["scores"], module["scores"], atol=2e-6)


@PROFILES
@pytest.mark.parametrize("size", [1, 2])
def test_other_batch_sizes_give_the_same_ids(profile: str, size: int) -> None:
    expected = answers(profile, run_graph)
    for start in range(0, 20, size):
        seeds = list(range(start, start + size))
        found = run_graph(profile, seeds)
        for name in ("instance_ids", "labels", "areas", "boxes"):
            np.testing.assert_array_equal(found[name], expected[name][seeds], err_msg=name)
        np.testing.assert_allclose(found["scores"], expected["scores"][seeds], atol=2e-6)


@PROFILES
def test_graph_agrees_with_the_reference(profile: str) -> None:
    outputs = answers(profile, run_graph)
    total, matched, identical = 0, 0, 0
    for seed in range(NUM_SCENES):
        maps = scene(profile, seed)
        reference = group_instances(maps.semantic_probs, maps.center_heatmap, maps.offset_map, SPECS[profile])
        found = instances_of(outputs, seed)
        overlaps = overlap_matrix(found, reference)
        total += len(reference)
        matched += int(((overlaps > 0.99) & (found.labels[:, None] == reference.labels)).any(axis=0).sum())
        identical += np.array_equal(found.instance_ids, reference.instance_ids)
        if len(found) == len(reference):
            np.testing.assert_allclose(found.scores, reference.scores, atol=1e-5)
            np.testing.assert_array_equal(found.boxes, reference.boxes)
    assert total > 1000
    assert matched >= 0.995 * total, f"{matched} of {total} instances"
    assert identical >= 0.99 * NUM_SCENES, f"{identical} of {NUM_SCENES} id maps are identical"


@PROFILES
def test_boxes_and_areas_are_those_of_the_ids(profile: str) -> None:
    outputs = answers(profile, run_graph)
    for row in range(0, NUM_SCENES, 7):
        ids = outputs["instance_ids"][row].astype(np.int32)
        slots = Instances.from_ids(ids, outputs["labels"][row].astype(np.int32), outputs["scores"][row])
        np.testing.assert_array_equal(outputs["boxes"][row], slots.boxes)
        np.testing.assert_array_equal(outputs["areas"][row], slots.areas)


@PROFILES
def test_unused_slots_are_zero(profile: str) -> None:
    outputs = answers(profile, run_graph)
    unused = outputs["areas"] == 0
    assert unused.any()
    for name in ("labels", "scores", "boxes"):
        assert not outputs[name][unused].any(), name


@pytest.mark.parametrize("seed", range(20))
def test_objects_that_the_image_cuts_off_have_the_same_center(seed: int) -> None:
    """Beyond the outermost coarse pixels all values are equal, whatever weights a runtime gives to one and the same."""
    generator = np.random.default_rng(seed)
    heatmap = generator.uniform(0, 0.1, (1, 16, 16))
    along = generator.integers(3, 13, 4)
    rows, columns = np.array([0, 15, along[0], along[1]]), np.array([along[2], along[3], 0, 15])
    heatmap[0, rows, columns] = generator.uniform(0.3, 0.9, 4)
    logits = np.broadcast_to(np.array([-5.0, 5.0])[:, None, None], (2, 4, 4))
    maps = [array.astype(np.float32) for array in (logits, heatmap, generator.normal(0, 0.01, (2, 16, 16)))]
    spec = GroupingSpec(profile="exact", nms_kernel_size=9, min_area=1)
    reference = group_maps(*maps, (SIDE, SIDE), spec)
    assert len(reference) == 4
    with torch.inference_mode():
        found = MapGrouping(spec, (SIDE, SIDE), ROUNDS)(*(torch.from_numpy(array)[None] for array in maps))
    np.testing.assert_array_equal(found.instance_ids[0].numpy(), reference.instance_ids)
