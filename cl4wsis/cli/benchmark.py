"""``cl4wsis benchmark``: what a bundle costs on this machine, stage by stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl4wsis.cli.options import (
    BackendsOption,
    BundleArgument,
    JsonOption,
    PostsOption,
    PrecisionsOption,
    ThreadsOption,
    open_choices,
)

if TYPE_CHECKING:
    from cl4wsis.bundle import Bundle
    from cl4wsis_serve.benchmark import BenchmarkReport

_ENDINGS = (".md", ".json")


def benchmark(
    bundle: BundleArgument = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Images per batch: one number, or several separated by commas.")
    ] = "1,4,8",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Batches of each size that are measured.")] = 20,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="Image file, folder or pattern; golden inputs when not given. Repeatable."),
    ] = None,
    backend: BackendsOption = None,
    precision: PrecisionsOption = None,
    post: PostsOption = None,
    threads: ThreadsOption = None,
    out: Annotated[
        list[Path] | None,
        typer.Option("--out", "-o", help="Also write the result to a .md or .json file. Repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure every graph of a bundle on every backend of this machine, in turns: times, images per second, memory."""
    from cl4wsis.cli.console import note, print_json, progress
    from cl4wsis.cli.doctor import gpu_names
    from cl4wsis_serve.benchmark import benchmark_bundle

    batches = _parse_batches(batch)
    for path in out or ():
        if path.suffix not in _ENDINGS:
            raise typer.BadParameter(f"--out {path}: expected a name that ends in {' or '.join(_ENDINGS)}")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"--out {path}: there is no folder {path.parent}")
    opened, choices, skipped = open_choices(bundle, backend, precision, post)
    files, description = _find_files(opened, images)
    with progress("benchmark") as show:
        report = benchmark_bundle(
            opened,
            files,
            description,
            choices,
            batches,
            repeats,
            threads,
            gpu_names(),
            skipped,
            show,
        )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _print(report)
    for path in out or ():
        _write(path, report)
        note(f"written to {path}")


def _parse_batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--batch {text}: expected positive numbers separated by commas, for example 1,4,8")
    return [int(part) for part in parts]


def _find_files(bundle: "Bundle", images: list[str] | None) -> tuple[list[Path], str]:
    from cl4wsis.errors import BundleError
    from cl4wsis_serve.files import find_images

    if images:
        files = [image.path for image in find_images(images)]
        return files, f"{len(files)} images of {', '.join(images)}"
    files = [bundle.path / case.image for case in bundle.manifest.golden]
    if not files:
        raise BundleError(f"{bundle.path}: has no golden inputs; give images with --images")
    return files, f"{len(files)} golden inputs"


def _write(path: Path, report: "BenchmarkReport") -> None:
    from cl4wsis.images import write_bytes_atomically
    from cl4wsis_serve.benchmark import markdown_from_report

    text = markdown_from_report(report) if path.suffix == ".md" else report.model_dump_json(indent=1) + "\n"
    write_bytes_atomically(path, text.encode())


def _print(report: "BenchmarkReport") -> None:
    from cl4wsis.cli.console import note, print_table
    from cl4wsis_serve.benchmark import STAGES

    machine = report.hardware
    title = f"{report.bundle}, {report.images}, ms per batch: p50 (p95); {machine.cpu}, {report.threads} threads"
    columns = ["batch#", "backend", "precision", "post", *(f"{stage}#" for stage in STAGES), "images/s#", "MiB#"]
    rows = [
        (
            row.batch,
            row.backend,
            row.precision,
            row.post,
            *(f"{row.stages[stage].p50:.1f} ({row.stages[stage].p95:.1f})" for stage in STAGES),
            f"{row.images_per_second:.1f}",
            f"{row.peak_memory_mib:.0f}",
        )
        for row in report.rows
    ]
    print_table(title, columns, rows)
    for what, reason in report.skipped.items():
        note(f"not measured: {what}: {reason}")
