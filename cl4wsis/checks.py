"""How far a variant of a bundle may be from the float32 graph, and how far it was found to be.

Shares are found on few instances sometimes: of 33, a single one that is not matched makes 97 % impossible. So a share
may miss its limit by two standard errors, ``2 * sqrt(limit * (1 - limit) / instances)``; a limit of 0 or 1 is strict.
"""

import math
from collections.abc import Mapping

from pydantic import Field

from cl4wsis.config import Settings
from cl4wsis.metrics import GroupMeans


class Limits(Settings):
    """What a variant must keep to on the images it is verified with; ``None`` is no limit."""

    golden_pixels: float | None = Field(None, ge=0, le=1)
    """Largest :attr:`Agreement.differing_pixels` of the golden images, whatever their number of instances."""
    differing_pixels: float | None = Field(None, ge=0, le=1)
    """Largest :attr:`Agreement.differing_pixels`, but for two standard errors."""
    matched: float | None = Field(None, ge=0, le=1)
    """Smallest :attr:`Agreement.matched`, but for two standard errors."""
    mask_iou: float | None = Field(None, ge=0, le=1)
    """Smallest :attr:`Agreement.mask_iou`."""
    score_error: float | None = Field(None, ge=0)
    ap50_drop: float | None = Field(None, ge=0, le=1)
    """Largest loss of AP50 of old, new and all classes, each by itself, as a fraction."""


class Agreement(Settings):
    """How alike two sets of answers to the same images are.

    An instance is matched by one of its class and image with a mask IoU above 0.5; there is at most one such, as
    instances do not overlap.
    """

    images: int
    instances: int
    """Instances of the reference."""
    differing_pixels: float
    """Share of foreground pixels (of either side) at which the two name different instances; 0 without foreground."""
    matched: float
    """Matched instances of both sides over all instances of both sides; 1 if there are none."""
    mask_iou: float
    """Mean mask IoU of matched instances; 1 if there are none."""
    score_error: float
    """Largest difference of the scores of matched instances."""


def beyond_limits(limits: Limits, found: Agreement) -> list[str]:
    """Say in words with figures what is beyond the limits; those of golden images and of AP are not looked at."""
    problems = []
    if limits.differing_pixels is not None:
        largest = limits.differing_pixels + _two_errors(limits.differing_pixels, found.instances)
        if found.differing_pixels > largest:
            problems.append(
                f"{found.differing_pixels:.2%} of the foreground belongs to another instance than with float32 "
                f"({_stated(limits.differing_pixels, largest, found.instances)})"
            )
    if limits.matched is not None:
        smallest = limits.matched - _two_errors(limits.matched, found.instances)
        if found.matched < smallest:
            problems.append(
                f"{found.matched:.2%} of the instances are matched "
                f"({_stated(limits.matched, smallest, found.instances)})"
            )
    if limits.mask_iou is not None and found.mask_iou < limits.mask_iou:
        problems.append(f"the mean mask IoU is {found.mask_iou:.3f} (limit {limits.mask_iou:.3f})")
    if limits.score_error is not None and found.score_error > limits.score_error:
        problems.append(f"scores differ by up to {found.score_error:.2g} (limit {limits.score_error:.2g})")
    return problems


def _two_errors(share: float, instances: int) -> float:
    return 2 * math.sqrt(share * (1 - share) / max(instances, 1))


def _stated(limit: float, judged: float, instances: int) -> str:
    """Write a limit, and what is left of it for so few instances."""
    return f"limit {limit:.2%}" + ("" if judged == limit else f", for {instances} instances {judged:.2%}")


class VariantCheck(Settings):
    """How one graph answered on one backend, compared with ``model.onnx`` on the CPU of the same machine."""

    precision: str
    post: str
    backend: str
    sha256: str
    """The graph that was checked."""
    data: str
    """The images, in words."""
    golden: Agreement | None
    """The golden inputs against the outputs stored for them; none if the bundle has no golden inputs."""
    agreement: Agreement | None
    """The images against the answers of the float32 graph; none where the graph could not be run on them."""
    ap50: GroupMeans | None
    """AP50 on the images, VOC style; none where their objects are not known."""
    ap50_reference: GroupMeans | None
    """AP50 of the float32 graph on the same images."""
    limits: Limits
    problems: tuple[str, ...]
    """What was beyond the limits; the check is passed if nothing was."""
    versions: dict[str, str]
    """Versions of what ran it."""
    checked: str
    """Time, ISO 8601, UTC."""

    @property
    def passed(self) -> bool:
        """Whether everything was within the limits."""
        return not self.problems


DEFAULT_LIMITS: Mapping[str, Limits] = {
    "float32": Limits(
        golden_pixels=0.005, differing_pixels=0.005, matched=0.995, mask_iou=0.99, score_error=0.001, ap50_drop=0.002
    ),
    "float16": Limits(golden_pixels=0.05, differing_pixels=0.05, matched=0.97, mask_iou=0.97, ap50_drop=0.002),
    "int8": Limits(golden_pixels=0.25, differing_pixels=0.25, matched=0.8, mask_iou=0.8, ap50_drop=0.015),
}
"""By precision; used where the manifest of a bundle has no others."""
