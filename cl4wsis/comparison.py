"""Several presets on one plan, over several seeds: what was measured, its mean and spread, as Markdown and CSV.

A comparison is a folder with a run per seed (``seed-1``, ``seed-2``, ...). In each the presets share step 0 and have
their later steps in folders of their own. All values come from ``step.json``.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl4wsis.errors import RunError
from cl4wsis.metrics import EvaluationReport, GroupMeans, forgetting
from cl4wsis.published import PublishedMeans, PublishedScenario
from cl4wsis.steps import read_step, step_folder
from cl4wsis.tasks import Plan

GROUPS = ("old", "new", "all")
MEASURES = ("ap50", "ap", "ap9", "coco_ap", "iou")
TITLES = {"ap50": "AP50", "ap": "AP", "ap9": "AP .5:.9", "coco_ap": "COCO AP", "iou": "mIoU"}
REFERENCE = "joint"
"""Preset to which ratios refer."""

Values = dict[str, float | None]
"""Measured values by name, such as ``ap50_old``; fractions, and ``seconds``. None where there is no such value."""

VALUE_NAMES = (
    *(f"{measure}_{group}" for measure in MEASURES for group in GROUPS),
    "forgetting",
    "seconds",
    *(f"ap50_{group}_to_joint" for group in GROUPS),
)


@dataclass(frozen=True)
class Measurement:
    """One preset after one step, with one seed."""

    preset: str
    step: int
    seed: int
    values: Values


@dataclass(frozen=True)
class Summary:
    """One preset after one step, over all seeds.

    Attributes:
        mean: over the seeds that have the value.
        std: standard deviation of a sample; None with fewer than two values.
    """

    preset: str
    step: int
    num_seeds: int
    mean: Values
    std: Values


def read_measurements(run: Path, variant: str, preset: str, seed: int, steps: Iterable[int]) -> list[Measurement]:
    """Read what training left in the step folders of one preset and seed.

    Args:
        run: run folder of the seed.
        variant: ``recipe.variant`` of the preset's plan.
        preset: name in the comparison.
        seed: of the run.
        steps: trained steps; those before a step are needed to tell what it forgot.

    Raises:
        RunError: a step is missing, or was not measured.
    """
    reports: dict[int, EvaluationReport] = {}
    found = []
    for step in sorted(steps):
        folder = step_folder(run, step, variant)
        info = read_step(folder)
        if not info.metrics:
            raise RunError(f"{folder}: was trained without being measured; delete it, so that it is trained again")
        reports[step] = EvaluationReport.model_validate(info.metrics)
        values: Values = {"seconds": sum(info.seconds.values()), "forgetting": _forgotten(reports)}
        for measure in MEASURES:
            means: GroupMeans = getattr(reports[step], measure)
            values |= {f"{measure}_{group}": getattr(means, group) for group in GROUPS}
        found.append(Measurement(preset, step, seed, values))
    return found


def add_ratios(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Add each AP50 divided by that of joint training with the same seed, where there is one."""
    joint = {(m.step, m.seed): m.values for m in measurements if m.preset == REFERENCE}
    completed = []
    for found in measurements:
        reference = joint.get((found.step, found.seed), {})
        ratios = {
            f"ap50_{group}_to_joint": _ratio(found.values[f"ap50_{group}"], reference.get(f"ap50_{group}"))
            for group in GROUPS
        }
        completed.append(Measurement(found.preset, found.step, found.seed, {**found.values, **ratios}))
    return completed


def summarize(measurements: Sequence[Measurement]) -> list[Summary]:
    """Take means and standard deviations over seeds, by preset and step in the order given."""
    groups: dict[tuple[str, int], list[Values]] = {}
    for found in measurements:
        groups.setdefault((found.preset, found.step), []).append(found.values)
    summaries = []
    for (preset, step), values in groups.items():
        known = {name: [v for entry in values if (v := entry.get(name)) is not None] for name in VALUE_NAMES}
        mean: Values = {name: statistics.fmean(found) if found else None for name, found in known.items()}
        std: Values = {name: statistics.stdev(found) if len(found) > 1 else None for name, found in known.items()}
        summaries.append(Summary(preset, step, len(values), mean, std))
    return summaries


def check_same_settings(folder: Path, plan: Plan, step: int) -> None:
    """Make sure that a step was trained as a plan says.

    Raises:
        RunError: it cannot be read, or was trained with other settings.
    """
    found = difference(read_step(folder).plan, plan, step)
    if found is not None:
        raise RunError(
            f"{folder}: was trained with other settings: {found}; name another run folder with --run, or delete this "
            "step to train it again"
        )


def difference(found: Plan, wanted: Plan, step: int) -> str | None:
    """Tell in which field that matters to a step two plans differ, or None.

    Step 0 and the supervised baselines do not look at the settings of phases 1 and 2. How many processes load images,
    where these lie and how often training logs matters to no result.
    """
    ignored = {"data.root", "recipe.num_workers", "recipe.log_every"}
    if wanted.learns_from_masks(step):
        ignored |= {"recipe.semantic", "recipe.instance", "recipe.network.localizer_channels"}
    if step == 0:
        ignored |= {"recipe.network.new_class_init", "recipe.method", "recipe.preset", "data.proposals"}
    return _first_difference(found.model_dump(mode="json"), wanted.model_dump(mode="json"), ignored)


def write_csv(measurements: Sequence[Measurement], path: Path) -> None:
    """Write all values: one row per preset, step and seed, then rows whose seed is ``mean`` or ``std``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("preset", "step", "seed", *VALUE_NAMES))
    for found in measurements:
        writer.writerow((found.preset, found.step, found.seed, *_csv_values(found.values)))
    for summary in summarize(measurements):
        writer.writerow((summary.preset, summary.step, "mean", *_csv_values(summary.mean)))
        writer.writerow((summary.preset, summary.step, "std", *_csv_values(summary.std)))
    path.write_text(text.getvalue(), encoding="utf-8")


def comparison_markdown(
    plan: Plan,
    descriptions: Mapping[str, str],
    summaries: Sequence[Summary],
    published: PublishedScenario | None,
    plot: str | None,
) -> str:
    """Write the comparison as Markdown.

    Args:
        plan: without a preset.
        descriptions: of each preset, in one sentence.
        summaries: of all presets and steps.
        published: what was reported for the plan, if anything.
        plot: name of the picture beside the file.
    """
    seeds = max(summary.num_seeds for summary in summaries)
    spread = "mean ± standard deviation" if seeds > 1 else "values"
    lines = [f"# {plan.name}: {', '.join(descriptions)}", "", f"Percent, {spread} over {_counted(seeds, 'seed')}. "]
    lines[-1] += "AP50 and AP (thresholds 0.50 to 0.95) are VOC-style. " + _budget(plan)
    for step in sorted({summary.step for summary in summaries}):
        rows = [summary for summary in summaries if summary.step == step]
        if step == 0:
            rows = [replace(rows[0], preset="shared by all")]
        lines += ["", f"## After step {step}: {', '.join(plan.steps[step])}", ""]
        lines += _table(columns_of(step), [row_of(summary) for summary in rows])
    if published is not None:
        lines += _published_lines(plan, summaries, published)
    lines += ["", "## Presets", ""] + [f"- `{name}`: {text}" for name, text in descriptions.items()]
    if plot is not None:
        lines += ["", f"![AP50 and forgetting per step]({plot})"]
    return "\n".join(lines) + "\n"


def columns_of(step: int) -> list[str]:
    """Return the headings of the table of a step; all but the first stand above numbers."""
    if step == 0:
        return ["preset", *(f"{TITLES[measure]} all" for measure in ("ap50", "ap", "iou")), "minutes"]
    names = [f"{TITLES[measure]} {group}" for measure in ("ap50", "ap", "iou") for group in GROUPS]
    return ["preset", *names, "forgetting", "minutes", *(f"AP50 {group} / joint" for group in GROUPS)]


def row_of(summary: Summary) -> list[str]:
    """Return a summary in the order of :func:`columns_of`."""
    measures = ("ap50", "ap", "iou")
    minutes = f"{(summary.mean['seconds'] or 0) / 60:.1f}"
    if summary.step == 0:
        return [summary.preset, *(_percent(summary, f"{measure}_all") for measure in measures), minutes]
    names = [f"{measure}_{group}" for measure in measures for group in GROUPS]
    ratios = [_written(summary, f"ap50_{group}_to_joint", 1, 2) for group in GROUPS]
    return [summary.preset, *(_percent(summary, name) for name in (*names, "forgetting")), minutes, *ratios]


def published_rows(
    plan: Plan, summaries: Sequence[Summary], published: PublishedScenario, step: int
) -> list[tuple[str, ...]]:
    """Hold measured and reported values side by side: one row per method, "old / new / all" in each cell."""
    counts = tuple(len(names) for names in plan.steps[: step + 1])
    results = published.after_step(step, plan.num_steps)
    measured = {summary.preset: summary for summary in summaries if summary.step == step}
    rows = []
    for result in results:
        summary = measured.get(result.preset)
        cells: list[str] = []
        for measure in ("ap50", "ap9", "iou"):
            cells += [
                _three([summary.mean[f"{measure}_{group}"] for group in GROUPS]) if summary else "-",
                _reported(result.means(measure, counts)),
            ]
        rows.append((f"{result.method} ({result.supervision})", *cells))
    return rows


PUBLISHED_COLUMNS = ("method", "AP50", "reported", "AP .5:.9", "reported", "mIoU", "reported")


def _published_lines(plan: Plan, summaries: Sequence[Summary], published: PublishedScenario) -> list[str]:
    lines = []
    for step in sorted({summary.step for summary in summaries}):
        rows = published_rows(plan, summaries, published, step)
        if rows:
            lines += ["", f"## Beside the publication, after step {step}", ""]
            lines += [f"{published.data}; old / new / all classes. Reported are single runs (CL4WSIS, ICCV 2023).", ""]
            lines += _table(PUBLISHED_COLUMNS, rows)
    return lines


def _forgotten(reports: Mapping[int, EvaluationReport]) -> float | None:
    """Return the mean drop of old classes; None unless the introduction of every one of them was measured."""
    lost = forgetting(reports)
    return None if None in lost.classes.values() else lost.mean


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def _first_difference(found: Any, wanted: Any, ignored: set[str], path: str = "") -> str | None:
    if path in ignored:
        return None
    if not (isinstance(found, Mapping) and isinstance(wanted, Mapping)):
        return None if found == wanted else f"{path} was {found!r} and is now {wanted!r}"
    for name in dict.fromkeys((*found, *wanted)):
        below = _first_difference(found.get(name), wanted.get(name), ignored, f"{path}.{name}" if path else name)
        if below is not None:
            return below
    return None


def _csv_values(values: Values) -> list[str]:
    return ["" if (value := values.get(name)) is None else f"{value:.5g}" for name in VALUE_NAMES]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def _percent(summary: Summary, name: str) -> str:
    return _written(summary, name, 100, 1)


def _written(summary: Summary, name: str, factor: float, digits: int) -> str:
    mean, std = summary.mean[name], summary.std[name]
    if mean is None:
        return "-"
    spread = "" if std is None else f" ± {factor * std:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}"


def _three(values: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def _reported(means: PublishedMeans) -> str:
    if all(value is None for value in means):
        return "-"
    return " / ".join("-" if value is None else f"{value:.1f}" for value in means)


def _budget(plan: Plan) -> str:
    recipe = plan.recipe
    epochs = f"{recipe.base.epochs} epochs in step 0, {recipe.semantic.epochs} + {recipe.instance.epochs} afterwards"
    return f"{recipe.network.encoder}, crops of {recipe.crop_size} px, {epochs}."


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
