"""``cl4wsis compare``: train presets on one plan over several seeds and hold them against each other."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cl4wsis.cli.options import DeviceOption, JsonOption, PlanArgument, SetOption, launch_fabric

if TYPE_CHECKING:
    from cl4wsis.comparison import Measurement, Summary
    from cl4wsis.tasks import Plan

PLAN_ITSELF = "plan"
"""Stands for the plan's own recipe among the presets."""


class ManyValuesCommand(TyperCommand):
    """A command whose repeatable options take every word up to the next option: ``--seeds 1 2 3``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its words, then parse as usual."""
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, list(_spelled_out(args, repeatable)))


def _spelled_out(words: Sequence[str], repeatable: set[str]) -> Iterator[str]:
    option, has_word = None, True
    for word in (*words, "--"):
        if not word.startswith("--"):
            yield from (word,) if option is None else (option, word)
            has_word = True
            continue
        if option is not None and not has_word:
            raise typer.BadParameter(f"{option} needs at least one word, as in --seeds 1 2 3 or --presets ours plus")
        option, has_word = (word if word in repeatable else None), False
        if option is None and word != "--":
            yield word


def compare(
    plan_name: PlanArgument = "shapes",
    presets: Annotated[
        list[str] | None,
        typer.Option(
            help="Presets, shipped ones or TOML files, in one go: --presets ours pam joint. 'plan' is the plan's own "
            "recipe. Not given: plan, fine-tune and joint."
        ),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Seeds, in one go: --seeds 1 2 3. Not given: 1 2 3.")] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Folder of the comparison; runs/<plan name>/compare when not given.")
    ] = None,
    settings: SetOption = None,
    joint_every_step: Annotated[
        bool, typer.Option("--joint-every-step", help="Train joint after every step, not only after the last.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train presets on a plan, with one base step per seed, and write compare.md, compare.csv and compare.png.

    Give the plan first. The run folder holds one run per seed.

    What is trained already is not trained again: an interrupted comparison goes on, presets and seeds can be added.
    """
    from cl4wsis.cli.console import note, print_json
    from cl4wsis.comparison import comparison_markdown, summarize, write_csv
    from cl4wsis.comparison_plot import plot_comparison
    from cl4wsis.errors import require
    from cl4wsis.published import published_for

    chosen = list(dict.fromkeys(presets or [PLAN_ITSELF, "fine-tune", "joint"]))
    numbers = list(dict.fromkeys(seeds or [1, 2, 3]))
    runs = {seed: _load_plans(plan_name, chosen, settings or [], seed) for seed in numbers}
    plan = runs[numbers[0]][0]
    folder = run or Path("runs") / plan.name / "compare"
    require("train")
    measurements = _train_and_read(runs, folder, joint_every_step, device)
    summaries = summarize(measurements)
    published = published_for(plan)
    write_csv(measurements, folder / "compare.csv")
    plot_comparison(summaries, f"{plan.name}, {len(numbers)} seed(s), percent", folder / "compare.png")
    descriptions = _descriptions(chosen)
    text = comparison_markdown(plan, descriptions, summaries, published, "compare.png")
    (folder / "compare.md").write_text(text, encoding="utf-8")
    note(f"{folder} holds compare.md, compare.csv and compare.png")
    if as_json:
        print_json({"folder": str(folder), "measurements": [vars(found) for found in measurements]})
    else:
        _print_tables(plan, summaries)


def _load_plans(
    name: str, presets: Sequence[str], settings: Sequence[str], seed: int
) -> "tuple[Plan, dict[str, Plan]]":
    """Load the plan itself, which trains step 0, and the plan under each preset.

    Raises:
        ConfigError: a file is wrong, or two presets are called alike.
        typer.BadParameter: a setting would undo what a preset does.
    """
    from cl4wsis.errors import ConfigError
    from cl4wsis.presets import preset_name
    from cl4wsis.tasks import load_plan

    overrides = [*settings, f"recipe.seed={seed}"]
    base = load_plan(name, overrides)
    plans: dict[str, Plan] = {}
    for preset in presets:
        label = PLAN_ITSELF if preset == PLAN_ITSELF else preset_name(preset)
        if label in plans:
            raise ConfigError(f"two presets are called '{label}'; their steps would share a folder: rename a file")
        plans[label] = base if preset == PLAN_ITSELF else load_plan(name, overrides, preset)
        if preset != PLAN_ITSELF:
            _check_settings(name, preset, settings, plans[label])
    return base, plans


def _check_settings(name: str, preset: str, settings: Sequence[str], found: "Plan") -> None:
    """Refuse settings of a field that a preset sets itself: the presets would not differ in it any more."""
    from cl4wsis.tasks import load_plan

    plain, wanted = load_plan(name), load_plan(name, preset=preset)
    for field in dict.fromkeys(setting.partition("=")[0].strip() for setting in settings):
        before, expected, value = (_value_of(plan, field) for plan in (plain, wanted, found))
        if before != expected != value:
            raise typer.BadParameter(
                f"--set {field}: preset '{preset}' makes it {expected!r} and would not be itself with {value!r}; set "
                "it in the plan's file, over which presets are laid, or leave it out"
            )


def _value_of(plan: "Plan", field: str) -> Any:
    value: Any = plan
    for part in field.split("."):
        value = getattr(value, part, None)
    return value


def _train_and_read(
    runs: "dict[int, tuple[Plan, dict[str, Plan]]]", folder: Path, joint_every_step: bool, device: str
) -> "list[Measurement]":
    """Train what is missing, the first seed of all presets first, and read what was measured."""
    from cl4wsis.comparison import add_ratios, read_measurements

    jobs = [
        (plan, step, folder / f"seed-{seed}")
        for seed, (base, plans) in runs.items()
        for plan, step in _jobs_of(base, plans, joint_every_step)
    ]
    _train_missing(jobs, device)
    measurements = []
    for seed, (_, plans) in runs.items():
        for label, plan in plans.items():
            steps = [0, *_later_steps(plan, joint_every_step)]
            measurements += read_measurements(folder / f"seed-{seed}", plan.recipe.variant, label, seed, steps)
    order = {label: index for index, label in enumerate(next(iter(runs.values()))[1])}
    return add_ratios(sorted(measurements, key=lambda found: (order[found.preset], found.step, found.seed)))


def _jobs_of(base: "Plan", plans: "dict[str, Plan]", joint_every_step: bool) -> "Iterator[tuple[Plan, int]]":
    yield base, 0
    for plan in plans.values():
        for step in _later_steps(plan, joint_every_step):
            yield plan, step


def _later_steps(plan: "Plan", joint_every_step: bool) -> list[int]:
    """List the steps after step 0 that a preset is trained on; joint training needs none of those before the last."""
    steps = list(range(1, plan.num_steps))
    return steps if plan.recipe.method != "joint" or joint_every_step else steps[-1:]


def _train_missing(jobs: "Sequence[tuple[Plan, int, Path]]", device: str) -> None:
    """Check what is there, then train what is not, in order."""
    from cl4wsis.cli.console import note
    from cl4wsis.comparison import check_same_settings
    from cl4wsis.steps import step_folder

    missing = []
    for plan, step, run in jobs:
        folder = step_folder(run, step, plan.recipe.variant)
        if not folder.exists():
            missing.append((plan, step, run))
            continue
        check_same_settings(folder, plan, step)
    if not missing:
        return
    from cl4wsis_train.trainer import train_step

    plans = {plan.recipe.precision: plan for plan, _, _ in missing}
    fabrics = {precision: launch_fabric(plan, device) for precision, plan in plans.items()}
    _check_data(missing)
    for number, (plan, step, run) in enumerate(missing, start=1):
        name = plan.recipe.preset or PLAN_ITSELF
        note(f"[{number}/{len(missing)}] {run.name}, step {step}" + (f", {name}" if step else ""))
        train_step(plan, step, run, fabric=fabrics[plan.recipe.precision], report=note)


def _check_data(jobs: "Sequence[tuple[Plan, int, Path]]") -> None:
    """Check the data of all trainings, so that the last does not fail on it after hours of the others.

    Presets and seeds share the data of a plan; what a step reads of it depends on the method alone.
    """
    from cl4wsis.cli.console import note
    from cl4wsis.datasets import check_sources
    from cl4wsis.errors import DataError

    note("checking the data")
    distinct = {(step, plan.recipe.method): plan for plan, step, _ in jobs}
    for (step, method), plan in distinct.items():
        try:
            check_sources(plan, step)
        except DataError as error:
            raise DataError(f"step {step} cannot be trained with method {method}: {error}") from error


def _descriptions(presets: Sequence[str]) -> dict[str, str]:
    from cl4wsis.presets import preset_name, shipped_presets

    shipped = shipped_presets()
    texts = {}
    for preset in presets:
        label = PLAN_ITSELF if preset == PLAN_ITSELF else preset_name(preset)
        texts[label] = "the plan's own recipe." if preset == PLAN_ITSELF else shipped.get(preset, f"from {preset}.")
    return texts


def _print_tables(plan: "Plan", summaries: "Sequence[Summary]") -> None:
    from cl4wsis.cli.console import print_table
    from cl4wsis.comparison import PUBLISHED_COLUMNS, columns_of, published_rows, row_of
    from cl4wsis.published import published_for

    last = plan.num_steps - 1
    columns = columns_of(last)
    rows = [row_of(summary) for summary in summaries if summary.step == last]
    print_table(f"{plan.name} after step {last}, percent", [columns[0], *(f"{c}#" for c in columns[1:])], rows)
    published = published_for(plan)
    if published is not None:
        names = [PUBLISHED_COLUMNS[0], *(f"{c}#" for c in PUBLISHED_COLUMNS[1:])]
        title = f"Beside the publication: {published.data}, old / new / all"
        print_table(title, names, published_rows(plan, summaries, published, last))
