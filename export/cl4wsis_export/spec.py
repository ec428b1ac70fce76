"""What to export: the settings of one export."""

from collections.abc import Iterable
from typing import Any

from pydantic import Field, field_validator

from cl4wsis.bundle import Precision
from cl4wsis.checks import DEFAULT_LIMITS, Limits
from cl4wsis.config import Settings, build_settings, merge, parse_overrides
from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import StepInfo


class ExportSpec(Settings):
    """Settings of an export."""

    name: str | None = None
    """Name of the model; plan and step when not given."""
    grouping: GroupingSpec | None = None
    """Post-processing in the graph; that of the plan when not given."""
    region_rounds: int = Field(6, ge=1)
    """Rounds of region labelling. Spirals and combs at 512 px need 4, a maze that fills the image 6."""
    opset: int = Field(18, ge=18)
    """ONNX operator set. 18 is what torch writes without conversion, and old enough for every runtime."""
    verification_images: int = Field(5, ge=1)
    """Images on which the graph is compared with torch and with the reference."""
    precision_images: int = Field(24, ge=1)
    """Images on which graphs of lower precision are compared with the float32 graph."""
    golden_images: int = Field(2, ge=0)
    """How many of the images of the verification are stored in the bundle with the outputs expected for them."""
    precisions: tuple[Precision, ...] = ("float32",)
    """Arithmetic of the network in the graphs to write; float32 is always among them."""
    calibration_images: int = Field(64, ge=1)
    """Images on which the ranges of an int8 network are measured."""
    limits: dict[Precision, Limits] = Field(default_factory=dict)
    """How far a precision may be from float32; the defaults of ``cl4wsis.checks`` for what is not named."""
    seed: int = 0
    """Seed of the images drawn for verification, and of the choice of calibration images."""

    @field_validator("limits", mode="before")
    @classmethod
    def _complete_limits(cls, tables: Any) -> Any:
        """Keep the defaults of limits that are not named; one is lifted by None alone."""
        if not isinstance(tables, dict):
            return tables
        complete = {}
        for precision, given in tables.items():
            named = given.model_dump(exclude_unset=True) if isinstance(given, Limits) else given
            defaults = DEFAULT_LIMITS.get(precision)
            complete[precision] = defaults.model_dump() | named if defaults and isinstance(named, dict) else named
        return complete


def spec_for_step(info: StepInfo, overrides: Iterable[str] = ()) -> ExportSpec:
    """Build the settings of an export, starting from the plan the step was trained by.

    Args:
        info: of the step.
        overrides: assignments such as ``grouping.profile=fast``.

    Raises:
        ConfigError: an override names an unknown field or an impossible value.
    """
    tables = {"grouping": info.plan.recipe.grouping.model_dump()}
    return build_settings(ExportSpec, merge(tables, parse_overrides(overrides)), "--set")
