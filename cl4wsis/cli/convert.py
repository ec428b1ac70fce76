"""``cl4wsis convert-encoder``: encoder weights of in-place activated batch normalisation for plain normalisation."""

from pathlib import Path
from typing import Annotated

import typer

from cl4wsis.cli.options import JsonOption


def convert_encoder(
    source: Annotated[
        Path,
        typer.Argument(help="Checkpoint of the in-place ABN project (.pth, .pth.tar): ResNet or WiderResNet-38."),
    ],
    destination: Annotated[Path, typer.Argument(help=".safetensors file to write, for recipe.network.weights.")],
    as_json: JsonOption = False,
) -> None:
    """Convert an ImageNet checkpoint with in-place activated batch normalisation to initial encoder weights."""
    from cl4wsis.cli.console import print_fields, print_json
    from cl4wsis.errors import require

    require("train")
    from cl4wsis_train.convert import convert_encoder as convert

    converted = convert(source, destination)
    if as_json:
        print_json(converted._asdict())
        return
    print_fields(
        f"encoder {converted.encoder}",
        [
            ("file", converted.path),
            ("tensors", converted.num_tensors),
            ("parameters", f"{converted.num_parameters / 1e6:.1f} M"),
            ("use", f"--set recipe.network.encoder={converted.encoder} --set recipe.network.weights={converted.path}"),
        ],
    )
