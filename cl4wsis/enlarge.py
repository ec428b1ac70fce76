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

_CHUNK_PIXELS = 1 << 17
"""Fine pixels worked on at once, so that intermediate results take little memory and mostly stay in the cache."""
_LEAST_TOTAL = 1e-30
"""Sums of exponentials below this have lost digits to the end of the float32 range."""


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
        part = values[rows, columns]
        height, width = part.shape
        fine = cv2.resize(part, (width * self.scale, height * self.scale), interpolation=cv2.INTER_LINEAR)
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
    """Find the largest channel of every pixel in one pass over the memory; the lowest channel wins a tie.

    Args:
        values: (C, ...).

    Returns:
        The channel, (...) uint8 (uint16 for more than 256 channels), and its value.
    """
    best = _Best(len(values), values[0])
    for channel in range(1, len(values)):
        best.update(channel, values[channel])
    return best.channels, best.values


def enlarged_argmax(values: FloatMap, scale: int) -> NDArray[Any]:
    """Return the largest channel of every pixel of the fine map; the lowest wins a tie: (C, h, w) -> (H, W)."""
    coarse = argmax_channels(values)[0]
    tiles, mixed = _uniform_tiles(coarse, scale)
    for cells in _cells(mixed, coarse.shape, scale):
        fine = cells.enlarged(values)
        best = _Best(len(values), next(fine))
        for channel, value in enumerate(fine, start=1):
            best.update(channel, value)
        cells.write(best.channels, tiles)
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
    coarse = argmax_channels(logits)[0]
    tiles, mixed = _uniform_tiles(coarse, scale)
    probs = np.zeros(tiles.shape, np.float32)
    foreground = mixed | (tiles[:, 0, :, 0] != 0)
    # Shifting all channels of a pixel changes no probability, and keeps exponentials in range.
    shifted = logits - logits.max(axis=0)
    for cells in _cells(foreground, coarse.shape, scale):
        channels, class_probs = _classify(cells, shifted)
        cells.write(channels, tiles)
        cells.write(class_probs, probs)
    return _cut(tiles, scale), _cut(probs, scale)


def _classify(cells: "_Cells", shifted: FloatMap) -> tuple[NDArray[Any], FloatMap]:
    """Find the largest channel of every pixel and its probability, in one pass over the channels.

    Args:
        cells: to be worked on.
        shifted: (C, h, w) logits, of which none is positive.
    """
    import cv2

    channels = cells.enlarged(shifted)
    value = next(channels)
    best, total, exponential = _Best(len(shifted), value), np.empty_like(value), np.empty_like(value)
    cv2.exp(value, total)
    for channel, value in enumerate(channels, start=1):
        best.update(channel, value)
        np.add(total, cv2.exp(value, exponential), out=total)
    if total.min() < _LEAST_TOTAL:
        # Halfway between two classes that are hundreds apart, all exponentials vanish: relative to the largest they do
        # not.
        total[:] = 0
        for value in cells.enlarged(shifted):
            np.add(total, cv2.exp(value - best.values), out=total)
        return best.channels, np.reciprocal(total)
    cv2.exp(best.values, exponential)
    return best.channels, np.divide(exponential, total, out=exponential)


class _Best:
    """The largest of the channels seen so far, and which it was."""

    def __init__(self, count: int, first: FloatMap) -> None:
        self.values = first.copy()
        self.channels = np.zeros(first.shape, np.uint8 if count <= 256 else np.uint16)
        self._is_larger = np.empty(first.shape, bool)
        self._candidate = np.empty_like(self.channels)

    def update(self, channel: int, values: FloatMap) -> None:
        np.greater(values, self.values, out=self._is_larger)
        np.maximum(values, self.values, out=self.values)
        np.multiply(self._is_larger, self.channels.dtype.type(channel), out=self._candidate)
        np.maximum(self.channels, self._candidate, out=self.channels)


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

    def enlarged(self, values: FloatMap) -> Iterator[FloatMap]:
        """Yield (s * s, M) fine values of one channel after the other, in one buffer that is used again."""
        far_x, far_y = self.far[:, None], self.far[:, None, None]
        near_x, near_y = np.float32(1) - far_x, np.float32(1) - far_y
        side, count = len(self.far), len(self.rows)
        fine, other = np.empty((side, side, count), np.float32), np.empty((side, side, count), np.float32)
        for channel in values.reshape(len(values), -1):
            upper_left, upper_right, lower_left, lower_right = channel[self.corners]
            upper = upper_left * near_x + upper_right * far_x  # (s, M)
            lower = lower_left * near_x + lower_right * far_x
            np.multiply(upper, near_y, out=fine)
            np.multiply(lower, far_y, out=other)
            yield np.add(fine, other, out=fine).reshape(-1, count)

    def write(self, values: NDArray[Any], tiles: NDArray[Any]) -> None:
        """Put (s * s, M) values into the map of all cells, (h + 1, s, w + 1, s)."""
        side = len(self.far)
        tiles[self.rows, :, self.columns, :] = values.reshape(side, side, -1).transpose(2, 0, 1)


def _uniform_tiles(coarse: NDArray[Any], scale: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Fill every cell with the class of its upper left corner: (h + 1, s, w + 1, s), and tell which cells are mixed."""
    padded = np.pad(coarse, 1, mode="edge")
    corner = padded[:-1, :-1]  # (h + 1, w + 1)
    mixed: NDArray[np.bool_] = (padded[:-1, 1:] != corner) | (padded[1:, :-1] != corner) | (padded[1:, 1:] != corner)
    tiles = np.empty((corner.shape[0], scale, corner.shape[1], scale), coarse.dtype)
    tiles[:] = corner[:, None, :, None]
    return tiles, mixed


def _cells(chosen: NDArray[np.bool_], size: tuple[int, ...], scale: int) -> Iterator[_Cells]:
    """Walk the chosen cells in chunks."""
    height, width = size
    all_rows, all_columns = np.nonzero(chosen)
    # Pixel s // 2 is the first whose center lies at or behind the center of its coarse pixel.
    far = ((np.arange(scale) + 0.5 + scale // 2) / scale - 0.5).astype(np.float32)
    step = max(_CHUNK_PIXELS // scale**2, 1)
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
