"""grouping/1: from class probabilities, center heatmap and offsets to instances (NumPy and OpenCV reference).

This module defines the answer; every other placement of the grouping (exported graph, engine) must give the same ids.

Grid. The maps are (h, w); their stride ``s`` is 1 for ``exact`` and 4 for ``fast``. Pixels of the grid have the index
``y * w + x``. Lengths of the specification are pixels of the network input (s * h, s * w) and are scaled so:
the window side is the smallest odd number >= ``nms_kernel_size / s``; offsets are divided by ``s`` (exact in float32).
All arithmetic is float32, and inputs must be finite.

1. Class map: argmax over channels; the lowest channel wins a tie. 0 is background, class ``c`` is channel ``c + 1``.
2. Regions: 8-connected parts of equal class > 0. A region of ``area`` grid pixels is dropped when
   ``area * s * s < min_area``: its pixels get no id and its peaks are no centers. (A region has ``m`` pixels or more
   exactly when ``m`` of them lie within Chebyshev distance ``m - 1`` of one of them: a test without counting regions.)
3. Peaks: ``v(p)`` is the center heatmap at ``p`` in the channel of the class of ``p``. The window of ``p`` holds the
   pixels of the *same class* in the square around ``p``, cut at the border; they may lie in other regions, also in
   dropped ones. ``p`` is a candidate when ``v(p) > center_threshold`` and ``v(p)`` is the maximum of its window.
   A candidate is a peak when no candidate in its window has a higher pixel index; a candidate suppresses others even
   if it is suppressed itself. (That is a second maximum over ``index * candidate``.)
   A peak belongs to the region in which it lies. A region without a peak has one pseudo-center: its highest pixel index.
4. Priority: peaks come before pseudo-centers. Peaks are ordered by falling ``v``, equal ones by falling pixel index;
   pseudo-centers by falling pixel index. The first ``max_instances`` are kept, the others are forgotten: a region
   that loses some of its centers is shared among the rest, a region that loses all has no id. (Ties in a TopK are
   resolved by its second key, so order the K candidates by (value, index) and choose among those that equal the K-th
   value by index; ``index - h * w`` is a unique key below every peak for the pseudo-centers.)
5. Assignment: pixel ``p`` of a region goes to the kept center ``c`` of that region with the least
   ``(p_y + o_y - c_y)^2 + (p_x + o_x - c_x)^2``, evaluated in this order; the first in priority wins a tie.
6. Score: ``v(center) *`` mean of the class probability over the grid pixels assigned in step 5; for a pseudo-center
   the mean alone. Scores are not clipped.
7. Output ids at network-input resolution. ``exact``: the assignment itself. ``fast``: (a) grid pixels with id 0 take
   the highest id in their 3x3 neighbourhood (ids of step 4, 1 for the first; one maximum pool, once, written only
   where the id is 0); (b) every grid pixel becomes a 4x4 block; (c) a pixel keeps its id where the full-size class map
   has the class of that id, and gets 0 elsewhere. The full-size class map is the argmax (lowest wins) of the
   probabilities upsampled bilinearly by 4 with half-pixel centers (``align_corners=False``, clamped at the border).
8. Areas and boxes are those of the output ids. Instances with ``area < max(min_area, 1)`` are dropped, in both
   profiles after step 7; their pixels get 0 and are not given to a neighbour. Boxes are xyxy in network-input pixels,
   right and lower edge behind the last pixel.
9. The rows of :class:`~cl4wsis.instances.Instances` are the remaining centers in priority order, ids 1..N without
   gaps. A graph with K fixed slots keeps the id ``slot + 1`` of step 4 and zeroes the rows of dropped and unused slots;
   leaving out the slots of area 0 in order gives these rows.

Source: CL4WSIS (ICCV 2023), inference; Panoptic-DeepLab (CVPR 2020), section 3.3, with the class and the connected
region of a pixel deciding which centers it may join.
"""

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
