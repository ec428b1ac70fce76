"""grouping/1: from class probabilities, center heatmap and offsets to instances (NumPy and OpenCV reference)."""

from typing import Literal

from pydantic import Field

from cl4wsis.config import Settings


class GroupingSpec(Settings):
    """Settings of grouping/1. Lengths are in pixels of the network input, whatever grid the grouping runs on."""

    profile: Literal["exact", "fast", "paper"] = "exact"
    """``exact``: grouping at network-input resolution; ``fast``: at stride 4; ``paper``: as published (host only)."""
    center_threshold: float = Field(0.1, ge=0)
    """A center's heatmap value must exceed this."""
    nms_kernel_size: int = Field(41, gt=0)
    """Side of the window in which a center must be the maximum, px (odd)."""
    min_area: int = Field(50, ge=0)
    """Regions and instances with fewer pixels are dropped, square px."""
    max_instances: int = Field(64, gt=0, le=255)
    """Centers kept per image, by score; ids fit a byte."""
