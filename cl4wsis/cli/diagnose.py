"""``cl4wsis diagnose``: what bounds a trained step, found by replacing parts of the network's answer by the truth."""

from pathlib import Path
from typing import Annotated

import typer

from cl4wsis.cli.options import (
    DeviceOption,
    JsonOption,
    MethodOption,
    PlanArgument,
    PresetOption,
    RunOption,
    SetOption,
    load_chosen_plan,
    load_network,
)


def diagnose(
    plan_name: PlanArgument = "shapes",
    step: Annotated[int | None, typer.Option(help="Step to look at; the newest trained one when not given.")] = None,
    run: RunOption = None,
    settings: SetOption = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a trained step with true classes, true centers and true offsets in place of the network's own."""
    from cl4wsis.cli.console import print_json, progress
    from cl4wsis.cli.report import print_variants
    from cl4wsis.errors import RunError
    from cl4wsis.steps import trained_steps

    plan = load_chosen_plan(plan_name, settings, preset, method)
    folder = run or Path("runs") / plan.name
    steps = trained_steps(folder, plan.recipe.variant)
    if not steps:
        raise RunError(
            f"{folder}: holds no trained step; run 'cl4wsis train-step' first, or name the folder with --run"
        )
    step = steps[-1] if step is None else step
    network = load_network(plan, step, folder, device)
    from cl4wsis_train.diagnose import diagnose_network

    with progress("diagnose") as show:
        reports = diagnose_network(network, plan, step, show)
    if as_json:
        print_json({name: report.model_dump(mode="json") for name, report in reports.items()})
    else:
        print_variants(reports, f"step {step} of {plan.name} ({plan.recipe.variant}), percent")
