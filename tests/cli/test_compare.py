"""``compare`` as a user calls it: two presets and two seeds end to end, resumed, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
from layouts import Split, write_coco
from tiny import TINY
from typer.testing import CliRunner, Result

from cl4wsis.cli.compare import _spelled_out
from cl4wsis.cli.main import app
from cl4wsis.config import config_folder, parse_overrides
from cl4wsis.steps import read_step

RUNNER = CliRunner()


def write_plan(path: Path, *overrides: str) -> Path:
    """Write the tiny plan as a file: as settings of a command it would overrule the presets."""

    def lines(tables: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for name, value in tables.items():
            nested = isinstance(value, dict)
            found += lines(value, f"{prefix}{name}.") if nested else [f"{prefix}{name} = {json.dumps(value)}"]  # type: ignore[arg-type]
        return found

    small = "recipe.network.encoder=test_efficientnet"
    two_steps = 'steps=[["disc", "square", "triangle", "star"], ["ring", "cross"]]'
    tables = parse_overrides([*TINY, small, two_steps, "recipe.base.epochs=1", "recipe.instance.epochs=1", *overrides])
    path.write_text("\n".join([f'extends = "{config_folder() / "shapes.toml"}"', *lines(tables)]))
    return path


def compare(plan: Path, run: Path, *arguments: str) -> Result:
    return RUNNER.invoke(app, ["compare", str(plan), "--run", str(run), "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny plan and a comparison of two presets over two seeds."""
    folder = tmp_path_factory.mktemp("compare")
    plan = write_plan(folder / "tiny.toml")
    answer = compare(plan, folder / "run", "--presets", "wilson", "fine-tune", "--seeds", "1", "2")
    assert answer.exit_code == 0, answer.output
    assert "shapes after step 1" in answer.stdout
    return folder


def test_every_seed_has_one_base_step_and_a_folder_per_preset(folder: Path) -> None:
    steps = sorted(str(path.parent.relative_to(folder / "run")) for path in folder.glob("run/**/step.json"))
    assert steps == [
        f"seed-{seed}/{step}" for seed in (1, 2) for step in ("fine-tune/step-1", "step-0", "wilson/step-1")
    ]
    for seed in (1, 2):
        base = read_step(folder / f"run/seed-{seed}/step-0")
        assert (base.plan.recipe.preset, base.plan.recipe.seed) == ("", seed)
        for preset in ("wilson", "fine-tune"):
            info = read_step(folder / f"run/seed-{seed}/{preset}/step-1")
            assert info.parent_sha256 == base.weights_sha256
            assert info.plan.recipe.preset == preset
    wilson = read_step(folder / "run/seed-1/wilson/step-1")
    assert not wilson.plan.recipe.semantic.flac
    assert wilson.network.encoder_statistics == "batch"


def test_tables_and_picture_are_written(folder: Path) -> None:
    with (folder / "run/compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    seeds = [(row["preset"], row["step"], row["seed"]) for row in rows]
    expected = [(preset, step, seed) for preset in ("wilson", "fine-tune") for step in "01" for seed in "12"]
    assert seeds[:8] == expected
    assert {row["seed"] for row in rows[8:]} == {"mean", "std"}
    info = read_step(folder / "run/seed-2/wilson/step-1")
    (row,) = [row for row in rows if (row["preset"], row["step"], row["seed"]) == ("wilson", "1", "2")]
    assert float(row["iou_all"]) == pytest.approx(info.metrics["iou"]["all"], rel=1e-3)
    assert float(row["seconds"]) == pytest.approx(sum(info.seconds.values()), rel=1e-3)
    text = (folder / "run/compare.md").read_text()
    assert "| wilson |" in text
    assert "| fine-tune |" in text
    assert "2 seeds" in text
    assert "](compare.png)" in text
    assert (folder / "run/compare.png").read_bytes().startswith(b"\x89PNG")


def test_second_call_trains_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("run/**/step.json")}
    answer = compare(folder / "tiny.toml", folder / "run", "--presets", "wilson", "fine-tune", "--seeds", "1", "2")
    assert answer.exit_code == 0, answer.output
    assert "step 1" not in answer.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("run/**/step.json")} == before


def test_presets_can_be_added_later_and_share_the_base_step(folder: Path) -> None:
    answer = compare(folder / "tiny.toml", folder / "run", "--presets", "joint", "plan", "--seeds", "1", "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["measurements"]
    assert [(m["preset"], m["step"]) for m in found] == [("joint", 0), ("joint", 1), ("plan", 0), ("plan", 1)]
    assert "[1/2] seed-1, step 1, joint" in answer.stderr
    assert read_step(folder / "run/seed-1/joint/step-1").parent_sha256 is None
    assert read_step(folder / "run/seed-1/step-1").plan.recipe.preset == ""


def test_other_settings_need_another_folder(folder: Path) -> None:
    arguments = ("--presets", "wilson", "--seeds", "1", "--set")
    answer = compare(folder / "tiny.toml", folder / "run", *arguments, "recipe.base.batch_size=2")
    assert answer.exit_code == 1
    assert "step-0: was trained with other settings: recipe.base.batch_size was 4 and is now 2" in answer.stderr


def test_unknown_preset_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    answer = compare(write_plan(tmp_path / "tiny.toml"), tmp_path / "run", "--presets", "ours", "pams")
    assert answer.exit_code == 1
    assert "no preset 'pams'; did you mean 'pam'?" in answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "preset", "value"),
    [("recipe.method=joint", "ours", "cl4wsis"), ("recipe.semantic.flac=true", "wilson", "False")],
)
def test_settings_may_not_undo_a_preset(tmp_path: Path, setting: str, preset: str, value: str) -> None:
    plan = write_plan(tmp_path / "tiny.toml", *(['recipe.method="fine-tune"'] if "method" in setting else []))
    answer = compare(plan, tmp_path / "run", "--presets", preset, "--set", setting)
    assert answer.exit_code == 2
    said = " ".join(answer.stderr.replace("│", " ").split())
    assert f"--set {setting.partition('=')[0]}: preset '{preset}' makes it" in said
    assert value in said
    assert not (tmp_path / "run").exists()


def test_unusable_data_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    """The second preset needs masks for step 1, which has tags alone."""
    classes = {1: "cat", 2: "dog"}
    for name in ("base", "later"):
        pictures: Split = {f"{name}{i}": [("cat", (0, 0, 20, 20)), ("dog", (30, 0, 50, 20))] for i in range(4)}
        write_coco(tmp_path / name, tmp_path / f"{name}.json", pictures, classes)
    (tmp_path / "tags.json").write_text(json.dumps({f"later{i}.jpg": ["dog"] for i in range(4)}))
    plan = tmp_path / "pets.toml"
    plan.write_text(
        f"""
        name = "pets"
        steps = [["cat"], ["dog"]]
        [data]
        kind = "coco"
        root = "{tmp_path}"
        train = {{images = "base", instances = "base.json"}}
        steps.1 = {{images = "later", tags = "tags.json"}}
        val = {{images = "base", instances = "base.json"}}
        """
    )
    answer = compare(plan, tmp_path / "run", "--presets", "ours", "fine-tune", "--seeds", "1")
    assert answer.exit_code == 1
    assert "step 1 cannot be trained with method fine-tune" in answer.stderr
    assert "'instances'" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_unknown_device_gets_a_sentence(tmp_path: Path) -> None:
    plan = str(write_plan(tmp_path / "tiny.toml"))
    answer = RUNNER.invoke(app, ["compare", plan, "--run", str(tmp_path / "run"), "--device", "foo"])
    assert answer.exit_code == 1
    assert "--device takes auto, cpu, cuda or mps" in answer.stderr


def test_presets_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text("[recipe.semantic]\nflac = true\n")
    plan = write_plan(tmp_path / "tiny.toml")
    answer = compare(plan, tmp_path / "run", "--presets", "ours", str(tmp_path / "ours.toml"))
    assert answer.exit_code == 1
    assert "two presets are called 'ours'" in answer.stderr


def test_preset_of_a_single_step_stands_in_its_own_folder(folder: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "tiny.toml", "recipe.seed=1")
    (tmp_path / "step-0").symlink_to(folder / "run/seed-1/step-0")
    common = ["--config", str(plan), "--run", str(tmp_path)]
    answer = RUNNER.invoke(app, ["train-step", *common, "--preset", "pam", "--device", "cpu", "--no-evaluate"])
    assert answer.exit_code == 0, answer.output
    info = read_step(tmp_path / "pam/step-1")
    assert info.plan.recipe.semantic.peak_module == "attention"
    assert not info.metrics
    assert info.parent_sha256 == read_step(tmp_path / "step-0").weights_sha256
    measured = RUNNER.invoke(app, ["evaluate", *common, "--preset", "pam", "--step", "1", "--json"])
    assert measured.exit_code == 0, measured.output
    assert json.loads(measured.stdout)["step"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plan --seeds 1 2 --run x", "plan --seeds 1 --seeds 2 --run x"),
        ("--run x --seeds 1 --seeds 2", "--run x --seeds 1 --seeds 2"),
        ("--run x plan", "--run x plan"),
    ],
)
def test_repeatable_options_take_all_words_up_to_the_next_option(words: str, expected: str) -> None:
    assert list(_spelled_out(words.split(), {"--seeds"})) == expected.split()


@pytest.mark.parametrize("words", ["--presets --seeds 1", "--seeds 1 --presets"])
def test_repeatable_option_without_a_word_is_named(words: str) -> None:
    answer = RUNNER.invoke(app, ["compare", "shapes", *words.split()])
    assert answer.exit_code == 2
    assert "--presets needs at least one word" in " ".join(answer.stderr.replace("│", " ").split())
