"""Tables of a comparison, from reports small enough to check by hand."""

import csv
from pathlib import Path

import pytest

from cl4wsis.comparison import (
    VALUE_NAMES,
    Measurement,
    add_ratios,
    comparison_markdown,
    difference,
    published_rows,
    read_measurements,
    summarize,
    write_csv,
)
from cl4wsis.comparison_plot import plot_comparison
from cl4wsis.errors import RunError
from cl4wsis.metrics import ClassMetrics, EvaluationReport, GroupMeans
from cl4wsis.published import published_for
from cl4wsis.steps import ClassInfo, InputRule, StepInfo, step_folder, write_step_info
from cl4wsis.tasks import class_color, load_plan


def measured(preset: str, step: int, seed: int, **values: float) -> Measurement:
    return Measurement(preset, step, seed, {name: values.get(name) for name in VALUE_NAMES})


def report(step: int, ap50: dict[str, float], num_old: int) -> EvaluationReport:
    classes = tuple(
        ClassMetrics(name=n, num_instances=1, ap50=v, ap=v / 2, ap9=v / 2, coco_ap=v / 2, iou=v)
        for n, v in ap50.items()
    )
    values = list(ap50.values())
    old, new = values[:num_old], values[num_old:]
    means = GroupMeans(old=sum(old) / len(old) if old else None, new=sum(new) / len(new), all=sum(values) / len(values))
    fields = dict.fromkeys(("ap50", "ap", "ap9", "coco_ap", "iou"), means)
    return EvaluationReport(
        step=step, num_images=1, num_old_classes=num_old, classes=classes, background_iou=0.9, **fields
    )


def write_step(run: Path, variant: str, found: EvaluationReport, seconds: float, with_metrics: bool = True) -> None:
    plan = load_plan("shapes")
    folder = step_folder(run, found.step, variant)
    folder.mkdir(parents=True)
    info = StepInfo(
        plan=plan,
        step=found.step,
        classes=tuple(ClassInfo(name=c.name, step_added=0, color=class_color(i)) for i, c in enumerate(found.classes)),
        class_counts=(1,),
        network=plan.recipe.network,
        input=InputRule(size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1)),
        weights_sha256="0",
        parent_sha256=None,
        seconds={"semantic": seconds, "instance": 1.0},
        metrics=found.model_dump(mode="json") if with_metrics else {},
    )
    write_step_info(folder, info)


def test_values_come_from_the_step_folders(tmp_path: Path) -> None:
    write_step(tmp_path, "ours", report(0, {"star": 0.8, "cross": 0.6}, 0), 10)
    write_step(tmp_path, "ours", report(1, {"star": 0.5, "cross": 0.5, "disc": 0.4}, 2), 20)
    first, second = read_measurements(tmp_path, "ours", "ours", 3, [0, 1])
    assert (first.step, first.seed, first.values["seconds"], first.values["forgetting"]) == (0, 3, 11, None)
    assert first.values["ap50_new"] == pytest.approx(0.7)
    assert first.values["ap50_old"] is None
    assert second.values["forgetting"] == pytest.approx((0.3 + 0.1) / 2)
    assert second.values["ap50_all"] == pytest.approx(1.4 / 3)
    assert second.values["seconds"] == 21


def test_forgetting_is_unknown_where_the_introduction_of_a_class_was_not_measured(tmp_path: Path) -> None:
    write_step(tmp_path, "joint", report(0, {"star": 0.8}, 0), 10)
    write_step(tmp_path, "joint", report(2, {"star": 0.5, "cross": 0.5, "disc": 0.4}, 2), 20)
    assert read_measurements(tmp_path, "joint", "joint", 1, [0, 2])[1].values["forgetting"] is None


def test_step_without_measurement_is_refused(tmp_path: Path) -> None:
    write_step(tmp_path, "ours", report(0, {"star": 0.8}, 0), 10, with_metrics=False)
    with pytest.raises(RunError, match=r"step-0: was trained without being measured; delete it"):
        read_measurements(tmp_path, "ours", "ours", 1, [0])


def test_mean_and_spread_are_taken_over_seeds() -> None:
    found = [measured("ours", 1, seed, ap50_all=value) for seed, value in ((1, 0.2), (2, 0.4), (3, 0.6))]
    (summary,) = summarize(found)
    assert summary.num_seeds == 3
    assert summary.mean["ap50_all"] == pytest.approx(0.4)
    assert summary.std["ap50_all"] == pytest.approx(0.2)  # of a sample: sqrt((0.04 + 0 + 0.04) / 2)
    assert summary.mean["ap50_old"] is None
    (single,) = summarize(found[:1])
    assert single.std["ap50_all"] is None


def test_ratio_is_to_joint_training_with_the_same_seed_after_the_same_step() -> None:
    found = add_ratios(
        [
            measured("ours", 2, 1, ap50_all=0.3, ap50_old=0.1),
            measured("ours", 2, 2, ap50_all=0.3),
            measured("ours", 1, 1, ap50_all=0.3),
            measured("joint", 2, 1, ap50_all=0.6, ap50_old=0.0),
            measured("joint", 2, 2, ap50_all=0.4),
        ]
    )
    ratios = [entry.values["ap50_all_to_joint"] for entry in found]
    assert ratios == [pytest.approx(0.5), pytest.approx(0.75), None, 1.0, 1.0]
    assert found[0].values["ap50_old_to_joint"] is None  # joint found nothing


def test_csv_holds_every_seed_and_then_mean_and_spread(tmp_path: Path) -> None:
    write_csv([measured("ours", 1, seed, ap50_all=seed / 10) for seed in (1, 3)], tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["preset"], row["step"], row["seed"], row["ap50_all"]) for row in rows] == [
        ("ours", "1", "1", "0.1"),
        ("ours", "1", "3", "0.3"),
        ("ours", "1", "mean", "0.2"),
        ("ours", "1", "std", "0.14142"),
    ]
    assert list(rows[0]) == ["preset", "step", "seed", *VALUE_NAMES]
    assert rows[0]["forgetting"] == ""


def test_markdown_shows_percent_spread_and_ratios() -> None:
    plan = load_plan("shapes")
    found = [
        measured(preset, step, seed, ap50_all=value + seed / 100, seconds=90)
        for preset, value in (("ours", 0.3), ("joint", 0.6))
        for step in (0, 2)
        for seed in (0, 2)
    ]
    text = comparison_markdown(plan, {"ours": "A.", "joint": "B."}, summarize(add_ratios(found)), None, "compare.png")
    lines = text.splitlines()
    assert lines[0] == "# shapes: ours, joint"
    assert "2 seeds" in lines[2]
    assert "| shared by all | 31.0 ± 1.4 | - | - | 1.5 |" in lines
    (row,) = [line for line in lines if line.startswith("| ours |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["ours", "-", "-", "31.0 ± 1.4"]
    assert cells[-1] == "0.51 ± 0.01"  # of 0.30 / 0.60 and 0.32 / 0.62
    assert "## After step 2: heart, triangle" in lines
    assert "- `ours`: A." in lines
    assert lines[-1] == "![AP50 and forgetting per step](compare.png)"
    widths = {line.count("|") for line in lines if line.startswith("|") and "ours" in line}
    assert widths == {len(cells) + 1}


def test_reported_numbers_stand_beside_measured_ones() -> None:
    plan = load_plan("sbd/15-5")
    published = published_for(plan)
    assert published is not None
    values = {"ap50_old": 0.4, "ap50_new": 0.2, "ap50_all": 0.35}
    summaries = summarize([measured("ours", 1, 1, **values)])
    rows = {row[0]: row for row in published_rows(plan, summaries, published, 1)}
    assert rows["Ours (tags)"][1:3] == ("40.0 / 20.0 / 35.0", "50.7 / 23.3 / 43.9")
    assert rows["Ours (tags)"][6] == "70.5 / 41.3 / 64.4"
    assert rows["MMA (masks)"][1:3] == ("-", "64.0 / 50.7 / 60.7")
    text = comparison_markdown(plan, {"ours": "A."}, summaries, published, None)
    assert "## Beside the publication, after step 1" in text
    assert "| Joint (masks) | - | 58.8 / 56.1 / 58.2 |" in text


@pytest.mark.parametrize(
    ("override", "step", "preset", "expected"),
    [
        ("recipe.base.epochs=9", 0, None, "recipe.base.epochs was 7 and is now 9"),
        ("recipe.semantic.epochs=9", 0, None, None),
        ("recipe.semantic.epochs=9", 1, None, "recipe.semantic.epochs was 5 and is now 9"),
        ("recipe.semantic.epochs=9", 1, "joint", None),
        ("recipe.num_workers=3", 1, None, None),
        ("data.num_train=10", 0, None, "data.num_train was 400 and is now 10"),
        ("recipe.network.encoder_statistics=batch", 0, None, "recipe.network.encoder_statistics was 'stored'"),
    ],
)
def test_settings_that_matter_to_a_step_are_compared(
    override: str, step: int, preset: str | None, expected: str | None
) -> None:
    before = ["recipe.base.epochs=7", "recipe.semantic.epochs=5", "data.num_train=400"]
    before.append("recipe.network.encoder_statistics=stored")
    found = difference(load_plan("shapes", before, preset), load_plan("shapes", [*before, override], preset), step)
    assert found == expected if expected is None else found is not None and found.startswith(expected)


def test_plot_is_a_picture_whatever_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cv2 = pytest.importorskip("cv2")
    found = [measured(f"p{n}", step, 1, ap50_all=0.1 * n) for n in range(9) for step in (0, 1)]
    plot_comparison(summarize(found), "nine presets", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = cv2.imread(str(tmp_path / "a.png"))
    assert picture.shape[1] > 1200
    assert picture.std() > 5  # not blank
