"""Presets: what they change, what they may not change, and where their steps stand."""

from pathlib import Path

import pytest

from cl4wsis.config import config_folder
from cl4wsis.errors import ConfigError
from cl4wsis.presets import find_preset, preset_name, shipped_presets
from cl4wsis.recipe import LEARNING_FIELDS, Recipe
from cl4wsis.tasks import load_plan

PLANS = sorted(
    str(path.relative_to(config_folder()).with_suffix(""))
    for path in config_folder().rglob("*.toml")
    if path.stem != "base" and path.parent.name != "presets"
)


@pytest.mark.parametrize("plan", PLANS)
def test_every_preset_fits_every_plan_and_leaves_its_network_alone(plan: str) -> None:
    own = load_plan(plan)
    learning = set(LEARNING_FIELDS)
    for name in shipped_presets():
        found = load_plan(plan, preset=name)
        assert found.recipe.preset == found.recipe.variant == name
        assert found.recipe.network.model_dump(exclude=learning) == own.recipe.network.model_dump(exclude=learning)
        assert found.model_dump(exclude={"recipe"}) == own.model_dump(exclude={"recipe"})
        assert found.recipe.base == own.recipe.base
        assert (found.recipe.seed, found.recipe.crop_size) == (own.recipe.seed, own.recipe.crop_size)


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.startswith(("sbd/", "voc/"))])
def test_the_publications_plans_are_those_of_preset_ours(plan: str) -> None:
    assert load_plan(plan, preset="ours").recipe == load_plan(plan).recipe.model_copy(update={"preset": "ours"})


@pytest.mark.parametrize("plan", ["shapes", "animals7/4-3"])
def test_ours_undoes_what_a_plan_has_beyond_the_publication(plan: str) -> None:
    found = load_plan(plan, ["recipe.semantic.optimizer.inherited_lr=1e-9"]).recipe
    assert found.semantic.optimizer.inherited_lr == 1e-9
    recipe, published = load_plan(plan, preset="ours").recipe, Recipe()
    budget = {"epochs", "batch_size", "optimizer"}
    assert recipe.semantic.model_dump(exclude=budget) == published.semantic.model_dump(exclude=budget)
    assert recipe.semantic.optimizer.model_dump(exclude={"warmup_epochs"}) == published.semantic.optimizer.model_dump(
        exclude={"warmup_epochs"}
    )
    budget |= {"instance_loss"}
    assert recipe.instance.model_dump(exclude=budget) == published.instance.model_dump(exclude=budget)
    assert (recipe.network.encoder_statistics, recipe.network.image_prior) == ("batch", 0)
    assert (recipe.network.discriminant, recipe.network.shared_centers) == (0, False)


def switches(name: str) -> dict[str, bool]:
    recipe = load_plan("shapes", preset=name).recipe
    return {
        "pg": recipe.semantic.peak_generator and recipe.semantic.peak_module == "generator",
        "sd": recipe.instance.selective_distillation,
        "flac": recipe.semantic.flac,
        "dropout": recipe.semantic.random_dropout,
    }


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("pg", "pg"),
        ("pg-sd", "pg sd"),
        ("pg-sd-flac", "pg sd flac"),
        ("pg-sd-flac-dropout", "pg sd flac dropout"),
        ("ours", "pg sd flac dropout"),
        ("wilson", "sd"),
        ("pam", "sd flac dropout"),
        ("pam-only", ""),
    ],
)
def test_ablations_switch_the_modules_of_their_name(name: str, on: str) -> None:
    assert {module for module, is_on in switches(name).items() if is_on} == set(on.split())


def test_plus_is_what_the_plans_for_photographs_have() -> None:
    plan = load_plan("animals7/4-3")
    assert load_plan("animals7/4-3", preset="plus").recipe == plan.recipe.model_copy(update={"preset": "plus"})


@pytest.mark.parametrize(
    ("name", "nearest"), [("our", "ours"), ("finetune", "fine-tune"), ("PAM", "pam"), ("pg_sd", "pg-sd")]
)
def test_unknown_preset_names_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"no preset '{name}'; did you mean '{nearest}'") as caught:
        load_plan("shapes", preset=name)
    assert all(known in str(caught.value) for known in shipped_presets())


def test_every_preset_says_what_it_is() -> None:
    assert all(len(comment) > 20 for comment in shipped_presets().values())


def test_presets_are_no_plans() -> None:
    with pytest.raises(ConfigError) as caught:
        load_plan("no-such-plan")
    assert "presets/" not in str(caught.value)


def test_overrides_come_after_the_preset() -> None:
    recipe = load_plan("shapes", ["recipe.semantic.flac=true"], "wilson").recipe
    assert recipe.semantic.flac
    assert not recipe.semantic.random_dropout


def test_own_file_is_a_preset_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "gentle.toml"
    path.write_text(f'extends = "{find_preset("ours")}"\n[recipe.semantic]\nsuppress_old = 0.25\n')
    recipe = load_plan("shapes", preset=str(path)).recipe
    assert (recipe.variant, recipe.semantic.suppress_old, recipe.semantic.flac) == ("gentle", 0.25, True)
    assert preset_name(str(path)) == "gentle"


@pytest.mark.parametrize("name", ["cl4wsis", "plan", "compare", "step-1", "Step-12"])
def test_file_whose_name_a_run_uses_otherwise_is_no_preset(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text("[recipe.semantic]\nflac = false\n")
    with pytest.raises(ConfigError) as caught:
        load_plan("shapes", preset=str(path))
    assert str(caught.value) == (
        f"shapes with preset {path}: field 'recipe.preset': '{name}' already means something else in a run's folder; "
        "rename the preset's file"
    )
    assert load_plan("shapes", preset=str(path.rename(tmp_path / f"{name}-a.toml"))).recipe.variant == f"{name}-a"


def test_reset_brings_a_field_back_to_its_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('reset = ["semantic.optimizer.inherited_lr", "semantic.label_smoothing"]\n')
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'extends = "{config_folder() / "shapes.toml"}"\n[recipe.semantic]\noptimizer = {{ inherited_lr = 1e-9 }}\n'
    )
    assert load_plan(plan).recipe.semantic.optimizer.inherited_lr == 1e-9
    recipe = load_plan(plan, preset=str(path)).recipe
    assert recipe.semantic.optimizer.inherited_lr is None
    assert recipe.semantic.label_smoothing == Recipe().semantic.label_smoothing
    assert recipe.semantic.optimizer.head_lr == load_plan("shapes").recipe.semantic.optimizer.head_lr


def test_one_field_of_a_table_leaves_the_others_as_they_were() -> None:
    published = load_plan("sbd/15-5").recipe.semantic.optimizer
    changed = load_plan("sbd/15-5", ["recipe.semantic.optimizer.head_lr=5e-3"]).recipe.semantic.optimizer
    assert changed == published.model_copy(update={"head_lr": 5e-3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[recipe.network]\nencoder = 'resnet50'", "recipe.network.encoder cannot be set by a preset: all presets"),
        ("[recipe]\nseed = 1", "recipe.seed cannot be set by a preset"),
        ("[data]\nseed = 1", "a preset holds a table 'recipe' and a list 'reset', found data"),
        ("reset = 'semantic'", "'reset' must be a list of fields"),
        ("reset = ['semantic.smoothing']", "'reset' names 'semantic.smoothing', which is no field of the recipe"),
        ("[recipe.semantic]\nflacc = true", "did you mean 'recipe.semantic.flac'?"),
        ("recipe = 3", "mine.toml: 'recipe' must be a table with fields of the recipe, found 3"),
        ("[recipe]\nnetwork = 3", "mine.toml: 'recipe.network' must be a table with fields of the network, found 3"),
    ],
)
def test_mistakes_in_a_preset_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_plan("shapes", preset=str(path))
    assert message in str(caught.value)
