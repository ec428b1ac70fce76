"""``cl4wsis train-step``: train one step of a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl4wsis.cli.options import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    MethodOption,
    PresetOption,
    RunOption,
    SetOption,
    launch_fabric,
    load_chosen_plan,
)

if TYPE_CHECKING:
    from cl4wsis.tasks import Plan

_EXPORTED_ENCODERS = ("tf_efficientnet_lite0", "resnet50", "resnet101", "convnextv2_atto")
"""Encoders that the tests export."""


def train_step(
    config: ConfigOption = "shapes",
    step: Annotated[
        int | None, typer.Option(help="Step to train; the first that is not trained yet when not given.")
    ] = None,
    run: RunOption = None,
    settings: SetOption = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    with_previous: Annotated[
        bool, typer.Option("--with-previous", help="Train the steps before this one first where they are missing.")
    ] = False,
    device: DeviceOption = "auto",
    devices: Annotated[
        str, typer.Option(help="Processes on this machine: a number, or auto (all GPUs, or one process on a CPU).")
    ] = "auto",
    export_check: Annotated[
        bool, typer.Option(help="Before step 0, make sure that an unusual encoder can be exported.")
    ] = True,
    evaluate: Annotated[bool, typer.Option(help="Measure the trained network on the plan's evaluation images.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Train one step of a plan, from masks in step 0 and from image tags afterwards."""
    from cl4wsis.cli.console import note
    from cl4wsis.cli.report import print_step
    from cl4wsis.errors import RunError, require
    from cl4wsis.steps import read_plan_step, step_folder, trained_steps

    plan = load_chosen_plan(config, settings, preset, method)
    base_plan = plan if preset is None else load_chosen_plan(config, settings, None, None)
    folder = run or Path("runs") / plan.name
    last = plan.num_steps - 1 if step is None else step
    plan.split(last)
    done = trained_steps(folder, plan.recipe.variant)
    for number in done:
        if number <= last:
            read_plan_step(plan, number, folder)
    if step is None:
        missing = [s for s in range(plan.num_steps) if s not in done]
        if not missing:
            raise RunError(f"all {plan.num_steps} steps of plan '{plan.name}' are trained already, see {folder}")
        step = missing[0]
    require("train")
    from cl4wsis_train.trainer import missing_steps
    from cl4wsis_train.trainer import train_step as train

    if preset is not None and with_previous and plan.recipe.precision != base_plan.recipe.precision:
        raise typer.BadParameter(
            f"--with-previous: preset {preset} trains in {plan.recipe.precision}, step 0 in "
            f"{base_plan.recipe.precision}; train step 0 by itself, without --preset"
        )
    numbers = missing_steps(plan, step, folder) if with_previous else [step]
    fabric = launch_fabric(plan, device, devices)
    if export_check and 0 in numbers and fabric.is_global_zero:
        _check_exportable(base_plan)
    for number in numbers:
        train(plan if number else base_plan, number, folder, fabric=fabric, evaluate=evaluate, report=note)
    if fabric.is_global_zero:
        print_step(step_folder(folder, step, plan.recipe.variant), as_json)


def _check_exportable(plan: "Plan") -> None:
    from cl4wsis.cli.console import note
    from cl4wsis.errors import BundleError, MissingExtraError, require

    encoder = plan.recipe.network.encoder
    if encoder in _EXPORTED_ENCODERS:
        return
    try:
        require("export")
    except MissingExtraError:
        return
    from cl4wsis_export.pack import check_exportable

    note(f"making sure that a network with {encoder} can be exported, before it is trained")
    try:
        check_exportable(plan.recipe.network, plan.recipe.input_size)
    except BundleError as error:
        raise BundleError(f"{error}. Nothing was trained; --no-export-check trains it all the same") from error
