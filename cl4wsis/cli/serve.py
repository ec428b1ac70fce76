"""``cl4wsis serve``: answer HTTP requests with an exported model."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from cl4wsis.cli.options import (
    AllowFallbackOption,
    BackendOption,
    BundleArgument,
    PostChoice,
    PostOption,
    PrecisionChoice,
    PrecisionOption,
    Runtime,
    SelfTestOption,
    ThreadsOption,
)

_MEBIBYTE = 2**20
_MAX_PIXELS = 64
_PIXELS_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"


def serve(
    bundle: BundleArgument = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any that is free.")] = 8000,
    backend: BackendOption = "auto",
    precision: PrecisionOption = PrecisionChoice.AUTO,
    post: PostOption = PostChoice.AUTO,
    allow_fallback: AllowFallbackOption = False,
    self_test: SelfTestOption = False,
    threads: ThreadsOption = None,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that may wait; more are turned away with 503.")
    ] = 16,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Images in one inference request.")] = 8,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Largest request, MiB.")] = 32,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            help=f"Largest image, million pixels; {_MAX_PIXELS} unless the environment says {_PIXELS_VARIABLE}.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer HTTP requests: the Open Inference Protocol v2, and POST /predict for image files.

    Stops on Ctrl-C or SIGTERM, after the requests that are running.
    """
    from cl4wsis.cli.console import note
    from cl4wsis.cli.predict import newest_bundle
    from cl4wsis.errors import require

    require("serve")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # OpenCV reads this once, when it is loaded: an image of few bytes must not unfold into all of the memory.
    if max_pixels is not None or _PIXELS_VARIABLE not in os.environ:
        os.environ[_PIXELS_VARIABLE] = str((max_pixels or _MAX_PIXELS) * 10**6)
    from cl4wsis_serve.app import ServerLimits
    from cl4wsis_serve.app import serve as serve_predictor

    runtime = Runtime(backend, precision, post, threads, allow_fallback, self_test)
    predictor = runtime.open(bundle or newest_bundle(Path("runs")))
    limits = ServerLimits(max_body_bytes=max_body * _MEBIBYTE, max_batch=max_batch, max_waiting=max_waiting)
    serve_predictor(predictor, host, port, limits, lambda address: note(f"listening on {address}"))
