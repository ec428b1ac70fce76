"""Options that several commands share, so that each is spelled and explained the same everywhere."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from cl4wsis.bundle import Bundle, Post, Precision
    from cl4wsis.tasks import Plan
    from cl4wsis_serve.predictor import Predictor
    from cl4wsis_serve.verify import Choice, Skipped
    from cl4wsis_train.models.network import InstanceSegmenter

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="Plan: a TOML file, or the name of one that comes with cl4wsis.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Set a field of the plan, e.g. recipe.seed=1. Repeatable."),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method", help="cl4wsis, or a supervised baseline: fine-tune or joint. Short for --set recipe.method=..."
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="How later steps learn: ours, plus, pam, wilson, fine-tune, joint, ... or a TOML file. They stand in "
        "<run>/<preset>; step 0 is the plan's own.",
    ),
]
PlanArgument = Annotated[
    str, typer.Argument(metavar="PLAN", help="Plan: a TOML file, or the name of one that comes with cl4wsis.")
]
BundleArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Bundle folder or .onnx file; the newest bundle under runs/ when not given.", show_default=False
    ),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; runs/<plan name> when not given.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


class PrecisionName(StrEnum):
    """Arithmetic of the network."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class PrecisionChoice(StrEnum):
    """Arithmetic of the network to run."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class PostChoice(StrEnum):
    """Where pixels are to be grouped."""

    AUTO = "auto"
    GRAPH = "graph"
    HOST = "host"


class PostName(StrEnum):
    """Where pixels are grouped into instances."""

    GRAPH = "graph"
    HOST = "host"


BackendOption = Annotated[str, typer.Option("--backend", help="auto, or a backend that 'cl4wsis doctor' lists.")]
PrecisionOption = Annotated[
    PrecisionChoice,
    typer.Option("--precision", help="Arithmetic of the network; auto is fp32. The bundle must hold it."),
]
PostOption = Annotated[
    PostChoice,
    typer.Option("--post", help="Where pixels are grouped; auto: on the host beside a CPU, in the graph on a GPU."),
]
BackendsOption = Annotated[
    list[str] | None,
    typer.Option("--backend", help="This backend alone; all that work here when not given. Repeatable."),
]
PrecisionsOption = Annotated[
    list[PrecisionName] | None,
    typer.Option("--precision", help="These graphs alone; all in the bundle when not given. Repeatable."),
]
PostsOption = Annotated[
    list[PostName] | None,
    typer.Option("--post", help="Graphs with the grouping there alone; both when not given. Repeatable."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; all usable cores when not given.")
]
AllowFallbackOption = Annotated[
    bool, typer.Option("--allow-fallback", help="Use another backend where the one asked for, or a GPU, does not work.")
]

SelfTestOption = Annotated[
    bool,
    typer.Option(
        "--self-test", help="First compare the answers to the bundle's golden inputs with those stored in it."
    ),
]


class Runtime(NamedTuple):
    """What the options say about how a bundle is to be run."""

    backend: str = "auto"
    precision: PrecisionChoice = PrecisionChoice.AUTO
    post: PostChoice = PostChoice.AUTO
    threads: int | None = None
    allow_fallback: bool = False
    self_test: bool = False

    def open(self, bundle: Path) -> "Predictor":
        """Open a bundle so, telling on stderr what was chosen and what was passed over.

        Raises:
            BundleError: the bundle is missing, damaged, not one of ours, or holds no such graph.
            BackendError: the backend is unknown, cannot run here or fails the self-test.
        """
        from cl4wsis.bundle import PRECISION_OPTIONS
        from cl4wsis.cli.console import note, note_once
        from cl4wsis_serve.predictor import Predictor

        spelled = {PrecisionChoice(option): precision for precision, option in PRECISION_OPTIONS.items()}
        predictor = Predictor.open(
            bundle,
            self.backend,
            precision=spelled.get(self.precision, "auto"),
            post=self.post.value,
            threads=self.threads,
            allow_fallback=self.allow_fallback,
            self_test=self.self_test,
        )
        precision = PRECISION_OPTIONS[predictor.precision]
        note(f"{bundle} on {predictor.backend.name}, {precision}, grouping: {predictor.post}")
        if predictor.skipped:
            note_once(f"passed over: {', '.join(predictor.skipped)} (see 'cl4wsis doctor', or --json for the reasons)")
        return predictor


def read_precisions(names: Sequence[PrecisionName] | None) -> "list[Precision]":
    """Return the precisions of these names, each once, in the order of the manifest."""
    from cl4wsis.bundle import PRECISION_OPTIONS

    return [precision for precision, name in PRECISION_OPTIONS.items() if name in (names or ())]


def open_choices(
    bundle: Path | None,
    backends: Sequence[str] | None,
    precisions: Sequence[PrecisionName] | None,
    posts: Sequence[PostName] | None,
) -> "tuple[Bundle, list[Choice], list[Skipped]]":
    """Open a bundle, and combine its graphs with the backends of this machine as the options say.

    Raises:
        BundleError: the bundle is missing, damaged or not one of ours.
        BackendError: a backend that was asked for is unknown or does not work here.
    """
    from cl4wsis.bundle import open_bundle
    from cl4wsis.cli.predict import newest_bundle
    from cl4wsis_serve.verify import choose

    opened = open_bundle(bundle or newest_bundle(Path("runs")))
    places: list[Post] = [name.value for name in posts or ()]
    choices, skipped = choose(opened, backends or (), read_precisions(precisions), places)
    return opened, choices, skipped


def load_chosen_plan(config: str, settings: list[str] | None, preset: str | None, method: str | None) -> "Plan":
    """Load the plan that ``--config``, ``--set``, ``--preset`` and ``--method`` describe.

    A preset has a method of its own. Steps of another method would stand in the preset's folder, where later steps
    take them for the preset's.

    Raises:
        ConfigError: a file is missing or wrong.
        typer.BadParameter: preset and method contradict each other.
    """
    from cl4wsis.tasks import load_plan

    overrides = [*(settings or []), *([f"recipe.method={method}"] if method else [])]
    plan = load_plan(config, overrides, preset)
    if preset is None:
        return plan
    others = [setting for setting in overrides if setting.partition("=")[0].strip() != "recipe.method"]
    expected = load_plan(config, others, preset).recipe.method
    if plan.recipe.method != expected:
        raise typer.BadParameter(
            f"--preset {preset} has the method {expected}, not {plan.recipe.method}; give one of them, not both"
        )
    return plan


def launch_fabric(plan: "Plan", device: str, devices: str = "1") -> "Fabric":
    """Build and launch the fabric that ``--device`` and ``--devices`` describe.

    Raises:
        RunError: there is no such device here, or not so many of them.
    """
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from cl4wsis.errors import RunError
    from cl4wsis_train.trainer import build_fabric

    try:
        return build_fabric(plan, device, int(devices) if devices.isdecimal() else devices)
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        several, rule = "", ""
        if devices != "1":
            several = f" with --devices {devices}"
            rule = ", and --devices auto or a number from 1, on GPUs at most as many as there are"
        raise RunError(
            f"--device {device}{several} cannot be used here ({reason}): --device takes auto, cpu, cuda or mps{rule}"
        ) from error


def load_network(plan: "Plan", step: int, run: Path, device: str) -> "InstanceSegmenter":
    """Load what a step of a plan was trained to, on the device named, and say if it would be measured at another size.

    Raises:
        ConfigError: the plan has no such step.
        RunError: the step is not trained, cannot be read, or is of another plan; or there is no such device here.
        MissingExtraError: torch is not installed.
    """
    from cl4wsis.cli.console import note
    from cl4wsis.errors import require
    from cl4wsis.steps import read_plan_step, step_folder

    trained = read_plan_step(plan, step, run).plan.recipe.input_size
    require("train")
    from cl4wsis_train.checkpoint import load_step

    height, width = plan.recipe.input_size
    if trained != (height, width):
        note(
            f"step {step} was trained, and is exported, for {trained[0]}x{trained[1]} px and is measured at "
            f"{height}x{width} px here (height x width), as the plan says; for the former give "
            f"--set recipe.input_size=[{trained[0]},{trained[1]}]"
        )
    network, _ = load_step(step_folder(run, step, plan.recipe.variant))
    return network.to(launch_fabric(plan, device).device)
