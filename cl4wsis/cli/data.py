"""``cl4wsis data check``: count the images of every step of a plan, and find what is broken before training does."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cl4wsis.cli.options import JsonOption, PlanArgument, SetOption

if TYPE_CHECKING:
    from cl4wsis.datasets import DataReport, Finding

_LISTED_FINDINGS = 30


def check(
    plan_name: PlanArgument,
    settings: SetOption = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Print every finding instead of the first of each kind.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count images and objects per step and class, and check every image and mask; exit code 1 if any is broken."""
    from cl4wsis.cli.console import print_json, progress
    from cl4wsis.datasets import check_plan
    from cl4wsis.tasks import load_plan

    plan = load_plan(plan_name, settings or [])
    with progress("check") as show:
        report = check_plan(plan, show)
    if as_json:
        print_json(report.model_dump(mode="json") | {"is_broken": report.is_broken})
    else:
        _print_report(report, show_all)
    if report.is_broken:
        raise typer.Exit(1)


def _print_report(report: "DataReport", show_all: bool) -> None:
    from cl4wsis.cli.console import print_table

    columns = ("step#", "learns from", "images#", "of#", "with old classes#", "with later classes#", "unusable#")
    rows = [
        (s.step, s.learns_from, s.images, s.source_images, s.with_old, s.with_later, s.unusable) for s in report.steps
    ]
    print_table(f"plan {report.plan}, {report.selection}", columns, rows)
    evaluation = report.evaluation
    title = "evaluation: none"
    if evaluation is not None:
        title = (
            f"evaluation: {evaluation.images} images, {evaluation.without_objects} of them without a class of the plan"
        )
    class_columns = ("step#", "class", "images#", "objects#", "evaluation images#", "evaluation objects#")
    print_table(f"Classes ({title})", class_columns, _class_rows(report))
    _print_findings(report.findings, show_all)


def _class_rows(report: "DataReport") -> Iterator[tuple[object, ...]]:
    measured = {} if report.evaluation is None else {count.name: count for count in report.evaluation.classes}
    for step in report.steps:
        for count in step.classes:
            known = measured.get(count.name)
            yield (
                *(step.step, count.name, count.images, count.instances),
                *((known.images, known.instances) if known is not None else (None, None)),
            )


def _print_findings(findings: Sequence["Finding"], show_all: bool) -> None:
    """Print what is broken, then what is worth a look, each with its number."""
    from cl4wsis.cli.console import results_console

    console = results_console()
    for is_broken, heading in ((True, "broken"), (False, "worth a look")):
        chosen = [finding for finding in findings if finding.is_broken == is_broken]
        if not chosen:
            continue
        kinds = ", ".join(f"{kind} {number}" for kind, number in Counter(f.kind for f in chosen).items())
        console.print(f"{heading}: {len(chosen)} ({kinds})", style="bold")
        for finding in chosen if show_all else _first_of_each_kind(chosen):
            console.print(f"  {finding.where}: {finding.kind}: {finding.message}", soft_wrap=True)
    if not any(finding.is_broken for finding in findings):
        console.print("nothing is broken")


def _first_of_each_kind(findings: Sequence["Finding"]) -> Iterator["Finding"]:
    kinds = Counter(finding.kind for finding in findings)
    limit = max(1, _LISTED_FINDINGS // len(kinds))
    shown: Counter[str] = Counter()
    for finding in findings:
        shown[finding.kind] += 1
        if shown[finding.kind] <= limit:
            yield finding
