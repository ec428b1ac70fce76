"""``cl4wsis demo``: the whole story on drawn shapes, from step 0 to exported bundles and pictures."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl4wsis.cli.options import ConfigOption, DeviceOption, JsonOption, RunOption, SetOption, launch_fabric

if TYPE_CHECKING:
    from cl4wsis.metrics import EvaluationReport
    from cl4wsis.tasks import Plan

_NUM_PICTURES = 12


def demo(
    config: ConfigOption = "shapes",
    run: RunOption = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also fine-tune on masks of each step's new classes, to see forgetting.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every step of a plan, export each, predict pictures with the last and show what was learned and forgotten.

    Steps that are trained already are not trained again, so an interrupted demo goes on where it stopped.
    """
    from cl4wsis.cli.console import note, print_json
    from cl4wsis.cli.evaluate import evaluate_bundle
    from cl4wsis.cli.report import print_steps, steps_as_json
    from cl4wsis.errors import require
    from cl4wsis.steps import trained_steps
    from cl4wsis.tasks import load_plan

    require("export")
    require("cpu")
    start = time.monotonic()
    plan = load_plan(config, settings or [])
    folder = run or Path("runs") / plan.name
    train_all(plan, folder, device)
    steps = [step for step in trained_steps(folder, plan.recipe.variant) if step < plan.num_steps]
    bundles = {step: export_once(plan, step, folder) for step in steps}
    reports = {"exported model": {step: evaluate_bundle(path, plan) for step, path in bundles.items()}}
    if baseline:
        tuned = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"method": "fine-tune"})})
        train_all(tuned, folder, device)
        reports["fine-tuned"] = measured_steps(tuned, folder)
    pictures, number = predict_pictures(bundles[plan.num_steps - 1], plan, folder / "pictures")
    note(f"{pictures} holds overlays, id maps and a COCO file of {number} pictures")
    if as_json:
        print_json({**steps_as_json(reports), "seconds": round(time.monotonic() - start, 1)})
    else:
        print_steps(reports, f"{plan.name}, {(time.monotonic() - start) / 60:.1f} minutes, percent")


def train_all(plan: "Plan", run: Path, device: str) -> None:
    """Train the steps of a plan that are not trained yet."""
    from cl4wsis.cli.console import note
    from cl4wsis.comparison import check_same_settings
    from cl4wsis.steps import read_plan_step, step_folder, trained_steps
    from cl4wsis_train.trainer import missing_steps, train_step

    for step in trained_steps(run, plan.recipe.variant):
        if step < plan.num_steps:
            read_plan_step(plan, step, run)
            check_same_settings(step_folder(run, step, plan.recipe.variant), plan, step)
    missing = missing_steps(plan, plan.num_steps - 1, run)
    fabric = launch_fabric(plan, device, "auto") if missing else None
    for step in missing:
        names = ", ".join(plan.split(step).new_names)
        knowledge = "masks" if plan.learns_from_masks(step) else "image tags alone"
        note(f"step {step}: {names} from {knowledge}")
        train_step(plan, step, run, fabric=fabric, report=note)


def export_once(plan: "Plan", step: int, run: Path) -> Path:
    """Export a step, unless a bundle of the same weights is there already."""
    from cl4wsis.bundle import open_bundle
    from cl4wsis.cli.console import note
    from cl4wsis.steps import read_step, step_folder
    from cl4wsis_export import ExportSpec, export_step

    folder = step_folder(run, step, plan.recipe.variant)
    destination = folder.parent / f"{plan.name}-step{step}.cl4wsis"
    if destination.exists() and open_bundle(destination).manifest.weights_sha256 == read_step(folder).weights_sha256:
        return destination
    note(f"step {step}: exporting and verifying {destination}")
    return export_step(folder, destination, ExportSpec())


def measured_steps(plan: "Plan", run: Path) -> dict[int, "EvaluationReport"]:
    """Read the reports that training left in the step folders."""
    from cl4wsis.metrics import EvaluationReport
    from cl4wsis.steps import read_step, step_folder, trained_steps

    variant = plan.recipe.variant
    infos = {step: read_step(step_folder(run, step, variant)) for step in trained_steps(run, variant)}
    return {step: EvaluationReport.model_validate(info.metrics) for step, info in infos.items() if info.metrics}


def predict_pictures(bundle: Path, plan: "Plan", folder: Path) -> tuple[Path, int]:
    """Write the first evaluation images to files and predict them as a user would.

    Returns:
        The folder of the results, and the number of images.
    """
    from cl4wsis.cli.predict import FORMATS, predict_sources
    from cl4wsis.datasets import load_evaluation_set
    from cl4wsis.images import write_png

    samples = load_evaluation_set(plan, plan.num_steps - 1)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    chosen = samples[:_NUM_PICTURES]
    for index, sample in enumerate(chosen):
        write_png(images / f"{index:03d}.png", sample.image)
    predict_sources([str(images)], bundle, folder / "masks", list(FORMATS))
    return folder / "masks", len(chosen)
