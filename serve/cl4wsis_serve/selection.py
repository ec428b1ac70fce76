"""Choosing what answers: which backend, which precision and who groups, with the reasons for what was passed over.

Nothing is given up in silence. What ``auto`` skips is recorded with the reason; a backend that was asked for by name
and cannot run, or a GPU that is there but does not work, is an error unless the caller allows a fall-back.
"""

import logging
from typing import Literal, NamedTuple

from cl4wsis.bundle import Bundle, Post, Precision, VariantInfo
from cl4wsis.engines import EngineMissingError
from cl4wsis.errors import BackendError
from cl4wsis_serve.backends import BACKENDS, device_of, open_backend, why_unavailable
from cl4wsis_serve.backends.base import Backend, BackendRequest, Device

logger = logging.getLogger(__name__)

_POSTS: dict[Device, tuple[Post, Post]] = {"cpu": ("host", "graph"), "cuda": ("graph", "host")}
"""Placements of the grouping in order of speed: in the graph it costs a CPU many times what it costs on the host."""


class Selection(NamedTuple):
    """What was chosen."""

    backend: Backend
    variant: VariantInfo
    skipped: dict[str, str]
    """What was passed over, with the reasons."""


def select_backend(
    bundle: Bundle,
    backend: str,
    precision: Precision | Literal["auto"],
    post: Post | Literal["auto"],
    threads: int | None,
    allow_fallback: bool,
) -> Selection:
    """Open the backend that was asked for, or the best that works here; see ``Predictor.open`` for the arguments.

    Raises:
        BundleError: the bundle holds no graph of this precision with the grouping there.
        BackendError: the backend is unknown or cannot run here, or nothing can.
    """
    arithmetic = _precision(bundle, precision)
    skipped: dict[str, str] = {}
    candidates = [name for name in BACKENDS if name != backend]
    if backend != "auto":
        device_of(backend)  # an unknown name is an error whatever is allowed
        candidates = [backend, *candidates] if allow_fallback else [backend]
    for name in candidates:
        reason = why_unavailable(name)
        if reason is None:
            notes, variant = _variant(bundle, arithmetic, post, device_of(name))
            try:
                opened = open_backend(BackendRequest(name, bundle, variant, threads))
                return Selection(opened, variant, {**skipped, **notes})
            except BackendError as error:
                reason = str(error)
                if not allow_fallback:
                    _check_fallback(backend, name, error)
        elif backend == name and not allow_fallback:
            raise BackendError(reason)
        skipped[name] = reason
        if backend == name:
            logger.warning("%s cannot be used, falling back: %s", name, reason)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    raise BackendError(f"no backend can run this model here. {reasons}")


def _precision(bundle: Bundle, precision: Precision | Literal["auto"]) -> Precision:
    """Resolve ``auto``: float32, or what a lone graph is."""
    if precision != "auto":
        return precision
    held = [variant.precision for variant in bundle.manifest.variants]
    return "float32" if "float32" in held or not held else held[0]


def _variant(
    bundle: Bundle, precision: Precision, post: Post | Literal["auto"], device: Device
) -> tuple[dict[str, str], VariantInfo]:
    """Resolve ``auto`` for the place of the grouping, with the reason where the faster place is not to be had."""
    if post != "auto":
        variant = bundle.variant(precision, post)
        reason = bundle.link_in_the_way(variant)
        if reason is not None:
            raise BackendError(f"{reason}, or choose --post graph")
        return {}, variant
    best, other = _POSTS[device]
    held = {variant.post: variant for variant in bundle.manifest.variants if variant.precision == precision}
    missing = f"{bundle.path} holds no {precision} graph with post={best}"
    reason = bundle.link_in_the_way(held[best]) if best in held else missing
    if reason is None or other not in held:
        return {}, bundle.variant(precision, best)
    return {f"post={best}": reason}, held[other]


def _check_fallback(asked: str, failed: str, error: BackendError) -> None:
    """Raise when going on would answer from elsewhere than was asked for, or leave a GPU idle."""
    if asked == failed:
        raise error
    if isinstance(error, EngineMissingError):
        return  # nothing is broken: no engine was built, and the next backend takes the graph
    if device_of(failed) != "cpu":
        raise BackendError(
            f"{failed} is installed for the GPU of this machine but does not work: {error}; "
            "repair it, choose --backend onnxruntime to use the CPU, or pass --allow-fallback"
        ) from error
