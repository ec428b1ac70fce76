"""Coarse network maps on a finer grid, computed only where the answer depends on it.

Maps are enlarged bilinearly by a whole factor ``s`` in the half-pixel convention (``align_corners=False``, clamped at
the border). Between four neighbouring coarse pixels lies a *cell* of s x s fine ones; the cells at the border reach
beyond it and are cut. Where the four corners of a cell agree on the largest channel, so do all its pixels, since
bilinear weights are not negative: only mixed cells need their values.

Legend: C channels, h x w coarse map, H x W = (s h) x (s w) fine one, M cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatMap = NDArray[np.float32]
Box = tuple[slice, slice]

_CHUNK_VALUES = 1 << 17
"""Numbers in an intermediate result, so that it takes little memory and mostly stays in the cache."""
_FEW_PIXELS = 2048
"""Up to here a call per channel takes longer than NumPy's own search."""
_STEEPEST = 80.0
"""Logits this far below the largest still have exponentials with all digits of float32."""
_SHORT_SIDE = 4
"""Cells up to this side lose no digit that matters by multiplying in float32."""
_SLACK = 1e-5
"""Rounding, relative to the value, that is allowed for where a channel is left out."""


@dataclass(frozen=True, eq=False)
class EnlargedMap:
    """A coarse map that is read on the fine grid, one rectangle of a channel at a time.

    Attributes:
        values: (C, h, w) float32.
        scale: the factor s; 1 where the map is on the fine grid already.
    """

    values: FloatMap
    scale: int = 1

    def __len__(self) -> int:
        return len(self.values)

    def crop(self, channel: int, box: Box) -> FloatMap:
        """Return a rectangle of the fine map.

        Args:
            channel: of the map.
            box: (rows, columns) with bounds on the fine grid.
        """
        import cv2

        values = self.values[channel]
        crop: FloatMap
        if self.scale == 1:
            crop = values[box]
            return crop
        # One coarse pixel more on each side holds every neighbour of the pixels wanted.
        rows, columns = (
            slice(max(side.start // self.scale - 1, 0), min((side.stop - 1) // self.scale + 2, size))
            for side, size in zip(box, values.shape, strict=True)
        )
        part = np.ascontiguousarray(values[rows, columns])
        height, width = part.shape
        size = (width * self.scale, height * self.scale)
        fine: Any = cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
        top, left = box[0].start - rows.start * self.scale, box[1].start - columns.start * self.scale
        crop = fine[top : top + box[0].stop - box[0].start, left : left + box[1].stop - box[1].start]
        return crop

    def full(self) -> FloatMap:
        """Return the whole fine map, (C, H, W)."""
        if self.scale == 1:
            return self.values
        height, width = self.values.shape[1:]
        box = (slice(0, height * self.scale), slice(0, width * self.scale))
        return np.stack([self.crop(channel, box) for channel in range(len(self.values))])

    def box_above(self, channel: int, threshold: float) -> Box | None:
        """Return a rectangle of the fine grid outside which no value exceeds the threshold; none where none does."""
        import cv2

        above = self.values[channel] > np.float32(threshold)
        left, top, width, height = cv2.boundingRect(above.view(np.uint8))
        if not width:
            return None
        reach = 0 if self.scale == 1 else 1  # a value spreads to the cells around it
        rows, columns = self.values.shape[1:]
        return (
            slice(max(top - reach, 0) * self.scale, min(top + height + reach, rows) * self.scale),
            slice(max(left - reach, 0) * self.scale, min(left + width + reach, columns) * self.scale),
        )


def argmax_channels(values: FloatMap) -> tuple[NDArray[Any], FloatMap]:
    """Find the largest channel of every pixel, of large maps in one pass; the lowest channel wins a tie.

    Args:
        values: (C, ...).

    Returns:
        The channel, (...) uint8 (uint16 for more than 256 channels), and its value.
    """
    number_type = np.uint8 if len(values) <= 256 else np.uint16
    if values[0].size <= _FEW_PIXELS:
        return values.argmax(axis=0).astype(number_type), values.max(axis=0)
    return _argmax((number_type(number), channel) for number, channel in enumerate(values))


def enlarged_argmax(values: FloatMap, scale: int) -> NDArray[Any]:
    """Return the largest channel of every pixel of the fine map; the lowest wins a tie: (C, h, w) -> (H, W)."""
    coarse = argmax_channels(values)[0]
    tiles, mixed = _uniform_tiles(coarse, scale)
    for cells in _cells(mixed, coarse.shape, scale, _CHUNK_VALUES // scale**2):
        cells.write(_largest_channel(cells, values, coarse), tiles)
    return _cut(tiles, scale)


def classify_enlarged(logits: FloatMap, scale: int) -> tuple[NDArray[Any], FloatMap]:
    """Classify every pixel of the fine map, channel 0 being background.

    Args:
        logits: (C, h, w).
        scale: the factor s.

    Returns:
        (H, W) largest channel, the lowest winning a tie, and (H, W) float32, its probability by the softmax over
        channels; 0 in cells of background alone.
    """
    coarse, largest = argmax_channels(logits)
    tiles, mixed = _uniform_tiles(coarse, scale)
    in_question = mixed | (tiles[:, 0, :, 0] != 0)
    probs = np.zeros(tiles.shape, np.float32)
    # Shifting all channels of a pixel changes no probability, and keeps exponentials in range.
    shifted = logits - largest
    find_probs = _probs_by_steps if shifted.min() > -_STEEPEST else _probs_one_by_one
    limit = _CHUNK_VALUES // (len(logits) * scale)
    for cells in _cells(mixed, coarse.shape, scale, limit):
        cells.write(_largest_channel(cells, logits, coarse), tiles)
    for cells in _cells(in_question, coarse.shape, scale, limit):
        cells.write(find_probs(cells, shifted), probs)
    return _cut(tiles, scale), _cut(probs, scale)


def _largest_channel(cells: "_Cells", values: FloatMap, coarse: NDArray[Any]) -> NDArray[Any]:
    """Find the largest channel of every pixel of some cells, comparing only channels that can be the largest.

    The mean of the channels that are largest at the four corners is interpolated as any channel is, and is nowhere
    above the largest channel. So a channel that is below this mean at all corners is the largest nowhere in the cell.

    Args:
        cells: to be worked on.
        values: (C, h, w).
        coarse: (h, w), largest channel of every coarse pixel.

    Returns:
        (s * s, M) of the type of ``coarse``.
    """
    numbers = np.arange(len(cells.rows))
    corners = values.reshape(len(values), -1).take(cells.corners, axis=1)  # (C, 4, M)
    mean = corners[coarse.reshape(-1)[cells.corners], :, numbers].mean(axis=0).T  # (4, M)
    possible = (corners >= mean - _SLACK * np.abs(mean)).any(axis=1)  # (C, M)
    # The possible channels of each cell in order; where others have more, its first one again, which is harmless.
    order = np.argsort(~possible, axis=0, kind="stable")[: possible.sum(axis=0).max()]
    order = np.where(np.take_along_axis(possible, order, axis=0), order, order[0])  # (L, M)
    choices = cells.enlarged(corners[order, :, numbers].swapaxes(1, 2))  # (L, s * s, M)
    return _argmax(zip(order.astype(coarse.dtype), choices, strict=True))[0]


def _probs_by_steps(cells: "_Cells", shifted: FloatMap) -> FloatMap:
    """Return the probability of the largest channel, (s * s, M).

    A logit grows evenly along each row and each column of a cell, so its exponential grows by one factor from pixel to
    pixel, and so does the factor: four exponentials per cell instead of s * s.

    Args:
        cells: to be worked on.
        shifted: (C, h, w) logits between -80 and 0.
    """
    import cv2

    side, count = len(cells.far), len(cells.rows)
    # What rounds off a factor is multiplied s * s times.
    precise = np.float32 if side <= _SHORT_SIDE else np.float64
    upper_left, upper_right, lower_left, lower_right = (
        shifted.reshape(len(shifted), -1).take(corner, axis=1).astype(precise, copy=False) for corner in cells.corners
    )  # (C, M)
    across, down = (upper_right - upper_left) / side, (lower_left - upper_left) / side
    twist = (lower_right - lower_left) / side**2 - across / side
    first = float(cells.far[0]) * side  # of the first pixel, in pixels from the corner
    across, start = across + first * twist, upper_left + first * (across + down + first * twist)
    down += first * twist
    exponentials: NDArray[Any] = cv2.exp(np.stack([start, across, down, twist]).reshape(4, -1))
    start, across, down, twist = exponentials.reshape(4, -1, count)
    value, factor = (np.empty((len(shifted), side, count), np.float32) for _ in range(2))
    for column in range(side):
        value[:, column], factor[:, column] = start, down
        start *= across
        down *= twist
    total = np.empty((side, side, count), np.float32)
    largest = np.empty_like(total)
    for row in range(side):
        if row:
            value *= factor
        np.add.reduce(value, axis=0, out=total[row])
        np.maximum.reduce(value, axis=0, out=largest[row])
    return np.divide(largest, total, out=total).reshape(-1, count)


def _probs_one_by_one(cells: "_Cells", shifted: FloatMap) -> FloatMap:
    """Return the same for logits of any size.

    Halfway between two classes that are hundreds apart, all exponentials vanish, but not relative to the largest.
    """
    corners = shifted.reshape(len(shifted), -1).take(cells.corners, axis=1)
    largest = cells.enlarged(corners[0])
    for channel in corners[1:]:
        np.maximum(largest, cells.enlarged(channel), out=largest)
    total = np.zeros_like(largest)
    for channel in corners:
        total += np.exp(cells.enlarged(channel) - largest)
    probs: FloatMap = np.reciprocal(total)
    return probs


def _argmax(channels: Iterator[tuple[Any, FloatMap]]) -> tuple[NDArray[Any], FloatMap]:
    """Find the largest of several maps of one shape, and its number; the first wins a tie.

    Args:
        channels: the number of a map, or those of its columns, and the map. Numbers do not fall, except to repeat the
            first map.
    """
    number, values = next(channels)
    largest = values.copy()
    best = np.empty_like(largest, number.dtype)
    best[:] = number
    is_larger, candidate = np.empty(largest.shape, bool), np.empty_like(best)
    for number, values in channels:
        np.greater(values, largest, out=is_larger)
        np.maximum(values, largest, out=largest)
        np.multiply(is_larger, number, out=candidate)
        np.maximum(best, candidate, out=best)
    return best, largest


@dataclass(frozen=True, eq=False)
class _Cells:
    """Some cells of one map.

    Attributes:
        rows: (M,) of the cells, 0..h.
        columns: (M,), 0..w.
        corners: (4, M) flat indices of the coarse pixels: upper left, upper right, lower left, lower right.
        far: (s,) weight of the right or lower corner at each fine pixel.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    corners: NDArray[np.int64]
    far: FloatMap

    def enlarged(self, corners: FloatMap) -> FloatMap:
        """Interpolate within the cells: (..., 4, M) values at the corners -> (..., s * s, M)."""
        far = self.far[:, None]
        near = np.float32(1) - far
        upper = corners[..., None, 0, :] * near + corners[..., None, 1, :] * far  # (..., s, M)
        lower = corners[..., None, 2, :] * near + corners[..., None, 3, :] * far
        flat = (*corners.shape[:-2], 1, -1)
        fine = upper.reshape(flat) * near  # (..., s, s * M)
        fine += lower.reshape(flat) * far
        enlarged: FloatMap = fine.reshape(*corners.shape[:-2], -1, corners.shape[-1])
        return enlarged

    def write(self, values: NDArray[Any], tiles: NDArray[Any]) -> None:
        """Put (s * s, M) values into the map of all cells, (h + 1, s, w + 1, s)."""
        side = len(self.far)
        tiles[self.rows, :, self.columns, :] = values.reshape(side, side, -1).transpose(2, 0, 1)


def _uniform_tiles(coarse: NDArray[Any], scale: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Fill every cell with the class of its upper left corner: (h + 1, s, w + 1, s), and tell which cells are mixed."""
    import cv2

    padded = cv2.copyMakeBorder(coarse, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    corner = padded[:-1, :-1]  # (h + 1, w + 1)
    mixed: NDArray[np.bool_] = (padded[:-1, 1:] != corner) | (padded[1:, :-1] != corner) | (padded[1:, 1:] != corner)
    rows, columns = corner.shape
    tiles = np.empty((rows, scale, columns * scale), coarse.dtype)
    tiles[:] = corner.repeat(scale, axis=1)[:, None]
    return tiles.reshape(rows, scale, columns, scale), mixed


def _cells(chosen: NDArray[np.bool_], size: tuple[int, ...], scale: int, limit: int) -> Iterator[_Cells]:
    """Walk the chosen cells in chunks of at most ``limit``, but one at least."""
    height, width = size
    all_rows, all_columns = np.divmod(np.flatnonzero(chosen), width + 1)
    # Pixel s // 2 is the first whose center lies at or behind the center of its coarse pixel.
    far = ((np.arange(scale) + 0.5 + scale // 2) / scale - 0.5).astype(np.float32)
    step = max(limit, 1)
    for start in range(0, len(all_rows), step):
        rows, columns = all_rows[start : start + step], all_columns[start : start + step]
        top, bottom = np.maximum(rows - 1, 0) * width, np.minimum(rows, height - 1) * width
        left, right = np.maximum(columns - 1, 0), np.minimum(columns, width - 1)
        corners = np.stack([top + left, top + right, bottom + left, bottom + right])
        yield _Cells(rows, columns, corners, far)


def _cut(tiles: NDArray[Any], scale: int) -> NDArray[Any]:
    """Return the fine map without what the cells at the border have beyond it."""
    rows, _, columns, _ = tiles.shape
    before = scale - scale // 2
    fine = tiles.reshape(rows * scale, columns * scale)
    return np.ascontiguousarray(fine[before : before + (rows - 1) * scale, before : before + (columns - 1) * scale])
