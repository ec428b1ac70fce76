"""The publication's numbers: that they are consistent, and found for the plans they belong to."""

import pytest

from cl4wsis.presets import shipped_presets
from cl4wsis.published import PublishedResult, published_for, published_scenarios
from cl4wsis.tasks import load_plan

CLASSES = {
    "sbd-15-5": (15, 5),
    "sbd-15-5-disjoint": (15, 5),
    "sbd-10-10": (10, 10),
    "sbd-10-10-disjoint": (10, 10),
    "sbd-10-5-5": (10, 5, 5),
    "coco-voc": (60, 20),
}
RESULTS = [
    pytest.param(CLASSES[plan], result, id=f"{plan}-{result.method}-{result.after_step}")
    for scenario in published_scenarios()
    for plan in scenario.plans
    for result in scenario.results
]


@pytest.mark.parametrize(("counts", "result"), RESULTS)
def test_mean_of_all_classes_is_that_of_the_groups(counts: tuple[int, ...], result: PublishedResult) -> None:
    last = len(counts) - 1 if result.after_step is None else result.after_step
    counts = counts[result.first_step : last + 1]
    for values in (result.ap50, result.ap9):
        assert len(values) in (0, len(counts), len(counts) + 1)
        if len(values) == len(counts) + 1:
            mean = sum(v * n for v, n in zip(values, counts, strict=False)) / sum(counts)
            assert values[-1] == pytest.approx(mean, abs=0.11)  # both sides are rounded to one decimal
    for values in (result.ap50, result.ap9, result.iou):
        assert all(0 <= value <= 100 for value in values)


def test_presets_named_in_the_results_exist() -> None:
    named = {result.preset for scenario in published_scenarios() for result in scenario.results} - {""}
    assert named <= set(shipped_presets())


@pytest.mark.parametrize("name", ["sbd/15-5", "sbd/15-5-disjoint", "sbd/10-10", "sbd/10-10-disjoint", "sbd/10-5-5"])
def test_results_are_found_for_the_plans_of_their_scenario(name: str) -> None:
    plan = load_plan(name)
    scenario = published_for(plan)
    assert scenario is not None
    assert tuple(len(names) for names in plan.steps) == CLASSES[plan.name]
    assert plan.selection in scenario.data
    assert any(result.preset == "ours" for result in scenario.after_step(plan.num_steps - 1, plan.num_steps))


def test_tags_of_all_seen_classes_are_a_scenario_of_their_own() -> None:
    plain, all_seen = (published_for(load_plan("sbd/15-5", [f"all_seen_labels={v}"])) for v in ("false", "true"))
    assert plain is not None
    assert all_seen is not None
    assert (plain.results[-1].ap50, all_seen.results[-1].ap50) == ((50.7, 23.3, 43.9), (51.5, 25.7, 45.1))


def test_coco_to_voc_has_results_for_either_kind_of_evaluation_images() -> None:
    on_coco, on_voc = (published_for(load_plan(f"coco_voc/{name}")) for name in ("coco-voc", "on-voc"))
    assert on_coco is not None
    assert on_voc is not None
    assert on_coco.results[-1].means("ap50", (60, 20)) == pytest.approx((14.4, 6.8, (60 * 14.4 + 20 * 6.8) / 80))
    assert on_voc.results[-1].means("ap50", (60, 20)) == (None, 14.7, None)


@pytest.mark.parametrize("name", ["shapes", "voc/15-5", "sbd/15-1", "animals7/4-3"])
def test_nothing_was_reported_for_other_plans(name: str) -> None:
    assert published_for(load_plan(name)) is None


def test_old_classes_of_three_steps_weigh_each_step_by_its_classes() -> None:
    scenario = published_for(load_plan("sbd/10-5-5"))
    assert scenario is not None
    (ours,) = [r for r in scenario.after_step(2, 3) if r.preset == "ours"]
    assert ours.means("ap50", (10, 5, 5)) == pytest.approx(((10 * 37.4 + 5 * 27.1) / 15, 20.3, 30.5))
    assert ours.means("iou", (10, 5, 5)) == (None, None, None)
    (after_1,) = [r for r in scenario.after_step(1, 3) if r.preset == "ours"]
    assert after_1.means("ap9", (10, 5)) == pytest.approx((26.6, 13.9, (10 * 26.6 + 5 * 13.9) / 15))
    (base,) = [r for r in scenario.after_step(0, 3) if r.preset == "ours"]
    assert base.means("ap9", (10,)) == (None, 34.1, 34.1)
