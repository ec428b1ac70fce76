"""``cl4wsis verify``: does every variant of a bundle, on every backend of this machine, answer as the float32 graph?"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl4wsis.cli.options import (
    BackendsOption,
    BundleArgument,
    JsonOption,
    PostsOption,
    PrecisionsOption,
    SetOption,
    ThreadsOption,
    open_choices,
)

if TYPE_CHECKING:
    from cl4wsis.bundle import Bundle
    from cl4wsis.checks import VariantCheck
    from cl4wsis.metrics import GroupMeans
    from cl4wsis_serve.verify import ImageSet, LadderResult


def verify(
    bundle: BundleArgument = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--data", "--config", "-c", help="Plan (file or name) whose evaluation images are used; gives AP50 too."
        ),
    ] = None,
    settings: SetOption = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="Use these instead: image file, folder or pattern. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use at most this many of the images.")] = None,
    backend: BackendsOption = None,
    precision: PrecisionsOption = None,
    post: PostsOption = None,
    threads: ThreadsOption = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Store the result in the bundle's manifest.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Check that every variant on every backend gives the golden outputs, and the float32 graph's answers to images.

    Without --data or --images the golden inputs are all there is. Exit code 1 if a limit is exceeded.
    """
    from cl4wsis.cli.console import note, print_json, progress_bar
    from cl4wsis.errors import BackendError, BundleError
    from cl4wsis_serve.verify import store_checks, verify_bundle

    opened, choices, skipped = open_choices(bundle, backend, precision, post)
    image_set = _image_set(opened, config, settings, images, limit)
    with progress_bar() as bar:
        task = bar.add_task("verify", total=None)
        result = verify_bundle(
            opened,
            image_set,
            choices,
            threads,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if not result.checks:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in (*skipped, *result.skipped))
        raise BackendError(f"{opened.path}: nothing could be checked here. {reasons}")
    for what, reason in (*skipped, *result.skipped):
        note(f"skipped: {what}: {reason}")
    if save and opened.path.is_dir():
        try:
            store_checks(opened, result.checks)
            note(f"the result is stored in {opened.path}")
        except BundleError as error:
            note(f"the result is not stored: {error}")
    if as_json:
        print_json(_as_json(opened, image_set, result, [*skipped, *result.skipped]))
    else:
        _print(f"{opened.path}, {image_set.description}", result)
    if not result.passed:
        for check in result.checks:
            for problem in check.problems:
                note(f"error: {check.precision}, post={check.post}, {check.backend}: {problem}")
        raise typer.Exit(1)


def _image_set(
    bundle: "Bundle", data: str | None, settings: list[str] | None, images: list[str] | None, limit: int | None
) -> "ImageSet":
    from cl4wsis.cli.console import note
    from cl4wsis.errors import BundleError
    from cl4wsis.tasks import load_plan
    from cl4wsis_serve.files import find_images
    from cl4wsis_serve.verify import folder_images, golden_images, plan_images

    if data is not None and images:
        raise typer.BadParameter("give --data or --images, not both")
    if data is not None:
        return plan_images(load_plan(data, settings or []), bundle, limit)
    if images:
        return folder_images(", ".join(images), [image.path for image in find_images(images)], limit)
    if not bundle.manifest.golden:
        raise BundleError(f"{bundle.path}: has no golden inputs; give images with --images, or a plan with --data")
    note(
        f"only the {len(bundle.manifest.golden)} golden inputs are compared; more images: --images FOLDER, --data PLAN"
    )
    return golden_images(bundle)


def _as_json(
    bundle: "Bundle", images: "ImageSet", result: "LadderResult", skipped: "list[tuple[str, str]]"
) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path),
        "data": images.description,
        "passed": result.passed,
        "checks": [{"passed": check.passed, **check.model_dump(mode="json")} for check in result.checks],
        "skipped": [{"what": what, "reason": reason} for what, reason in skipped],
    }


def _print(title: str, result: "LadderResult") -> None:
    from cl4wsis.cli.console import print_table

    columns = ["precision", "post", "backend", "golden px#", "differing px#", "matched#", "mask IoU#", "score error#"]
    has_ap = any(check.ap50 for check in result.checks)
    if has_ap:
        columns += [f"AP50 {group}#" for group in ("old", "new", "all")]
    rows = [(*_row(check), *(_ap_columns(check) if has_ap else ()), _verdict(check)) for check in result.checks]
    print_table(title, [*columns, "result"], rows)


def _row(check: "VariantCheck") -> tuple[object, ...]:
    found = check.agreement
    return (
        check.precision,
        check.post,
        check.backend,
        check.golden and f"{check.golden.differing_pixels:.2%}",
        found and f"{found.differing_pixels:.2%}",
        found and f"{found.matched:.2%}",
        found and f"{found.mask_iou:.4f}",
        found and f"{found.score_error:.1e}",
    )


def _ap_columns(check: "VariantCheck") -> list[str | None]:
    return [_points(check.ap50, check.ap50_reference, group) for group in ("old", "new", "all")]


def _points(found: "GroupMeans | None", reference: "GroupMeans | None", group: str) -> str | None:
    """Write AP50 in percent, with the difference to the float32 graph in points."""
    value = getattr(found, group, None)
    expected = getattr(reference, group, None)
    if value is None or expected is None:
        return None
    return f"{100 * value:.1f} ({100 * (value - expected):+.2f})"


def _verdict(check: "VariantCheck") -> str:
    return "passed" if check.passed else "FAILED"
