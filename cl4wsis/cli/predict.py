"""``cl4wsis predict``: instances of image files, written as id maps, COCO RLE and overlays."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl4wsis.cli.options import (
    AllowFallbackOption,
    BackendOption,
    JsonOption,
    PostChoice,
    PostOption,
    PrecisionChoice,
    PrecisionOption,
    Runtime,
    SelfTestOption,
    ThreadsOption,
)

if TYPE_CHECKING:
    from cl4wsis_serve.predictor import Predictor
    from cl4wsis_serve.writers import IdsWriter, ImageFile, Writer

FORMATS = ("ids", "coco", "overlay")


def predict(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders (searched recursively) and glob patterns.", show_default=False),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", "-b", help="Bundle folder or .onnx file; the newest bundle under runs/ when not given."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("masks"),
    save: Annotated[
        str, typer.Option("--save", help=f"What to write, separated by commas: {', '.join(FORMATS)}.")
    ] = ",".join(FORMATS),
    backend: BackendOption = "auto",
    precision: PrecisionOption = PrecisionChoice.AUTO,
    post: PostOption = PostChoice.AUTO,
    allow_fallback: AllowFallbackOption = False,
    self_test: SelfTestOption = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images per run of the graph.")] = 1,
    threads: ThreadsOption = None,
    min_score: Annotated[
        float, typer.Option("--min-score", min=0.0, max=1.0, help="Leave out instances with a lower score.")
    ] = 0.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip images that --out holds complete id maps of, by this model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the instances in images with an exported model; torch is not needed.

    An image that cannot be read is reported and skipped, and the exit code is 1 at the end.
    """
    from cl4wsis.bundle import SUFFIX

    formats = _parse_formats(save)
    if not sources:
        raise typer.BadParameter("give images: files, folders or patterns, for example: cl4wsis predict photos/")
    models = [source for source in sources if source.rstrip("/").endswith((SUFFIX, ".onnx"))]
    if models:
        raise typer.BadParameter(f"{models[0]} is a model, not an image: give it with --bundle {models[0]}")
    if resume and "ids" not in formats:
        raise typer.BadParameter("--resume reads the id maps of the earlier run, so --save must contain 'ids'")

    path = bundle or newest_bundle(Path("runs"))
    runtime = Runtime(backend, precision, post, threads, allow_fallback, self_test)
    summary = predict_sources(sources, path, out, formats, runtime, batch_size, min_score, resume)
    _report(summary, as_json)
    if summary["failed"]:
        raise typer.Exit(1)


def predict_sources(
    sources: list[str],
    bundle: Path,
    out: Path,
    formats: list[str],
    runtime: Runtime | None = None,
    batch_size: int = 1,
    min_score: float = 0.0,
    resume: bool = False,
) -> dict[str, Any]:
    """Predict images and write the results, with progress on stderr; the arguments are those of the command.

    Returns:
        What was read, found and skipped, ready for JSON.
    """
    from cl4wsis.cli.console import note
    from cl4wsis_serve.files import find_images
    from cl4wsis_serve.writers import IDS_FOLDER, OVERLAY_FOLDER, locked_results

    images = find_images(sources, skip=[out / IDS_FOLDER, out / OVERLAY_FOLDER])
    note(f"images: {len(images)}")
    predictor = (runtime or Runtime()).open(bundle)
    ids, writers = _build_writers(predictor, out, formats, min_score)
    with locked_results(out):
        if not resume:
            _note_other_results(out, images)
        summary = _predict_all(predictor, images, ids if resume else None, writers, batch_size, min_score)
    chosen = {
        "backend": predictor.backend.name,
        "precision": predictor.precision,
        "post": predictor.post,
        "skipped": predictor.skipped,
    }
    return {"bundle": str(bundle), **chosen, "out": str(out), **summary}


def newest_bundle(folder: Path, below: bool = True) -> Path:
    """Return the bundle that was exported last; what was added to another one since does not count.

    Args:
        folder: that holds it.
        below: whether to look in all folders below it as well.

    Raises:
        BundleError: there is none.
    """
    from cl4wsis.bundle import MANIFEST_FILE
    from cl4wsis.errors import BundleError

    manifests = list(folder.glob(f"{'**/' if below else ''}*.cl4wsis/{MANIFEST_FILE}"))
    if not manifests:
        raise BundleError(f"{folder}/ holds no bundle; run 'cl4wsis export' first, or give one with --bundle")
    return max(manifests, key=_exported).parent


def _exported(manifest: Path) -> tuple[str, int]:
    """Return when a bundle was exported, and its step; a manifest that cannot be read counts as the oldest."""
    try:
        content = json.loads(manifest.read_bytes())
        return str(content["created"]), int(content["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", -1


def _parse_formats(save: str) -> list[str]:
    formats = [part.strip() for part in save.split(",") if part.strip()]
    unknown = [part for part in formats if part not in FORMATS]
    if unknown or not formats:
        raise typer.BadParameter(f"--save {save}: expected some of {', '.join(FORMATS)}, separated by commas")
    return formats


def _build_writers(
    predictor: "Predictor", out: Path, formats: list[str], min_score: float
) -> tuple["IdsWriter", list["Writer"]]:
    from cl4wsis_serve.writers import COCO_FILE, IDS_FOLDER, OVERLAY_FOLDER, CocoWriter, IdsWriter, OverlayWriter

    classes = predictor.classes
    made_by = {**predictor.model_id, "precision": predictor.precision, "min_score": min_score}
    ids = IdsWriter(out / IDS_FOLDER, classes, made_by)
    writers: dict[str, Writer] = {
        "ids": ids,
        "coco": CocoWriter(out / COCO_FILE, classes),
        "overlay": OverlayWriter(out / OVERLAY_FOLDER, classes),
    }
    return ids, [writers[name] for name in FORMATS if name in formats]


def _note_other_results(out: Path, images: list["ImageFile"]) -> None:
    """Say that the folder will hold results of more than one run."""
    from cl4wsis.cli.console import note
    from cl4wsis_serve.writers import IDS_FOLDER, OVERLAY_FOLDER, IdsWriter, OverlayWriter

    others = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder, ending in ((out / IDS_FOLDER, IdsWriter.ending), (out / OVERLAY_FOLDER, OverlayWriter.ending))
        for path in folder.rglob(f"*{ending}")
    } - {image.name for image in images}
    if others:
        note(f"{out} holds results of other images too ({len(others)}), which stay; choose another --out to part them")


def _predict_all(
    predictor: "Predictor",
    images: list["ImageFile"],
    finished: "IdsWriter | None",
    writers: list["Writer"],
    batch_size: int,
    min_score: float,
) -> dict[str, Any]:
    from cl4wsis.cli.console import note, progress_bar
    from cl4wsis.errors import Cl4wsisError
    from cl4wsis_serve.files import predict_files

    start, instances, by_class = time.perf_counter(), 0, dict.fromkeys((info.name for info in predictor.classes), 0)
    failed: list[dict[str, str]] = []
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("predict", total=len(images))
        for outcome in predict_files(predictor, images, writers, batch_size, min_score, finished):
            if isinstance(outcome.result, Cl4wsisError):
                note(f"skipped: {outcome.result}")
                failed.append({"source": str(outcome.image.path), "error": str(outcome.result)})
            else:
                instances += len(outcome.result)
                for label in outcome.result.labels.tolist():
                    by_class[predictor.classes[label].name] += 1
            bar.advance(task)
    return {
        "images": len(images) - len(failed),
        "instances": instances,
        "instances_per_class": by_class,
        "failed": failed,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _report(summary: dict[str, Any], as_json: bool) -> None:
    from cl4wsis.cli.console import note, print_json, print_table

    if as_json:
        print_json(summary)
    else:
        found = {name: count for name, count in summary["instances_per_class"].items() if count}
        counts = f"images: {summary['images']}, instances: {summary['instances']}"
        title = f"{counts}, {summary['seconds']:.1f} s, results in {summary['out']}"
        print_table(title, ("class", "instances#"), found.items())
    if summary["failed"]:
        total = summary["images"] + len(summary["failed"])
        note(f"error: {len(summary['failed'])} of {total} files could not be read, see above")
