"""Settings files: extension, overrides, and messages that name the field."""

from pathlib import Path
from typing import Any

import pytest

from cl4wsis.config import (
    Settings,
    build_settings,
    config_folder,
    find_config,
    merge,
    parse_overrides,
    read_toml,
)
from cl4wsis.errors import ConfigError
from cl4wsis.tasks import Plan

PLAN = {"name": "plan", "steps": [["cat", "dog"], ["owl"]], "data": {"kind": "shapes"}}
COCO = ["data.kind=coco", "data.train.images=a", "data.val.images=b"]


def write(folder: Path, **texts: str) -> Path:
    """Write files named after the keywords and return the first."""
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(texts))}.toml"


# --- reading files --------------------------------------------------------------------------------------------------


def test_extending_file_wins_key_by_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top='extends = "middle.toml"\nseed = 3\n[optimizer]\nlr = 0.5',
        middle='extends = "bottom.toml"\n[optimizer]\nlr = 0.1\nkind = "sgd"',
        bottom="seed = 1\nepochs = 9\n[optimizer]\nmomentum = 0.9",
    )
    expected = {"seed": 3, "epochs": 9, "optimizer": {"lr": 0.5, "kind": "sgd", "momentum": 0.9}}
    assert read_toml(path) == expected


def test_extends_without_an_ending_names_what_comes_with_the_package(tmp_path: Path) -> None:
    found = read_toml(write(tmp_path, plan='extends = "own-data/base"\n[recipe]\ncrop_size = 64'))
    assert found["recipe"] == {**read_toml(config_folder() / "own-data/base.toml")["recipe"], "crop_size": 64}


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="seed = 4")
    assert read_toml(write(tmp_path / "sub", plan='extends = "../base.toml"')) == {"seed": 4}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"a": 'extends = "a.toml"'}, r"a\.toml: 'extends' runs in a circle: a\.toml -> a\.toml"),
        (
            {"a": 'extends = "b.toml"', "b": 'extends = "c.toml"', "c": 'extends = "a.toml"'},
            r"'extends' runs in a circle: a\.toml -> b\.toml -> c\.toml -> a\.toml",
        ),
        ({"a": 'extends = "zz.toml"'}, r"a\.toml: extends 'zz\.toml', but .* no file .*zz\.toml; give a .*\bshapes\b"),
        ({"a": 'extends = "own-data/bas"'}, r"a\.toml: extends 'own-data/bas', but .*; did you mean 'own-data/base'"),
        ({"a": 'extends = "own-data/base.toml"'}, r"a\.toml: extends .*; did you mean 'own-data/base'"),
        ({"a": 'extends = ["b.toml"]'}, r"a\.toml: 'extends' must be the name of one file, found \['b\.toml'\]"),
        ({"a": "seed = \nepochs = 1"}, r"a\.toml: is not valid TOML: Invalid value \(at line 1, "),
        ({"a": "seed = 1\nseed = 2\n"}, r"a\.toml: is not valid TOML: Cannot overwrite a value"),
    ],
    ids=[
        "itself",
        "circle of three",
        "missing parent",
        "misspelt parent",
        "parent with ending",
        "two parents",
        "syntax",
        "key twice",
    ],
)
def test_unreadable_files_say_why(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_toml(write(tmp_path, **texts))


def test_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    assert read_toml(write(tmp_path, a='\ufeffextends = "b.toml"\nseed = 1', b="\ufeffepochs = 2")) == {
        "seed": 1,
        "epochs": 2,
    }


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ConfigError, match=r"a\.toml: is not UTF-8 text"):
        read_toml(path)


# --- merging and overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "top", "expected"),
    [
        ({}, {"a": 1}, {"a": 1}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
        ({"a": 5}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    ],
    ids=["empty", "tables", "value over table", "table over value", "lists replace"],
)
def test_merge(base: dict[str, Any], top: dict[str, Any], expected: dict[str, Any]) -> None:
    untouched = str(base)
    assert merge(base, top) == expected
    assert str(base) == untouched


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        ([], {}),
        (["seed=1"], {"seed": 1}),
        (["recipe.base.lr=5e-5"], {"recipe": {"base": {"lr": 5e-5}}}),
        (["a.b=1", "a.c=2"], {"a": {"b": 1, "c": 2}}),
        (["a=1", "a=2"], {"a": 2}),
        (["flac=false"], {"flac": False}),
        (["name=plain words"], {"name": "plain words"}),
        (['name="1"'], {"name": "1"}),
        (["size=[64, 96]"], {"size": [64, 96]}),
        (["optimizer={kind='sgd', lr=0.1}"], {"optimizer": {"kind": "sgd", "lr": 0.1}}),
        (["root=C:\\images=old"], {"root": "C:\\images=old"}),
        ([" seed = 1 "], {"seed": 1}),
        (["name="], {"name": ""}),
    ],
)
def test_overrides_are_toml_values_or_bare_words(assignments: list[str], expected: dict[str, Any]) -> None:
    assert parse_overrides(assignments) == expected


@pytest.mark.parametrize("assignment", ["recipe.seed", "=3", " =3", "recipe..seed=1", ".seed=1", "seed.=1"])
def test_an_override_without_field_or_value_shows_the_form(assignment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([assignment])
    assert str(caught.value) == f"--set {assignment}: expected FIELD=VALUE, for example recipe.base.epochs=5"


# --- checking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["recipe.base.optimizer.encoder_lrr=1"],
            ["unknown field 'recipe.base.optimizer.encoder_lrr'; did you mean 'recipe.base.optimizer.encoder_lr'?"],
        ),
        (["data.num_trains=3"], ["unknown field 'data.num_trains'; did you mean 'data.num_train'?"]),
        (
            ["data.zzzz=3"],
            ["unknown field 'data.zzzz'; known here: image_size, kind, num_train, num_val, proposals, seed"],
        ),
        (["nam=x"], ["unknown field 'nam'; did you mean 'name'?"]),
        (["data.kind=coco"], ["field 'data.train' is missing", "field 'data.val' is missing"]),
        (
            [*COCO, "data.steps.1.images=c", "data.steps.1.tag=d"],
            ["unknown field 'data.steps.1.tag'; did you mean 'data.steps.1.tags'?"],
        ),
        (["recipe.base.epochs=0"], ["field 'recipe.base.epochs': Input should be greater than 0 (found 0)"]),
        (
            ["recipe.method=magic"],
            ["field 'recipe.method': Input should be 'cl4wsis', 'fine-tune' or 'joint' (found 'magic')"],
        ),
        (
            ["recipe.base.optimizer.head_lr=inf"],
            ["field 'recipe.base.optimizer.head_lr': Input should be a finite number (found inf)"],
        ),
        (["recipe.crop_size=100"], ["field 'recipe': crop_size 100 must be a multiple of 32"]),
        (["recipe.input_size=[32,33]"], ["field 'recipe': input_size (32, 33) must be multiples of 32"]),
        (
            ["recipe.crop_area=[2.0,0.5]"],
            ["field 'recipe.crop_area': must be two positive shares, the smaller one first, got [2.0, 0.5]"],
        ),
        (
            ["recipe.crop_area=[-1,2]"],
            ["field 'recipe.crop_area': must be two positive shares, the smaller one first, got [-1.0, 2.0]"],
        ),
        (
            ["recipe.crop_area=[0,0]"],
            ["field 'recipe.crop_area': must be two positive shares, the smaller one first, got [0.0, 0.0]"],
        ),
        (
            ["recipe.network.semantic_dilations=[0,1,2]"],
            ["field 'recipe.network.semantic_dilations.0': Input should be greater than 0 (found 0)"],
        ),
        (
            ["recipe.network.instance_dilations=[-3,1,2]"],
            ["field 'recipe.network.instance_dilations.0': Input should be greater than 0 (found -3)"],
        ),
        (
            ["recipe.seed=1.5", "recipe.base.batch_size=no"],
            [
                "field 'recipe.seed': Input should be a valid integer, got a number with a fractional part (found 1.5)",
                "field 'recipe.base.batch_size': Input should be a valid integer, "
                "unable to parse string as an integer (found 'no')",
            ],
        ),
    ],
)
def test_each_problem_is_one_line_with_the_path_of_the_field(overrides: list[str], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build_settings(Plan, merge(PLAN, parse_overrides(overrides)), "plan.toml")
    assert str(caught.value).splitlines() == [f"plan.toml: {line}" for line in lines]


def test_unknown_kind_of_a_union_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"plan\.toml: field 'data': .*'pascal'.*'shapes', 'coco', 'voc', 'sbd'"):
        build_settings(Plan, merge(PLAN, {"data": {"kind": "pascal"}}), "plan.toml")


def test_settings_are_frozen() -> None:
    class Size(Settings):
        height: int

    size = Size(height=3)
    with pytest.raises(ValueError, match="frozen"):
        size.height = 4


# --- plans that come with the package ---------------------------------------------------------------------------------


def test_a_file_comes_before_a_shipped_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("shapes") == config_folder() / "shapes.toml"
    Path("shapes").write_text("")
    assert find_config("shapes") == Path("shapes")


def test_unknown_plan_lists_those_that_come_with_the_package() -> None:
    with pytest.raises(ConfigError, match=r"no plan 'shape': neither a file nor one of .*\(.*\bshapes\b.*\)"):
        find_config("shape")
