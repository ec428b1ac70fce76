"""Every plan that comes with the package, on generated data in the layout it expects.

Each loads, passes ``check_plan``, counts as its name says, and trains two iterations of every phase with its own
recipe; only sizes, and what a CPU cannot do, are made small.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from layouts import Objects, Split, write_coco, write_picture, write_sbd, write_voc
from torch import nn

from cl4wsis.config import config_folder
from cl4wsis.datasets import VOC_CLASSES, check_plan, check_sources, load_evaluation_set
from cl4wsis.recipe import OptimizerSettings
from cl4wsis.tasks import FileData, Plan, load_plan
from cl4wsis_train.data.loading import build_training_loader
from cl4wsis_train.data.splits import PhaseName
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.optim import build_optimizer
from cl4wsis_train.phases.base import BasePhase
from cl4wsis_train.phases.common import Phase
from cl4wsis_train.phases.instance import InstancePhase
from cl4wsis_train.phases.semantic import SemanticPhase

BATCH_SIZE = 2
SMALL = (
    "recipe.crop_size=64",
    "recipe.input_size=[64, 64]",
    "recipe.precision=32-true",
    "recipe.num_workers=0",
    "recipe.network.encoder=test_efficientnet",
    "recipe.network.weights=none",
    "recipe.network.semantic_channels=8",
    "recipe.network.instance_channels=8",
    "recipe.network.decoder_channels=8",
    "recipe.network.localizer_channels=8",
    *(f"recipe.{phase}.batch_size={BATCH_SIZE}" for phase in ("base", "semantic", "instance")),
)
SMALL_SHAPES = ("data.num_train=8", "data.num_val=4", "data.image_size=64")


def shipped_plans() -> list[str]:
    folder = config_folder()
    files = (path for path in folder.rglob("*.toml") if path.stem != "base" and path.parent.name != "presets")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in files)


def pictures_of(names: tuple[str, ...], prefix: str, solos: int = 3) -> Split:
    """Show each class alone a few times, and once beside the next one in the list."""
    left, right = (4, 4, 30, 40), (34, 8, 60, 44)
    pictures: dict[str, Objects] = {
        f"{prefix}_{index:02d}{copy}": [(name, left)] for index, name in enumerate(names) for copy in range(solos)
    }
    for index, (name, following) in enumerate(itertools.pairwise(names)):
        pictures[f"{prefix}_{index:02d}pair"] = [(name, left), (following, right)]
    return pictures


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold data/VOC2012, data/sbd, data/coco and data/animals7, as far as the plans go."""
    pytest.importorskip("scipy")
    root = tmp_path_factory.mktemp("data")
    train, val = pictures_of(VOC_CLASSES, "train"), pictures_of(VOC_CLASSES, "val", solos=1)
    write_sbd(root / "sbd", {"train": train, "val": val})
    write_voc(root / "VOC2012", {"train_aug": train}, "SegmentationClassAug", "SegmentationObjectAug")
    write_voc(root / "VOC2012", {"val": val})
    write_coco_2017(root / "coco")
    write_animals(root / "animals7")
    return root


def write_coco_2017(root: Path) -> None:
    names = load_plan("coco_voc/coco-voc").class_names
    categories = dict(enumerate(names, start=1))
    for split in ("train2017", "val2017"):
        file = root / "annotations" / f"instances_{split}.json"
        write_coco(root / split, file, pictures_of(names, split, solos=1), categories)


def write_animals(root: Path) -> None:
    names = load_plan("animals7/4-3").class_names
    categories = dict(enumerate(names, start=1))
    for split in ("train", "val"):
        pictures = pictures_of(names, split)
        annotations = root / "annotations"
        write_coco(root / "images" / split, annotations / f"instances_{split}.json", pictures, categories)
        tags = {f"{name}.jpg": [label for label, _ in objects] for name, objects in pictures.items()}
        (annotations / f"image_labels_{split}.json").write_text(json.dumps(tags))


def small_plan(name: str, root: Path) -> Plan:
    plan = load_plan(name)
    if not isinstance(plan.data, FileData):
        return load_plan(name, [*SMALL, *SMALL_SHAPES])
    assert plan.data.root.parts[0] == "data"
    return load_plan(name, [*SMALL, f"data.root={root.joinpath(*plan.data.root.parts[1:])}"])


def expected_images(plan: Plan, step: int) -> int:
    """Count the pictures of :func:`pictures_of` that belong to a step, by the position of its classes in the list."""
    order = plan.class_names if plan.name.startswith(("animals7", "coco")) else VOC_CLASSES
    split = plan.split(step)
    later = set(plan.class_names) - set(split.seen_names) if plan.selection == "disjoint" else set()
    solos = 1 if plan.name.startswith("coco") and step == 0 else 3
    if plan.name.startswith("coco") and step == 1:
        return 20 * 3 + 19  # the whole of VOC
    pairs = [set(pair) for pair in itertools.pairwise(order)]
    new = set(split.new_names)
    return solos * len(new) + sum(bool(pair & new) and not pair & later for pair in pairs)


@pytest.mark.parametrize("name", shipped_plans())
def test_plan_finds_its_data_and_counts_it(name: str, data_root: Path) -> None:
    plan = small_plan(name, data_root)
    if name == "coco_voc/on-voc":
        assert len(load_evaluation_set(plan, 1)) == 39
        assert str(check_sources(plan, 1)).startswith("step 1 learns from tags of 79 of 79 images: person 5,")
        return
    report = check_plan(plan)
    assert not report.is_broken, report.findings
    assert [summary.learns_from for summary in report.steps] == ["masks"] + ["tags"] * (plan.num_steps - 1)
    assert [tuple(c.name for c in summary.classes) for summary in report.steps] == list(plan.steps)
    if plan.data.kind != "shapes":
        assert [summary.images for summary in report.steps] == [expected_images(plan, s) for s in range(plan.num_steps)]
    print(*report.steps, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in shipped_plans() if name != "coco_voc/on-voc"])
def test_plan_trains_two_iterations_of_every_phase(name: str, data_root: Path) -> None:
    plan = small_plan(name, data_root)
    torch.manual_seed(0)
    network = InstanceSegmenter(plan.recipe.network, (len(plan.steps[0]),))
    losses = run(plan, 0, "base", BasePhase(network, plan.recipe), plan.recipe.base.optimizer)
    assert set(losses) == {"semantic", "center", "offset"}
    if plan.num_steps == 1:
        return
    step = plan.num_steps - 1  # the last: it has the most old classes
    old_network = InstanceSegmenter(plan.recipe.network, tuple(len(names) for names in plan.steps[:step]))
    network = InstanceSegmenter(plan.recipe.network, tuple(len(names) for names in plan.steps))
    network.load_previous(old_network.state_dict())
    semantic = SemanticPhase(network, old_network, plan.recipe, plan.split(step), plan.all_seen_labels)
    assert "semantic" in run(plan, step, "semantic", semantic, plan.recipe.semantic.optimizer)
    instance = InstancePhase(semantic, plan.recipe, plan.all_seen_labels)
    losses = run(plan, step, "instance", instance, plan.recipe.instance.optimizer)
    assert {"center_old", "center_new", "offset_old", "offset_new"} <= set(losses)


def run(plan: Plan, step: int, phase_name: PhaseName, phase: Phase, settings: OptimizerSettings) -> dict[str, float]:
    """Train two iterations after the warm-up; return the last losses."""
    loader = build_training_loader(plan, step, phase_name, BATCH_SIZE, seed=0)
    phase.train()
    encoder = list(phase.network.encoder.parameters())
    known = set(map(id, encoder))
    heads = [parameter for parameter in phase.parameters() if id(parameter) not in known]
    optimizer = build_optimizer(settings, encoder, heads)
    before = [parameter.detach().clone() for parameter in _trained(phase)]
    losses: dict[str, torch.Tensor] = {}
    for batch in itertools.islice(itertools.cycle(loader), 2):
        losses = phase(batch, settings.warmup_epochs)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    values = {name: loss.item() for name, loss in losses.items()}
    assert all(value == value and abs(value) < float("inf") for value in values.values())
    if phase_name != "instance":  # an untrained network may see no region to learn centers in
        assert any(not torch.equal(a, b) for a, b in zip(before, _trained(phase), strict=True))
    return values


def _trained(phase: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in phase.parameters() if parameter.requires_grad]


def test_names_of_voc_become_those_of_coco_at_the_same_place() -> None:
    """COCO category ids of VOC classes 1 to 20, as published."""
    published = (5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
    plan = load_plan("coco_voc/coco-voc")
    rename = plan.data.steps[1].rename  # type: ignore[union-attr]
    order = [rename.get(name, name) for _, name in sorted(zip(published, VOC_CLASSES, strict=True))]
    assert order == list(plan.steps[1])


def test_pictures_are_written_with_their_objects(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", [("cat", (0, 0, 30, 30))])
    assert (tmp_path / "a.jpg").stat().st_size > 500
