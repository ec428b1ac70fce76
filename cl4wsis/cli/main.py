"""``cl4wsis``: the commands, and what happens when one fails.

Importing the commands is cheap: they import what they work with when they run. An error written for the person at the
keyboard is one sentence on stderr and exit code 1; a wrong option is 2; an interruption is 130.
"""

import errno
import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cl4wsis import __version__
from cl4wsis.cli.benchmark import benchmark
from cl4wsis.cli.compare import ManyValuesCommand, compare
from cl4wsis.cli.convert import convert_encoder
from cl4wsis.cli.data import check as check_data
from cl4wsis.cli.demo import demo
from cl4wsis.cli.diagnose import diagnose
from cl4wsis.cli.doctor import doctor
from cl4wsis.cli.evaluate import evaluate
from cl4wsis.cli.export import export
from cl4wsis.cli.inspect import inspect
from cl4wsis.cli.predict import predict
from cl4wsis.cli.serve import serve
from cl4wsis.cli.train import train_step
from cl4wsis.cli.verify import verify
from cl4wsis.errors import Cl4wsisError

app = typer.Typer(
    name="cl4wsis",
    help="Teach an instance-segmentation model new classes from image tags, and deploy every step as one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> None:
    """Run the command line; the entry point of the ``cl4wsis`` script."""
    app()


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    pass


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cl4wsis {__version__}")
        raise typer.Exit


def _with_plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Cl4wsisError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except OSError as error:  # of a folder or disk that the command cannot go on without
            if error.errno is None or error.errno == errno.EPIPE:  # the latter is the reader's business, as in "| head"
                raise
            typer.echo(f"error: {_describe(error)}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted; what was finished before is kept", err=True)
            raise typer.Exit(130) from error

    return wrapped


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    place = f"{error.filename}: {reason}" if error.filename else reason
    return f"{place}; check the place, its permissions and the space on its disk, then run the command again"


for _name, _command in (
    ("train-step", train_step),
    ("evaluate", evaluate),
    ("export", export),
    ("predict", predict),
    ("serve", serve),
    ("verify", verify),
    ("benchmark", benchmark),
    ("demo", demo),
    ("diagnose", diagnose),
    ("inspect", inspect),
    ("convert-encoder", convert_encoder),
    ("doctor", doctor),
):
    app.command(_name)(_with_plain_errors(_command))

app.command("compare", cls=ManyValuesCommand)(_with_plain_errors(compare))
_data_app = typer.Typer(help="Look at the data of a plan before training on it.", no_args_is_help=True)
_data_app.command("check")(_with_plain_errors(check_data))
app.add_typer(_data_app, name="data")
