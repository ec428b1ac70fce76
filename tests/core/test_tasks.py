"""Plans and class splits."""

from pathlib import Path

import pytest

from cl4wsis.config import build_settings, config_folder, merge, parse_overrides
from cl4wsis.errors import ConfigError
from cl4wsis.tasks import ClassSplit, FileData, Plan, SbdSource, ShapesData, class_color, load_plan

TABLES = {"name": "pets", "steps": [["cat", "dog", "owl"], ["cow"], ["bat", "elk"]], "data": {"kind": "shapes"}}


def plan(*overrides: str) -> Plan:
    return build_settings(Plan, merge(TABLES, parse_overrides(overrides)), "pets.toml")


@pytest.mark.parametrize(
    ("step", "old", "new", "semantic_old", "semantic_new"),
    [
        (0, (), ("cat", "dog", "owl"), [0], [1, 2, 3]),
        (1, ("cat", "dog", "owl"), ("cow",), [0, 1, 2, 3], [4]),
        (2, ("cat", "dog", "owl", "cow"), ("bat", "elk"), [0, 1, 2, 3, 4], [5, 6]),
    ],
)
def test_split_gives_names_and_channels(
    step: int, old: tuple[str, ...], new: tuple[str, ...], semantic_old: list[int], semantic_new: list[int]
) -> None:
    split = plan().split(step)
    channels = list(range(7))
    assert split == ClassSplit(step=step, old_names=old, new_names=new)
    assert split.seen_names == old + new
    assert (split.num_old_classes, split.num_new_classes, split.num_classes) == (
        len(old),
        len(new),
        len(old) + len(new),
    )
    assert channels[split.semantic_old] == semantic_old
    assert channels[split.semantic_new] == semantic_new
    # Centers have no background: each channel is one less.
    assert channels[split.center_old] == [c - 1 for c in semantic_old[1:]]
    assert channels[split.center_new] == [c - 1 for c in semantic_new]


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_plan_is_named_with_those_there_are(step: int) -> None:
    with pytest.raises(ConfigError, match=rf"plan 'pets' has steps 0 to 2, not {step}"):
        plan().split(step)


def test_class_names_are_in_label_order() -> None:
    assert plan().num_steps == 3
    assert plan().class_names == ("cat", "dog", "owl", "cow", "bat", "elk")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('steps=[["cat"], ["dog", "cat"]]', "each class belongs to one step; listed more than once: cat"),
        ('steps=[["cat", "cat", "dog", "dog"]]', "each class belongs to one step; listed more than once: cat, dog"),
        ('steps=[["cat"], [], ["dog"], []]', "every step must add a class; empty: step 1, 3"),
        ("steps=[]", "field 'steps': Tuple should have at least 1 item after validation, not 0 (found [])"),
        ("name=../pets", "field 'name': String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$' (found '../pets')"),
        ("selection=some", "field 'selection': Input should be 'overlap' or 'disjoint' (found 'some')"),
    ],
)
def test_impossible_plans_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(override)
    assert str(caught.value) == f"pets.toml: {message}"


def test_the_kind_of_data_chooses_its_fields() -> None:
    assert isinstance(plan("data.num_train=5").data, ShapesData)
    data = plan("data.kind=coco", "data.train.images=a", "data.val.images=b").data
    assert isinstance(data, FileData)


def test_sources_are_joined_to_the_root_and_steps_may_have_their_own() -> None:
    data = plan(
        "data={kind='coco', root='/data'}",
        "data.train={images='train', tags='train.json'}",
        "data.val={images='/elsewhere/val', instances='val.json'}",
        "data.steps.2.images=later",
    ).data
    assert isinstance(data, FileData)
    assert data.source(1).images == Path("/data/train")
    assert data.source(1).tags == Path("/data/train.json")
    assert data.source(1).instances is None
    assert data.source(2).images == Path("/data/later")
    assert data.source(2).tags is None
    assert data.evaluation_source.images == Path("/elsewhere/val")
    assert data.evaluation_source.instances == Path("/data/val.json")


def test_sources_have_the_kind_of_the_data_unless_they_say_otherwise() -> None:
    data = plan(
        "data={kind='voc', root='/data'}",
        "data.train.split=train_aug",
        "data.val={kind='coco', images='val', instances='val.json'}",
        "data.steps.2={kind='sbd', folder='sbd'}",
        "data.proposals=masks",
    ).data
    assert isinstance(data, FileData)
    assert [data.source(0).kind, data.source(2).kind, data.evaluation_source.kind] == ["voc", "sbd", "coco"]
    source = data.source(2)
    assert isinstance(source, SbdSource)
    assert source.folder == Path("/data/sbd")
    assert data.proposal_folder == Path("/data/masks")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.splitt=x"], "unknown field 'data.train.splitt'; did you mean 'data.train.split'?"),
        (["data.steps.1.zzzz=x"], "unknown field 'data.steps.1.zzzz'; known here: class_masks, folder, kind,"),
        (["data.train.kind=coco"], "field 'data.train.images' is missing"),
        (["data.train.kind=pascal"], "field 'data.train': Input tag 'pascal' found using 'kind' does not match"),
    ],
)
def test_mistakes_in_a_source_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("data={kind='voc'}", "data.train={}", "data.val.split=val", *overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_source_for_a_step_that_the_plan_lacks_is_refused(step: int) -> None:
    sources = ("data={kind='coco'}", "data.train.images=a", "data.val.images=b", "data.steps.2.images=c")
    with pytest.raises(ConfigError) as caught:
        plan(*sources, f"data.steps.{step}.images=d")
    assert str(caught.value) == (
        f"pets.toml: data.steps.{step} is for a step that the plan lacks, which has steps 0 to 2; correct the number, "
        "or add the step's classes to 'steps'"
    )


def test_load_plan_reads_a_file_and_applies_overrides_last(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nsteps = [["cat"]]\ndata.kind = "shapes"\n[recipe]\nseed = 5\ncrop_size = 256\n')
    loaded = load_plan(path, ["recipe.seed=6"])
    assert (loaded.recipe.seed, loaded.recipe.crop_size) == (6, 256)
    with pytest.raises(ConfigError, match=r"mine\.toml: unknown field 'recipe\.sed'; did you mean 'recipe\.seed'\?"):
        load_plan(path, ["recipe.sed=6"])


def test_lengths_scale_with_the_crop() -> None:
    assert plan().recipe.length_scale == 1
    assert plan("recipe.crop_size=128").recipe.length_scale == 0.25
    assert plan("recipe.crop_size=128", "recipe.reference_size=64").recipe.length_scale == 2


def shipped_plans() -> list[str]:
    folder = config_folder()
    files = (path for path in folder.rglob("*.toml") if path.stem != "base" and path.parent.name != "presets")
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in files)


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_loads_and_survives_json(name: str) -> None:
    loaded = load_plan(name)
    assert loaded.num_steps >= (1 if name.endswith("joint") else 2)
    assert Plan.model_validate_json(loaded.model_dump_json()) == loaded


def test_there_are_shipped_plans() -> None:
    assert "shapes" in shipped_plans()


@pytest.mark.parametrize(
    ("label", "color"),
    [(0, (128, 0, 0)), (1, (0, 128, 0)), (2, (128, 128, 0)), (6, (128, 128, 128)), (14, (192, 128, 128))],
    ids=["aeroplane", "bicycle", "bird", "car", "person"],
)
def test_colors_are_those_of_pascal_voc(label: int, color: tuple[int, int, int]) -> None:
    assert class_color(label) == color


def test_eighty_classes_have_distinct_colors_none_of_them_black() -> None:
    colors = {class_color(label) for label in range(80)} | {(0, 0, 0)}
    assert len(colors) == 81
