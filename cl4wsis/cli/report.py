"""Tables of what was measured: one step, or all steps of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl4wsis.metrics import EvaluationReport, GroupMeans

_GROUPS = ("old", "new", "all")


def print_step(folder: Path, as_json: bool) -> None:
    """Print what ``step.json`` says of a trained step: time and, if it was measured, every class."""
    from cl4wsis.cli.console import note, print_json
    from cl4wsis.metrics import EvaluationReport
    from cl4wsis.steps import read_step

    info = read_step(folder)
    if as_json:
        print_json({"folder": str(folder), "seconds": info.seconds, "metrics": info.metrics or None})
        return
    minutes = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in info.seconds.items())
    note(f"step {info.step} is in {folder} ({minutes})")
    if info.metrics:
        print_report(EvaluationReport.model_validate(info.metrics), f"step {info.step} of {info.plan.name}")


def print_report(report: "EvaluationReport", title: str) -> None:
    """Print AP and IoU of each class and group, in percent."""
    from cl4wsis.cli.console import print_table

    rows: list[tuple[object, ...]] = [
        (c.name, c.num_instances, *map(percent, (c.ap50, c.ap, c.ap9, c.coco_ap, c.iou))) for c in report.classes
    ]
    measures = (report.ap50, report.ap, report.ap9, report.coco_ap, report.iou)
    for group in _GROUPS:
        if group == "old" and not report.num_old_classes:
            continue
        rows.append((f"mean {group}", None, *(percent(getattr(means, group)) for means in measures)))
    columns = ("class", "objects#", "AP50#", "AP#", "AP .5:.9#", "COCO AP#", "IoU#")
    print_table(f"{title}, {report.num_images} images; mean IoU of all with background", columns, rows)


def print_steps(reports: Mapping[str, Mapping[int, "EvaluationReport"]], title: str) -> None:
    """Print AP50, AP and IoU of old, new and all classes after each step, and what was forgotten.

    Args:
        reports: by name of the run or method, then by step.
        title: line above the table.
    """
    from cl4wsis.cli.console import print_table

    rows = [row for name, steps in reports.items() for row in _step_rows(name, steps)]
    columns = ["", "step"]
    columns += [f"{measure} {group}#" for measure in ("AP50", "AP", "mIoU") for group in _GROUPS]
    print_table(title, [*columns, "forgotten#"], rows)


def print_variants(reports: Mapping[str, "EvaluationReport"], title: str) -> None:
    """Print AP50, AP and IoU of old, new and all classes of several measurements of one step."""
    from cl4wsis.cli.console import print_table

    columns = [f"{measure} {group}#" for measure in ("AP50", "AP", "mIoU") for group in _GROUPS]
    rows = [
        (name, *(value for means in (report.ap50, report.ap, report.iou) for value in _groups(means)))
        for name, report in reports.items()
    ]
    print_table(title, ["", *columns], rows)


def steps_as_json(reports: Mapping[str, Mapping[int, "EvaluationReport"]]) -> dict[str, Any]:
    """Return the same for machines: reports and forgetting by name and step."""
    from cl4wsis.metrics import forgetting

    return {
        name: {
            "steps": {str(step): report.model_dump(mode="json") for step, report in steps.items()},
            "forgetting": {
                str(step): forgetting({s: r for s, r in steps.items() if s <= step}).model_dump(mode="json")
                for step in steps
            },
        }
        for name, steps in reports.items()
    }


def percent(value: float | None) -> str | None:
    """Write a fraction in percent with one decimal."""
    return None if value is None else f"{100 * value:.1f}"


def _step_rows(name: str, steps: Mapping[int, "EvaluationReport"]) -> list[tuple[object, ...]]:
    from cl4wsis.metrics import forgetting

    rows: list[tuple[object, ...]] = []
    for step, report in sorted(steps.items()):
        lost = forgetting({s: r for s, r in steps.items() if s <= step}).mean
        values = [value for means in (report.ap50, report.ap, report.iou) for value in _groups(means)]
        rows.append((name, step, *values, percent(lost)))
    return rows


def _groups(means: "GroupMeans") -> list[str | None]:
    return [percent(getattr(means, group)) for group in _GROUPS]
