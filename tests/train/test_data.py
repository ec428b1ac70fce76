import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch.nn import functional
from torch.utils.data import DataLoader

from cl4wsis.errors import DataError
from cl4wsis.geometry import fit_image
from cl4wsis.tasks import Plan
from cl4wsis_train.data import loading
from cl4wsis_train.data.batch import Batch, Sample, collate
from cl4wsis_train.data.loading import MaskedPictures, SeededSampler, build_fitted_loader, build_training_loader
from cl4wsis_train.data.splits import build_step_view, select_masked_pictures
from cl4wsis_train.data.transforms import Augmentation

STEPS = (("a", "b"), ("c",), ("d",))


def shapes_plan(num_train: int = 12, **fields: Any) -> Plan:
    """Three steps of drawn shapes, 64 px."""
    recipe = {"crop_size": 64, "input_size": [64, 64], "num_workers": 0} | fields.pop("recipe", {})
    data = {"kind": "shapes", "num_train": num_train, "num_val": 2, "image_size": 64}
    steps = [["disc", "square"], ["star"], ["ring", "cross"]]
    return Plan.model_validate({"name": "p", "steps": steps, "data": data, "recipe": recipe} | fields)


def table_plan(selection: str = "overlap", method: str = "cl4wsis", all_seen_labels: bool = False) -> Plan:
    tables = {"name": "p", "steps": STEPS, "data": {"kind": "shapes"}, "recipe": {"method": method}}
    return Plan.model_validate(tables | {"selection": selection, "all_seen_labels": all_seen_labels})


def write_coco(root: Path, tags_of: dict[str, list[str]]) -> dict[str, Any]:
    """Write 32x48 px images in which the i-th class of an image covers columns 10 i to 10 i + 9; return their plan."""
    names = sorted({name for tags in tags_of.values() for name in tags})
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for image_id, (file_name, tags) in enumerate(tags_of.items()):
        cv2.imwrite(str(root / "images" / file_name), np.full((32, 48, 3), image_id, np.uint8))
        images.append({"id": image_id, "file_name": file_name, "height": 32, "width": 48})
        for column, name in enumerate(tags):
            left, right = 10 * column, 10 * column + 10
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": names.index(name),
                    "bbox": [left, 0, 10, 32],
                    "segmentation": [[left, 0, right, 0, right, 32, left, 32]],
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(coco))
    (root / "tags.json").write_text(json.dumps(tags_of))
    source = {"images": "images", "instances": "instances.json", "tags": "tags.json"}
    data = {"kind": "coco", "root": root, "train": source, "val": source}
    recipe = {"crop_size": 64, "input_size": [64, 64], "num_workers": 0}
    return {"name": "p", "steps": STEPS, "data": data, "recipe": recipe}


def equal(first: Batch, second: Batch) -> bool:
    fields = ("images", "image_labels", "instance_ids", "labels", "void", "proposals")
    pairs = [(getattr(first, name), getattr(second, name)) for name in fields]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


# --- selection and visibility ---

# image -> classes in it; x belongs to no step
TABLE = {
    "a": {"a"},
    "ac": {"a", "c"},
    "b": {"b"},
    "bd": {"b", "d"},
    "c": {"c"},
    "cd": {"c", "d"},
    "ad": {"a", "d"},
    "x": {"x"},
    "cx": {"c", "x"},
    "none": set(),
}


@pytest.mark.parametrize(
    ("selection", "method", "step", "expected"),
    [
        ("overlap", "cl4wsis", 0, "a ac b bd ad"),
        ("overlap", "cl4wsis", 1, "ac c cd cx"),
        ("overlap", "cl4wsis", 2, "bd cd ad"),
        ("disjoint", "cl4wsis", 0, "a b"),
        ("disjoint", "cl4wsis", 1, "ac c cx"),
        ("disjoint", "cl4wsis", 2, "bd cd ad"),  # nothing comes later: the same images as under overlap
        ("overlap", "fine-tune", 1, "ac c cd cx"),
        ("overlap", "joint", 1, "a ac b bd c cd ad cx"),
        ("disjoint", "joint", 1, "a ac b c cx"),
        ("overlap", "joint", 2, "a ac b bd c cd ad cx"),
    ],
)
def test_images_of_a_step(selection: str, method: str, step: int, expected: str) -> None:
    plan = table_plan(selection, method)
    view = build_step_view(plan, step, "base" if step == 0 or method != "cl4wsis" else "semantic")
    assert [name for name, tags in TABLE.items() if view.selects(frozenset(tags))] == expected.split()


@pytest.mark.parametrize(
    ("method", "all_seen_labels", "step", "labels", "mask_names"),
    [
        ("cl4wsis", False, 0, [1, 0], ("a", "b")),
        ("cl4wsis", True, 0, [1, 0], ("a", "b")),
        ("cl4wsis", False, 1, [0, 0, 1], ()),
        ("cl4wsis", True, 1, [1, 0, 1], ()),  # the future class d stays hidden
        ("cl4wsis", False, 2, [0, 0, 0, 1], ()),
        ("cl4wsis", True, 2, [1, 0, 1, 1], ()),
        ("fine-tune", False, 1, [0, 0, 1], ("c",)),
        ("joint", False, 1, [1, 0, 1], ("a", "b", "c")),
    ],
)
def test_what_a_step_sees_of_an_image(
    method: str, all_seen_labels: bool, step: int, labels: list[int], mask_names: Sequence[str]
) -> None:
    plan = table_plan("overlap", method, all_seen_labels)
    view = build_step_view(plan, step, "base" if mask_names else "instance")
    found = view.image_labels(frozenset({"a", "c", "d", "x"}))
    assert found.tolist() == labels
    assert found.dtype == np.float32
    assert view.mask_names == mask_names


@pytest.mark.parametrize(
    ("method", "step", "phase"),
    [("cl4wsis", 1, "base"), ("cl4wsis", 0, "semantic"), ("joint", 1, "instance"), ("fine-tune", 1, "semantic")],
)
def test_phase_that_does_not_exist_is_refused(method: str, step: int, phase: Any) -> None:
    with pytest.raises(ValueError, match=f"step {step} of plan 'p' with method '{method}' has no phase '{phase}'"):
        build_step_view(table_plan(method=method), step, phase)


# --- loading from files ---

FILES = {
    "0.png": ["a", "c"],
    "1.png": ["b"],
    "2.png": ["c", "d", "a"],
    "3.png": ["d"],
    "4.png": ["b", "b"],
    "5.png": [],
}


def test_base_step_shows_masks_and_tags_of_its_classes_only(tmp_path: Path) -> None:
    plan = Plan.model_validate(write_coco(tmp_path, FILES))
    (batch,) = build_training_loader(plan, 0, "base", batch_size=4, seed=0)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.instance_ids is not None
    assert batch.labels is not None
    assert batch.instance_ids.shape == (4, 64, 64)
    assert batch.instance_ids.dtype == torch.int32
    assert batch.labels.dtype == torch.int64
    found = {
        int(image.max()): (tags.tolist(), labels.tolist())
        for image, tags, labels in zip(batch.images, batch.image_labels, batch.labels, strict=True)
    }
    assert found == {
        0: ([1, 0], [0, -1]),
        1: ([0, 1], [1, -1]),
        2: ([1, 0], [0, -1]),
        4: ([0, 1], [1, 1]),
    }
    assert batch.instance_ids.amax(dim=(1, 2)).le((batch.labels >= 0).sum(dim=1)).all()


def test_supervised_baselines_number_labels_over_all_seen_classes(tmp_path: Path) -> None:
    tables = write_coco(tmp_path, {"0.png": ["c"], "1.png": ["d", "c", "a"], "2.png": ["b"]})

    def labels_of(method: str) -> list[list[int]]:
        plan = Plan.model_validate(tables | {"recipe": tables["recipe"] | {"method": method}})
        (batch,) = build_training_loader(plan, 1, "base", batch_size=3 if method == "joint" else 2, seed=0)
        assert batch.labels is not None
        return sorted(batch.labels.tolist())

    assert labels_of("fine-tune") == [[2], [2]]
    assert labels_of("joint") == [[1, -1], [2, -1], [2, 0]]


@pytest.mark.parametrize("phase", ["semantic", "instance"])
def test_later_step_works_without_the_instances_file(tmp_path: Path, phase: Any) -> None:
    plan = Plan.model_validate(write_coco(tmp_path, FILES))
    (tmp_path / "instances.json").write_text("poison")
    loader = build_training_loader(plan, 1, phase, batch_size=2, seed=0)
    (batch,) = loader
    assert batch.instance_ids is None
    assert batch.labels is None
    assert batch.image_labels.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert sorted(batch.images.amax(dim=(1, 2, 3)).tolist()) == [0, 2]
    with pytest.raises(DataError, match=r"instances\.json"):
        build_training_loader(plan, 0, "base", batch_size=2, seed=0)


def test_void_follows_the_image_and_is_no_instance(tmp_path: Path) -> None:
    tables = write_coco(tmp_path, {"0.png": ["a"], "1.png": ["b"]})
    coco = json.loads((tmp_path / "instances.json").read_text())
    # A crowd of class a covers the right half of the first image, one of a class yet to come that of the second.
    names = {category["name"]: category["id"] for category in coco["categories"]} | {"c": 7}
    coco["categories"].append({"id": 7, "name": "c"})
    right_half = [[24, 0, 48, 0, 48, 32, 24, 32]]
    for image_id, name in ((0, "a"), (1, "c")):
        crowd = {"image_id": image_id, "category_id": names[name], "segmentation": right_half, "iscrowd": 1}
        coco["annotations"].append(crowd)
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    plan = Plan.model_validate(tables | {"steps": (("a", "b"), ("c",))})
    for seed in range(3):
        (batch,) = build_training_loader(plan, 0, "base", batch_size=2, seed=seed)
        assert batch.void is not None
        assert batch.instance_ids is not None
        assert batch.void.dtype == torch.bool
        assert batch.void.shape == batch.instance_ids.shape
        assert batch.instance_ids.min() == 0
        crowded, plain = (int(i) for i in batch.image_labels[:, 1].sort(stable=True).indices)
        assert 0.2 < batch.void[crowded].float().mean() < 0.8
        assert not batch.void[plain].any()
        assert not (batch.instance_ids[batch.void] > 0).any()
        columns = batch.void[crowded].any(dim=0)
        assert columns[0] != columns[-1]  # one side of the crop, mirrored or not


def test_batches_without_void_have_none(tmp_path: Path) -> None:
    plan = Plan.model_validate(write_coco(tmp_path, FILES))
    (batch,) = build_training_loader(plan, 0, "base", batch_size=4, seed=0)
    assert batch.void is None
    assert batch.proposals is None


def write_proposals(folder: Path, names: Sequence[str]) -> None:
    """Propose the left half of each image, and in front of it a small square."""
    folder.mkdir(parents=True)
    half, square = [[0, 0, 24, 0, 24, 32, 0, 32]], [[4, 4, 16, 4, 16, 16, 4, 16]]
    for name in names:
        found = [{"segmentation": square, "score": 0.9}, {"segmentation": half, "score": 0.4}]
        (folder / f"{Path(name).stem}.json").write_text(json.dumps(found))


def test_proposals_follow_the_image_in_weak_steps_alone(tmp_path: Path) -> None:
    tables = write_coco(tmp_path, FILES)
    for file_name in FILES:  # bright where the half is proposed, brighter where the square is
        image = np.zeros((32, 48, 3), np.uint8)
        image[:, :24], image[4:16, 4:16] = 100, 200
        cv2.imwrite(str(tmp_path / "images" / file_name), image)
    write_proposals(tmp_path / "proposals", list(FILES))
    plan = Plan.model_validate(tables | {"data": tables["data"] | {"proposals": "proposals"}})
    flips = set()
    for seed in range(4):
        (batch,) = build_training_loader(plan, 1, "semantic", batch_size=2, seed=seed)
        assert batch.instance_ids is None
        assert batch.proposals is not None
        assert batch.proposals.dtype == torch.int32
        assert batch.proposals.shape == (2, 64, 64)
        shown = torch.tensor([0, 200, 100])[batch.proposals.long()]
        blurred = functional.avg_pool2d(shown.float()[:, None], 5, stride=1, padding=2)[:, 0]
        inside = blurred == shown  # no edge within two pixels
        assert inside.float().mean() > 0.3
        assert torch.equal(batch.images[:, 0].int()[inside], shown.int()[inside])
        flips |= {bool(ids[:, 0].any()) for ids in batch.proposals}
    assert flips == {True, False}
    (batch,) = build_training_loader(plan, 0, "base", batch_size=4, seed=0)
    assert batch.proposals is None


def test_drawn_shapes_can_have_proposals(tmp_path: Path) -> None:
    plan = shapes_plan(4)
    with_folder = plan.model_copy(update={"data": plan.data.model_copy(update={"proposals": tmp_path})})
    (tmp_path / "step-1").mkdir()
    for index in range(4):
        found = [{"segmentation": [[0, 0, 64, 0, 64, 64, 0, 64]], "score": 1.0}]
        (tmp_path / "step-1" / f"{index:05d}.json").write_text(json.dumps(found))
    (batch,) = build_training_loader(with_folder, 1, "instance", batch_size=4, seed=0)
    assert batch.proposals is not None
    assert (batch.proposals == 1).all()


def test_missing_proposals_are_named(tmp_path: Path) -> None:
    tables = write_coco(tmp_path, FILES)
    plan = Plan.model_validate(tables | {"data": tables["data"] | {"proposals": "proposals"}})
    with pytest.raises(DataError, match=r"proposals/0\.json: cannot be read"):
        build_training_loader(plan, 1, "semantic", batch_size=2, seed=0)


def test_tags_of_old_classes_are_given_on_request(tmp_path: Path) -> None:
    plan = Plan.model_validate(write_coco(tmp_path, FILES) | {"all_seen_labels": True})
    (batch,) = build_training_loader(plan, 2, "semantic", batch_size=2, seed=0)
    assert sorted(batch.image_labels.tolist()) == [[0, 0, 0, 1], [1, 0, 1, 1]]


def test_step_without_images_is_explained(tmp_path: Path) -> None:
    tables = write_coco(tmp_path, {"0.png": ["a", "b", "d"], "1.png": ["c", "d"]})
    plan = Plan.model_validate(tables | {"selection": "disjoint"})
    with pytest.raises(DataError, match=r"none of 2 images belongs to step 1 under 'disjoint' .* c and none of d"):
        build_training_loader(plan, 1, "semantic", batch_size=2, seed=0)


def test_large_sets_are_decoded_on_demand_with_equal_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.model_validate(write_coco(tmp_path, FILES))
    cached = build_training_loader(plan, 0, "base", batch_size=4, seed=3)
    monkeypatch.setattr(loading, "_CACHE_BYTES", 0)
    on_demand = build_training_loader(plan, 0, "base", batch_size=4, seed=3)
    assert all(equal(a, b) for a, b in zip(cached, on_demand, strict=True))
    (tmp_path / "images" / "1.png").unlink()
    assert len(list(cached)) == 1
    with pytest.raises(DataError, match=r"1\.png: cannot be read"):
        list(on_demand)


# --- loader ---


def test_equal_seeds_give_equal_batches_and_epochs_differ() -> None:
    plan = shapes_plan()
    first = build_training_loader(plan, 0, "base", batch_size=4, seed=5)
    again = build_training_loader(plan, 0, "base", batch_size=4, seed=5)
    other = build_training_loader(plan, 0, "base", batch_size=4, seed=6)
    epochs = [list(first), list(first)]
    for epoch in epochs:
        assert all(equal(a, b) for a, b in zip(epoch, again, strict=True))
    assert not any(equal(a, b) for a, b in zip(*epochs, strict=True))
    assert not any(equal(a, b) for a, b in zip(epochs[0], other, strict=True))


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    alone = build_training_loader(shapes_plan(), 0, "base", batch_size=4, seed=5)
    shared = build_training_loader(shapes_plan(recipe={"num_workers": 2}), 0, "base", batch_size=4, seed=5)
    assert shared.num_workers == 2
    passes = []
    for seed in (5, 5, 11):  # the second 5 is not a new seed, and so a second pass
        alone.generator.manual_seed(seed)
        shared.generator.manual_seed(seed)
        passes.append(list(alone))
        assert all(equal(a, b) for a, b in zip(passes[-1], shared, strict=True))
    assert not equal(passes[0][0], passes[1][0])


def test_loading_neither_uses_nor_moves_the_global_generator() -> None:
    loader = build_training_loader(shapes_plan(), 0, "base", batch_size=4, seed=5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    batches = list(loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_training_loader(shapes_plan(), 0, "base", batch_size=4, seed=5)
    assert all(equal(a, b) for a, b in zip(batches, again, strict=True))


def test_an_epoch_can_be_repeated_by_its_seed() -> None:
    straight = build_training_loader(shapes_plan(), 0, "base", batch_size=4, seed=5)
    resumed = build_training_loader(shapes_plan(), 0, "base", batch_size=4, seed=5)
    for seed in (100, 101, 102):
        straight.generator.manual_seed(seed)
        expected = list(straight)
    resumed.generator.manual_seed(102)
    assert all(equal(a, b) for a, b in zip(expected, resumed, strict=True))


@pytest.mark.parametrize(("num_train", "batch_size", "num_batches"), [(12, 5, 2), (12, 12, 1), (3, 8, 1)])
def test_incomplete_batches_are_dropped_but_never_all(num_train: int, batch_size: int, num_batches: int) -> None:
    loader = build_training_loader(shapes_plan(num_train), 0, "base", batch_size, seed=0)
    batches = list(loader)
    assert len(loader) == len(batches) == num_batches
    assert all(len(batch.images) == batch_size for batch in batches)


def test_a_pass_shows_every_image_once() -> None:
    sampler = SeededSampler(10, 4, torch.Generator().manual_seed(0))
    for _ in range(2):
        assert sorted(index for index, _ in sampler) == list(range(10))
    repeated = [index for index, _ in SeededSampler(3, 8, torch.Generator().manual_seed(0))]
    assert sorted(repeated[:3]) == sorted(repeated[3:6]) == [0, 1, 2]
    assert len(set(SeededSampler(3, 8, torch.Generator().manual_seed(0)))) == 8  # each with another seed


def test_processes_share_a_pass() -> None:
    def draws(rank: int) -> list[Any]:
        sampler = SeededSampler(10, 4, torch.Generator().manual_seed(0))
        return list(DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank))

    assert sorted(draws(0) + draws(1)) == sorted(SeededSampler(10, 4, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_drawn_shapes_load_in_every_step(step: int) -> None:
    plan = shapes_plan()
    loader = build_training_loader(plan, step, "base" if step == 0 else "semantic", batch_size=4, seed=0)
    split = plan.split(step)
    for batch in loader:
        assert batch.image_labels.shape == (4, split.num_classes)
        assert (batch.image_labels[:, split.center_new].sum(dim=1) >= 1).all()
        assert not batch.image_labels[:, split.center_old].any()
        assert (batch.instance_ids is not None) == (step == 0)


def test_joint_training_draws_the_pictures_of_all_steps() -> None:
    loader = build_training_loader(shapes_plan(8, recipe={"method": "joint"}), 2, "base", batch_size=24, seed=0)
    (batch,) = loader
    assert batch.labels is not None
    assert set(batch.labels.unique().tolist()) == {-1, 0, 1, 2, 3, 4}


def test_loader_is_a_plain_data_loader() -> None:
    loader = build_training_loader(shapes_plan(), 0, "base", batch_size=4, seed=0)
    assert type(loader) is DataLoader


# --- batch ---


def make_samples() -> Iterator[Sample]:
    for count in (1, 3):
        labels = torch.arange(count)
        yield Sample(
            torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(2), torch.zeros(4, 4, dtype=torch.int32), labels
        )


def test_labels_are_padded() -> None:
    batch = collate(list(make_samples()))
    assert batch.labels is not None
    assert batch.labels.tolist() == [[0, -1, -1], [0, 1, 2]]


def test_batch_moves_as_a_whole() -> None:
    batch = collate(list(make_samples())).to("meta")
    assert batch.images.is_meta
    assert batch.instance_ids is not None
    assert batch.instance_ids.is_meta
    weak = Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2)).to("meta")
    assert weak.image_labels.is_meta
    assert weak.instance_ids is None


# --- augmentation ---


def test_ids_follow_the_image() -> None:
    """An image that shows its own id map keeps doing so, but for the pixels blended along edges."""
    ids = np.zeros((90, 120), np.int32)
    ids[10:50, 20:70] = 1
    ids[40:80, 60:110] = 2
    image = np.repeat((ids * 100).astype(np.uint8)[..., None], 3, axis=2)
    augmentation = Augmentation(64, (0.5, 2.0))
    outcomes = set()
    for seed in range(30):
        new_image, new_ids = augmentation(image, ids, seed)
        assert new_ids is not None
        assert new_ids.dtype == torch.int32
        numbers = new_ids.float()[None]
        highest = functional.max_pool2d(numbers, 5, stride=1, padding=2)
        lowest = -functional.max_pool2d(-numbers, 5, stride=1, padding=2)
        inside = (highest == lowest)[0]  # no other id within two pixels
        assert inside.float().mean() > 0.5
        assert torch.equal(new_image[0].int()[inside], 100 * new_ids[inside])
        outcomes.add(new_ids.numpy().tobytes())
    assert len(outcomes) >= 25  # a few take the whole image, for want of a crop that fits


def test_resized_ids_keep_to_pixel_centers() -> None:
    """On a ramp the nearest pixel's value is the interpolated one, rounded; half a pixel beside it would show."""
    ramp = np.tile(np.arange(128, dtype=np.int32), (128, 1))
    image = np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2)
    augmentation = Augmentation(96, (0.5, 1.0))
    for seed in range(12):
        new_image, new_ids = augmentation(image, ramp, seed)
        assert new_ids is not None
        inner = slice(3, -3)
        assert abs(float((new_ids - new_image[0].int())[:, inner].float().mean())) < 0.05


def test_half_of_the_images_are_mirrored() -> None:
    ramp = np.repeat(np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))[..., None], 3, axis=2)
    augmentation = Augmentation(64, (0.5, 2.0))
    mirrored = 0
    for seed in range(200):
        image, _ = augmentation(ramp, None, seed)
        mirrored += int(image[0, 0, 0]) > int(image[0, 0, -1])
    assert 75 <= mirrored <= 125  # 3.5 standard deviations


def test_crops_keep_to_the_area_and_aspect_published() -> None:
    """Areas above the image's own never fit, so crops cover half of it or more; the rest falls back to the center."""
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)
    augmentation = Augmentation(64, (0.5, 2.0))
    areas, aspects = [], []
    for seed in range(100):
        new_image, _ = augmentation(image, None, seed)
        height, width = (float(np.ptp(channel.numpy())) * 64 / 63 for channel in new_image[:2].int())
        areas.append(height * width / 200**2)
        aspects.append(width / height)
    assert 0.47 < min(areas) < 0.6
    assert max(areas) <= 1.02
    assert min(aspects) > 0.72
    assert max(aspects) < 1.39


def test_whole_image_is_taken_when_no_crop_fits() -> None:
    ids = np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    image = np.zeros((64, 64, 3), np.uint8)
    _, new_ids = Augmentation(64, (1.9, 2.0))(image, ids, seed=0)
    assert new_ids is not None
    expected = torch.from_numpy(ids)
    assert torch.equal(new_ids, expected) or torch.equal(new_ids, expected.flip(1))


def test_fitted_images_are_those_of_deployment_and_all_are_there() -> None:
    plan, padding = shapes_plan(10, recipe={"input_size": [64, 96]}), [10, 20, 30]
    batches = list(build_fitted_loader(plan, 0, "base", 4, padding))
    assert [len(batch.images) for batch in batches] == [4, 4, 2]
    view = build_step_view(plan, 0, "base")
    pictures = MaskedPictures(select_masked_pictures(plan, 0, view), view)
    for index in range(10):
        batch, picture = batches[index // 4], pictures[index]
        frame, transform = fit_image(picture.image, (64, 96), padding)
        assert np.array_equal(batch.images[index % 4].permute(1, 2, 0), frame)
        assert picture.instance_ids is not None
        assert batch.instance_ids is not None
        assert np.array_equal(batch.instance_ids[index % 4], transform.fit_ids(picture.instance_ids))


def test_fitted_images_of_later_steps_have_tags_alone() -> None:
    batch = next(iter(build_fitted_loader(shapes_plan(), 1, "semantic", 4, [0, 0, 0])))
    assert (batch.instance_ids, batch.labels) == (None, None)
    assert batch.image_labels.any(1).all()
