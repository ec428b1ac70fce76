"""``cl4wsis evaluate``: measure an exported bundle, or a trained step, on a plan's evaluation images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl4wsis.cli.options import (
    AllowFallbackOption,
    BackendOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    MethodOption,
    PostChoice,
    PostOption,
    PrecisionChoice,
    PrecisionOption,
    PresetOption,
    RunOption,
    Runtime,
    SetOption,
    ThreadsOption,
    load_chosen_plan,
    load_network,
)

if TYPE_CHECKING:
    from cl4wsis.metrics import EvaluationReport
    from cl4wsis.tasks import Plan


def evaluate(
    config: ConfigOption = "shapes",
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", "-b", help="Bundle folder or .onnx file; the run's newest bundle when not given."),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Measure the trained network of this step instead of a bundle (needs torch).")
    ] = None,
    preset: PresetOption = None,
    method: MethodOption = None,
    run: RunOption = None,
    settings: SetOption = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = PrecisionChoice.AUTO,
    post: PostOption = PostChoice.AUTO,
    allow_fallback: AllowFallbackOption = False,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure AP and IoU per class on the plan's evaluation images; a bundle needs no torch."""
    from cl4wsis.cli.console import print_json
    from cl4wsis.cli.predict import newest_bundle
    from cl4wsis.cli.report import print_report
    from cl4wsis.steps import step_folder

    plan = load_chosen_plan(config, settings, preset, method)
    folder = run or Path("runs") / plan.name
    runtime = Runtime(backend, precision, post, threads, allow_fallback)
    if step is None:
        if device != "auto":
            raise typer.BadParameter("--device: for --step; a bundle runs on what --backend says")
        # Other presets and methods have bundles of their own in folders below.
        path = bundle or newest_bundle(step_folder(folder, plan.num_steps - 1, plan.recipe.variant).parent, below=False)
        report, title = evaluate_bundle(path, plan, runtime), str(path)
    elif bundle is not None:
        raise typer.BadParameter("give --bundle or --step, not both")
    else:
        _refuse_runtime(runtime)
        report, title = _evaluate_step(plan, step, folder, device), f"step {step} of {plan.name}"
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        print_report(report, title)


def evaluate_bundle(path: Path, plan: "Plan", runtime: Runtime | None = None) -> "EvaluationReport":
    """Measure a bundle through the runtime, with a progress bar."""
    from cl4wsis.cli.console import progress
    from cl4wsis_serve.evaluate import evaluate_predictor

    predictor = (runtime or Runtime()).open(path)
    with progress("evaluate") as show:
        return evaluate_predictor(predictor, plan, show)


def _refuse_runtime(runtime: Runtime) -> None:
    """Refuse options that would have no effect."""
    unchanged = Runtime()
    names = [f for f in Runtime._fields if getattr(runtime, f) != getattr(unchanged, f)]
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise typer.BadParameter(f"{options}: for the evaluation of a bundle, not for --step")


def _evaluate_step(plan: "Plan", step: int, run: Path, device: str) -> "EvaluationReport":
    from cl4wsis.cli.console import progress

    network = load_network(plan, step, run, device)
    from cl4wsis_train.evaluate import evaluate_network

    with progress("evaluate") as show:
        return evaluate_network(network, plan, step, show)
