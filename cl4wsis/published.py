"""What the publication reports, as data: by plan, method and step, to be held beside measurements of one's own.

Source: CL4WSIS (ICCV 2023), tables 1 to 10.
"""

import functools
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from cl4wsis.config import Settings, build_settings, read_toml
from cl4wsis.tasks import FileData, Plan

_FILE = Path(__file__).with_name("published.toml")

Measure = Literal["ap50", "ap9", "iou"]


class PublishedMeans(NamedTuple):
    """Means in percent; None where nothing was reported."""

    old: float | None
    new: float | None
    all: float | None


class PublishedResult(Settings):
    """One method's numbers after one step."""

    method: str
    supervision: Literal["masks", "tags"]
    """What the later steps of this method learn from."""
    preset: str = ""
    """Preset that trains this method; empty where there is none."""
    tables: str
    """Numbers of the tables it stands in."""
    after_step: int | None = None
    """Step after which it was measured; the last one when not given."""
    first_step: int = Field(0, ge=0)
    """Step whose classes the first value belongs to."""
    ap50: tuple[float, ...] = ()
    """Percent, for the classes of each step, then, where reported, of all."""
    ap9: tuple[float, ...] = ()
    """Likewise, the mean over the thresholds 0.50 to 0.90."""
    iou: tuple[float, ...] = ()
    """Likewise, IoU of the class map; that of all classes counts background."""

    def means(self, measure: Measure, class_counts: tuple[int, ...]) -> PublishedMeans:
        """Return the means of old, new and all classes.

        The mean of old classes weighs each step by its classes; that of all classes, too, where it was not reported.

        Args:
            measure: which.
            class_counts: classes that each step adds, up to the step after which it was measured.
        """
        values: tuple[float, ...] = getattr(self, measure)
        if not values:
            return PublishedMeans(None, None, None)
        counts = class_counts[self.first_step :]
        groups = values[: len(counts)]
        whole = self.first_step == 0
        reported = values[len(counts)] if len(values) > len(counts) else None
        computed = _weighted(groups, counts) if whole and measure != "iou" else None
        return PublishedMeans(
            old=_weighted(groups[:-1], counts[:-1]) if whole else None,
            new=groups[-1],
            all=computed if reported is None else reported,
        )


class PublishedScenario(Settings):
    """The results for plans of some names."""

    plans: tuple[str, ...]
    """Names of plans."""
    all_seen_labels: bool = False
    """Whether tags of old classes are given too."""
    val_lacks_classes: bool = False
    """Whether the evaluation images know only the new classes."""
    data: str
    """What was measured, in words."""
    results: tuple[PublishedResult, ...]

    def after_step(self, step: int, num_steps: int) -> list[PublishedResult]:
        """List the results after a step of a plan."""
        last = num_steps - 1
        return [r for r in self.results if step == (last if r.after_step is None else r.after_step)]


class _PublishedFile(Settings):
    scenarios: tuple[PublishedScenario, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        keys = [(name, s.all_seen_labels, s.val_lacks_classes) for s in self.scenarios for name in s.plans]
        if len(keys) != len(set(keys)):
            raise ValueError("a plan has two scenarios")
        return self


@functools.cache
def published_scenarios() -> tuple[PublishedScenario, ...]:
    """Read all results that come with the package."""
    return build_settings(_PublishedFile, read_toml(_FILE), _FILE.name).scenarios


def published_for(plan: Plan) -> PublishedScenario | None:
    """Find what was reported for a plan, by its name and the tags it gives; None where nothing was."""
    lacks_classes = isinstance(plan.data, FileData) and plan.data.val_lacks_classes
    for scenario in published_scenarios():
        traits = (scenario.all_seen_labels, scenario.val_lacks_classes)
        if plan.name in scenario.plans and traits == (plan.all_seen_labels, lacks_classes):
            return scenario
    return None


def _weighted(values: tuple[float, ...], counts: tuple[int, ...]) -> float | None:
    if not values:
        return None
    return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
