"""Engines for a bundle that is there already: without torch, on the machine that will run them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl4wsis.bundle import Bundle, Post, Precision, VariantInfo, open_bundle
from cl4wsis.engines import FoundEngine, Machine, add_engine, find_built, graph_sha256
from cl4wsis.errors import BackendError
from cl4wsis_export.engines import (
    TENSORRT_RTX,
    EngineSpec,
    Library,
    Progress,
    build_engine,
    describe_engine,
    load_library,
)
from cl4wsis_export.inspection import check_built_types
from cl4wsis_export.refit import check_refit, inspect_engine, refit_engine
from cl4wsis_export.tensorrt import read_timing_cache, require_tensorrt, timing_cache_path, write_timing_cache

logger = logging.getLogger(__name__)


def add_engines(
    path: Path,
    library: Library,
    precisions: Sequence[Precision],
    spec: EngineSpec,
    in_cache: bool = False,
    refit_from: Path | None = None,
    progress: Progress | None = None,
    post: Post = "graph",
) -> list[FoundEngine]:
    """Build engines of a bundle's graphs and add them to it.

    An engine that was built before with the same settings from the same graph on the same machine is used again.

    Args:
        path: bundle folder, or a lone ``.onnx`` file, whose engines go into the user's cache folder.
        library: ``TENSORRT`` or ``TENSORRT_RTX``.
        precisions: graphs to build from.
        spec: settings.
        in_cache: put them into the user's cache folder, and leave the bundle as it is.
        refit_from: another bundle of the same step whose refittable engines get the weights of this one, instead of a
            build.
        progress: told how far a build is.
        post: graphs with the grouping inside, or those that leave it to the host.

    Returns:
        One engine per precision.

    Raises:
        BundleError: the bundle cannot be opened or written, or holds no such graph.
        BackendError: the library or the GPU is missing, the build failed, or the precision was not honoured.
        KeyboardInterrupt: the user has interrupted a build; what was finished before is kept.
    """
    bundle = open_bundle(path)
    variants = [bundle.variant(precision, post) for precision in precisions]
    trt, machine = _prepare(library, bundle, spec)
    return [_add(bundle, variant, library, trt, machine, spec, in_cache, refit_from, progress) for variant in variants]


def _prepare(library: Library, bundle: Bundle, spec: EngineSpec) -> tuple[Any, Machine | None]:
    if library is TENSORRT_RTX:
        return load_library(library), None
    return require_tensorrt(bundle.manifest.input.size, spec)


def _add(
    bundle: Bundle,
    variant: VariantInfo,
    library: Library,
    trt: Any,
    machine: Machine | None,
    spec: EngineSpec,
    in_cache: bool,
    refit_from: Path | None,
    progress: Progress | None,
) -> FoundEngine:
    info = describe_engine(library, trt, graph_sha256(bundle, variant), spec, machine)
    found = find_built(bundle, info)
    if found is not None:
        logger.info("%s was built before and is used again", found.path)
        return found
    graph = bundle.path_of(variant)
    logger.info("building a %s engine of %s for %s", library.title, graph.name, _target(info.compute_capabilities))
    if refit_from is not None:
        content, types = _refit(open_bundle(refit_from), bundle, variant, library, trt, machine, spec), variant.types
    else:
        content, types = _build(graph, variant, library, trt, machine, spec, progress)
    return add_engine(bundle, info.model_copy(update={"types": types}), content, in_cache)


def _build(
    graph: Path,
    variant: VariantInfo,
    library: Library,
    trt: Any,
    machine: Machine | None,
    spec: EngineSpec,
    progress: Progress | None,
) -> tuple[bytes, dict[str, int]]:
    cache = timing_cache_path(trt.__version__, machine) if machine else None
    measured = None if cache is None else read_timing_cache(cache)
    built = build_engine(library, trt, graph, spec, variant.types, measured, progress)
    if cache is not None and built.timing_cache is not None:
        write_timing_cache(cache, built.timing_cache)
    if library.needs_gpu:
        inspected = inspect_engine(library, trt, built.content)
        check_built_types(inspected, variant.types, graph.name)
        logger.info("layers of the engine by type of their input: %s", inspected or "not told by the inspector")
    return built.content, built.types


def _refit(
    old: Bundle,
    new: Bundle,
    variant: VariantInfo,
    library: Library,
    trt: Any,
    machine: Machine | None,
    spec: EngineSpec,
) -> bytes:
    """Put the weights of a graph into the engine that the other bundle has of the same graph."""
    other = check_refit(old, new, variant)
    info = describe_engine(library, trt, graph_sha256(old, other), spec, machine)
    found = find_built(old, info)
    if found is None or not info.refittable:
        raise BackendError(
            f"{old.path}: holds no refittable {library.title} engine of its {variant.precision} graph with these "
            "settings for this machine; build one there with --refittable and the same settings, and pass them here too"
        )
    return refit_engine(library, trt, found.read(), new.path_of(variant))


def _target(capabilities: Sequence[str]) -> str:
    return f"compute capability {', '.join(capabilities)}"
