"""Options that several commands share, so that each is spelled and explained the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

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
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; runs/<plan name> when not given.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
