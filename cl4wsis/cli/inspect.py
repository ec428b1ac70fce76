"""``cl4wsis inspect``: tell what a plan, run folder, trained step, bundle or graph is."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl4wsis.cli.options import JsonOption

if TYPE_CHECKING:
    from cl4wsis.bundle import Manifest
    from cl4wsis.checks import VariantCheck
    from cl4wsis.steps import ClassInfo, StepInfo
    from cl4wsis.tasks import Plan


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="Plan (file, or name of one that comes with cl4wsis), run folder, step, bundle or .onnx."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Tell what a plan, run folder, trained step, bundle or graph is, from its files alone."""
    from cl4wsis.bundle import MANIFEST_FILE, SUFFIX
    from cl4wsis.steps import STEP_FILE

    if path.suffix in (".onnx", SUFFIX) or (path / MANIFEST_FILE).is_file():
        _inspect_bundle(path, as_json)
    elif (path / STEP_FILE).is_file():
        _inspect_step(path, as_json)
    elif path.is_dir():
        _inspect_run(path, as_json)
    else:
        _inspect_plan(path, as_json)


def _inspect_plan(path: Path, as_json: bool) -> None:
    from cl4wsis.cli.console import print_fields, print_json, print_table
    from cl4wsis.tasks import load_plan

    plan = load_plan(path)
    if as_json:
        print_json({"kind": "plan", **plan.model_dump(mode="json")})
        return
    print_fields(f"plan {plan.name}", _plan_fields(plan))
    rows = (
        (step, "masks" if plan.learns_from_masks(step) else "image tags", ", ".join(names))
        for step, names in enumerate(plan.steps)
    )
    print_table("Steps", ("step#", "learns from", "classes"), rows)


def _plan_fields(plan: "Plan") -> list[tuple[str, object]]:
    recipe = plan.recipe
    return [
        ("data", f"{plan.data.kind}, {plan.selection}"),
        ("classes", len(plan.class_names)),
        ("method", recipe.method),
        ("encoder", f"{recipe.network.encoder}, output stride {recipe.network.output_stride}"),
        ("crop / input", f"{recipe.crop_size} px / {_size(recipe.input_size)} px"),
        ("epochs", f"base {recipe.base.epochs}, semantic {recipe.semantic.epochs}, instance {recipe.instance.epochs}"),
        ("grouping", _flat(recipe.grouping.model_dump(mode="json"))),
    ]


def _inspect_step(folder: Path, as_json: bool) -> None:
    from cl4wsis.cli.console import print_fields, print_json
    from cl4wsis.steps import read_step

    info = read_step(folder)
    if as_json:
        print_json({"kind": "step", **info.model_dump(mode="json")})
        return
    fields: list[tuple[str, object]] = [
        ("plan", f"{info.plan.name} ({info.plan.recipe.variant})"),
        ("step", f"{info.step} of {info.plan.num_steps - 1}"),
        ("encoder", info.network.encoder),
        ("input", f"{_size(info.input.size)} px"),
        ("weights", info.weights_sha256[:12]),
        ("trained from", info.parent_sha256 and info.parent_sha256[:12]),
        ("training", _seconds(info)),
        ("versions", _flat(info.versions)),
    ]
    print_fields(str(folder), fields)
    _print_classes(info.classes)
    if info.metrics:
        print_fields("Metrics", _leaves(info.metrics))


def _inspect_run(folder: Path, as_json: bool) -> None:
    from cl4wsis.cli.console import print_json, print_table
    from cl4wsis.errors import RunError
    from cl4wsis.steps import STEP_FILE, read_step

    steps = {path.parent: read_step(path.parent) for path in sorted(folder.glob(f"**/{STEP_FILE}"))}
    bundles = sorted(str(path) for path in folder.glob("**/*.cl4wsis"))
    unfinished = sorted(str(path) for path in folder.glob("**/step-*.partial") if path not in steps)
    if not steps and not bundles and not unfinished:
        raise RunError(f"{folder}: is neither a plan, a run folder, a trained step nor a bundle")
    if as_json:
        entries = [{"folder": str(path), **info.model_dump(mode="json")} for path, info in steps.items()]
        found = {"steps": entries, "unfinished": unfinished, "bundles": bundles}
        print_json({"kind": "run", "folder": str(folder), **found})
        return
    rows = (
        (
            path.relative_to(folder),
            info.plan.recipe.variant,
            _new_classes(info),
            _seconds(info),
            info.weights_sha256[:12],
        )
        for path, info in steps.items()
    )
    print_table(f"run {folder}", ("step", "method", "new classes", "training", "weights"), rows)
    if unfinished:
        print_table("Unfinished, 'cl4wsis train-step' goes on with them", ("path",), ([path] for path in unfinished))
    if bundles:
        print_table("Bundles", ("path",), ([path] for path in bundles))


def _inspect_bundle(path: Path, as_json: bool) -> None:
    from cl4wsis.bundle import open_bundle
    from cl4wsis.cli.console import print_fields, print_json, print_table

    manifest = open_bundle(path).manifest
    if as_json:
        print_json({"kind": "bundle", "path": str(path), **manifest.model_dump(mode="json")})
        return
    print_fields(str(path), _bundle_fields(manifest))
    tensors = (
        (tensor.name, tensor.dtype, f"({', '.join(map(str, tensor.shape))})", tensor.meaning)
        for tensor in (*manifest.inputs, *manifest.outputs)
    )
    print_table("Graph", ("tensor", "type", "shape", "meaning"), tensors)
    _print_classes(manifest.classes)
    if manifest.accuracy:
        print_fields("Accuracy", _leaves(manifest.accuracy))
    if manifest.checks:
        checks = ((c.precision, c.post, c.backend, c.data, c.checked, _verdict(c)) for c in manifest.checks)
        print_table("Checks", ("precision", "post", "backend", "images", "time", "result"), checks)


def _bundle_fields(manifest: "Manifest") -> list[tuple[str, object]]:
    check = manifest.verification
    checked = check and (
        f"{check.images} images at batch sizes {', '.join(map(str, check.batch_sizes))}: "
        f"{check.matched:.2%} of {check.instances} instances as in the reference, {_flat(check.runtimes)}"
    )
    return [
        ("bundle", f"{manifest.name}, {manifest.format}"),
        ("plan", f"{manifest.plan}, step {manifest.step}"),
        ("input", f"{_size(manifest.input.size)} px, fitted and padded"),
        ("grouping", _flat(manifest.grouping.model_dump(mode="json"))),
        ("graph", f"opset {manifest.graph.opset}, {sum(manifest.graph.operators.values())} nodes"),
        ("graphs", ", ".join(f"{v.file} ({v.precision}, post={v.post})" for v in manifest.variants)),
        ("verified", checked),
        ("engines", ", ".join(f"{engine.file} ({engine.runtime})" for engine in manifest.engines) or None),
        ("weights", manifest.weights_sha256[:12]),
        ("created", manifest.created or None),
        ("versions", _flat(manifest.versions)),
    ]


def _verdict(check: "VariantCheck") -> str:
    return "passed" if check.passed else f"FAILED: {'; '.join(check.problems)}"


def _print_classes(classes: "tuple[ClassInfo, ...]") -> None:
    from cl4wsis.cli.console import print_table

    rows = ((label, info.name, info.step_added, _hex(info.color)) for label, info in enumerate(classes))
    print_table("Classes", ("label#", "name", "since step#", "color"), rows)


def _hex(color: tuple[int, int, int]) -> str:
    return f"#{bytes(color).hex()}"


def _new_classes(info: "StepInfo") -> str:
    return ", ".join(found.name for found in info.classes if found.step_added == info.step)


def _seconds(info: "StepInfo") -> str:
    return ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in info.seconds.items()) or "-"


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Give the values of nested tables with dotted names; lists are shown in one line."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield (
                f"{prefix}{name}",
                ", ".join(_flat(item) if isinstance(item, Mapping) else _short(item) for item in value),
            )
        else:
            yield f"{prefix}{name}", _short(value)


def _flat(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in fields.items())


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
