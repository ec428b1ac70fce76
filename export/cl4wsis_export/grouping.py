"""grouping/1 as a graph of static shapes: the torch twin of ``cl4wsis.grouping``, for a batch.

It computes the same ids from the same maps with operators that every runtime has: no data-dependent shapes, no loops,
no branches, no reducing scatter. Whole-image steps are products and maxima of float32 maps, which runtimes compute
fastest; labels and indices are exact in float32 below 2**24.

Legend: B images, C classes with background, h x w grid, N = h * w its pixels, K center slots, M candidates for them.
A *label* is a pixel index plus one, 0 where there is none; the label of a region is that of its last pixel.

Regions. Labels spread by hooking and pointer jumping: every pixel looks for a higher label among its eight neighbours
of the same class and hangs the root of its own tree below that label; then all pixels jump to the parent of their
parent. Where several pixels hang up one root in a round, any of them may win: roots only move to higher labels of the
same region, so the end is the same, and what was not joined is joined in a later round. The number of rounds is fixed;
few are needed, since trees merge in parallel and paths shrink to an eighth per round. This is the only scatter that may
write one place twice: propagation by pools, or by maxima along rows and columns, needs none, but takes a round for
every few pixels or turns of a region, hundreds in a maze that this labels in six rounds.

Peaks. A maximum over large windows of every class map would cost more than all else. Maxima of small blocks bound it
from both sides, and only pixels between the bounds look into their window; see ``_find_peaks``.

Source: CL4WSIS (ICCV 2023) for the grouping; Shiloach and Vishkin, An O(log n) parallel connectivity algorithm (1982).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl4wsis.errors import ConfigError
from cl4wsis.grouping import GroupingSpec

_MAX_CANDIDATES = 256
"""Centers considered before those of small regions are left out; TensorRT sorts fewer than 3840."""
_BLOCK = 4
"""Side of the blocks whose maxima bound those of large windows, grid pixels."""
_MAX_DOUBTFUL = 256
"""Pixels that the blocks leave undecided and that are looked at; those with the highest values."""
_MAX_CONTENDERS = 512
"""Candidates for a peak that are looked at; of a plateau only its lowest pixels are among them."""
_LATER_NEIGHBOURS = ((0, 2), (1, 0), (1, 1), (1, 2))  # (y, x) in a map padded by 1 at the left, right and below
_JUMPS = 3
"""Pointer jumps of a round: they cost less than the search for neighbours."""
_LARGEST_POOL = 11
"""Side of the largest maximum pool; a larger window is a chain of them, several times faster on a CPU."""
_NEIGHBOURS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))  # (y, x) in a map padded by 1
_LANE_ORDER = (0, 4, 2, 6, 1, 5, 3, 7)
"""Runs of center slots in the lanes: whenever the lanes are folded in half, a run meets the one behind it."""
_LANES = len(_LANE_ORDER)
"""Centers compared side by side: enough to keep the graph short, few enough to stay in the cache."""
_LABEL_SCALE = 2.0**30
"""By so much two regions are moved apart while the nearest center is sought; squares stay finite."""
_FAR = 2.0**59
_MAX_PIXELS = 2**23


class GroupingOutput(NamedTuple):
    """Instances of a batch in K slots; unused slots are zero."""

    instance_ids: Tensor
    """(B, H, W) float32 at network-input resolution; 0 none, ``k + 1`` for slot ``k``."""
    labels: Tensor
    """(B, K) float32, class number from 0."""
    scores: Tensor
    """(B, K) float32."""
    areas: Tensor
    """(B, K) float32, pixels."""
    boxes: Tensor
    """(B, K, 4) float32 xyxy, right and lower edge behind the last pixel."""


class _Centers(NamedTuple):
    """Centers in priority order, (B, K) float32 each; ``used`` is 0 in slots without a center."""

    used: Tensor
    y: Tensor
    x: Tensor
    region: Tensor
    class_value: Tensor
    factor: Tensor


class _Peaks(NamedTuple):
    """Pixels that may be centers, (B, P) each; ``exists`` is 0 in the places that are not used."""

    exists: Tensor
    pixels: Tensor
    values: Tensor


class StaticGrouping(nn.Module):
    """Group a batch of maps into instances.

    Args:
        spec: thresholds, lengths and profile (``exact`` or ``fast``).
        grid: (h, w) of the maps; the network input for ``exact``, a quarter of it for ``fast``.
        rounds: of region labelling.

    Raises:
        ConfigError: the profile cannot be a graph, or the grid is too large.
    """

    def __init__(self, spec: GroupingSpec, grid: tuple[int, int], rounds: int) -> None:
        super().__init__()
        if spec.profile == "paper":
            raise ConfigError("grouping.profile 'paper' runs on the host only; export with 'exact' or 'fast'")
        height, width = grid
        if height * width > _MAX_PIXELS:
            raise ConfigError(f"a grid of {height}x{width} is too large: its labels are not exact in float32")
        self.spec = spec
        self.grid = grid
        self.rounds = rounds
        self.num_candidates = min(_MAX_CANDIDATES, height * width)
        self.num_slots = min(spec.max_instances, self.num_candidates)
        self._radius = spec.window_size // 2
        in_blocks = height % _BLOCK == 0 and width % _BLOCK == 0 and self._radius >= 2 * _BLOCK
        self._block = _BLOCK if in_blocks else 1
        turns = -(-self.num_slots // _LANES)
        first_ids = torch.tensor(_LANE_ORDER, dtype=torch.float32) * turns + 1
        own_labels = torch.arange(1, height * width + 1, dtype=torch.float32)
        self._own_labels: Tensor
        self._rows: Tensor
        self._columns: Tensor
        self._first_ids: Tensor
        self.register_buffer("_own_labels", own_labels.view(1, height, width), persistent=False)
        self.register_buffer("_first_ids", first_ids.view(1, _LANES, 1), persistent=False)
        self.register_buffer("_rows", torch.arange(height, dtype=torch.float32).view(1, height, 1), persistent=False)
        self.register_buffer("_columns", torch.arange(width, dtype=torch.float32).view(1, 1, width), persistent=False)

    def forward(self, semantic_probs: Tensor, center_heatmap: Tensor, offset_map: Tensor) -> GroupingOutput:
        """Group from class probabilities.

        Args:
            semantic_probs: (B, C, h, w) float32, channel 0 is background.
            center_heatmap: (B, C - 1, h, w) float32, raw.
            offset_map: (B, 2, h, w) float32, (dy, dx), center minus pixel in network-input pixels.
        """
        class_map = semantic_probs.argmax(dim=1)  # (B, h, w)
        class_probs = read_channel(semantic_probs, class_map)
        full_class_map = enlarged_class_map(semantic_probs) if self.spec.profile == "fast" else class_map
        return self.group(class_map, class_probs, full_class_map, center_heatmap, offset_map)

    def group(
        self, class_map: Tensor, class_probs: Tensor, full_class_map: Tensor, center_heatmap: Tensor, offset_map: Tensor
    ) -> GroupingOutput:
        """Group from the class map.

        Args:
            class_map: (B, h, w) int64, 0 is background.
            class_probs: (B, h, w) float32, probability of that class.
            full_class_map: (B, H, W) int64 at network-input resolution; ``class_map`` itself for ``exact``.
            center_heatmap: as in :meth:`forward`.
            offset_map: as in :meth:`forward`.
        """
        classes = class_map.float()
        labels, _ = self.label_regions(classes)
        peaks = self._find_peaks(class_map, classes, center_heatmap)
        centers = self._choose_centers(labels, peaks, classes)
        ids = self._assign_pixels(labels, centers, offset_map)  # (B, h, w)
        return self._padded(self._describe(ids, centers, class_probs, full_class_map))

    def _describe(self, ids: Tensor, centers: _Centers, class_probs: Tensor, full_class_map: Tensor) -> GroupingOutput:
        """Bring ids to full size, drop small instances, and measure the others."""
        ones = (ids * 0 + 1).unsqueeze(2)  # (B, h, 1, w)
        if self.spec.profile == "fast":
            grid_counts = self._count_rows(ids, torch.cat([ones, class_probs.unsqueeze(2)], dim=2)).sum(1)
            grid_areas, mass = grid_counts.unbind(1)
            ids, kept = self._enlarge(ids, centers, full_class_map)  # (B, h, w), (B, h, 4, w, 4)
            row_counts = self._count_rows(ids, kept.sum(4))  # (B, h, 4, K)
            column_counts = self._count_rows(ids.transpose(1, 2), kept.sum(2).permute(0, 2, 3, 1))  # (B, w, 4, K)
            row_counts, column_counts = row_counts.flatten(1, 2), column_counts.flatten(1, 2)  # (B, H, K), (B, W, K)
        else:
            counts = self._count_rows(ids, torch.cat([ones, class_probs.unsqueeze(2)], dim=2))  # (B, h, 2, K)
            row_counts, row_mass = counts.unbind(2)  # (B, h, K)
            column_counts = self._count_rows(ids.transpose(1, 2)).squeeze(2)  # (B, w, K)
            mass, grid_areas, kept = row_mass.sum(1), row_counts.sum(1), None
        areas = row_counts.sum(1)  # (B, K)
        alive = centers.used * (areas >= max(self.spec.min_area, 1)).float()
        ids = ids * _look_up(F.pad(alive, (1, 0)), ids.flatten(1)).reshape(-1, *self.grid)
        if kept is not None:
            ids = (ids[:, :, None, :, None] * kept).flatten(3, 4).flatten(1, 2)  # (B, H, W)
        return GroupingOutput(
            instance_ids=ids,
            labels=(centers.class_value - 1) * alive,
            scores=centers.factor * (mass / grid_areas.clamp(min=1)) * alive,
            areas=areas * alive,
            boxes=_boxes(row_counts, column_counts) * alive.unsqueeze(2),
        )

    def label_regions(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Label the 8-connected parts of equal class.

        Args:
            classes: (B, h, w) float32 class map; 0 is background.

        Returns:
            (B, h, w) labels, 0 for background, and (B,) float32: 1 where labels were finished within the rounds.
        """
        height, width = self.grid
        foreground = (classes > 0).float()
        padded = F.pad(classes, (1, 1, 1, 1))
        links = [(padded[:, y : y + height, x : x + width] == classes).float() * foreground for y, x in _NEIGHBOURS]
        labels = self._own_labels * foreground
        parents = torch.maximum(labels, self._highest_neighbour(labels, links))
        table = _jump(F.pad(parents.flatten(1), (1, 0)))  # (B, 1 + N): what each label points to; entry 0 is a dummy
        for _ in range(self.rounds):
            labels = table[:, 1:].reshape(-1, *self.grid)
            parents = _look_up(table, labels.flatten(1)).reshape(-1, *self.grid)
            highest = self._highest_neighbour(labels, links)
            hangs = (highest > labels).float() * (parents == labels).float()  # roots alone are hung up
            table = F.pad(torch.maximum(parents, highest).flatten(1), (1, 0))
            # What is not to be written goes to entry 0, as 0.
            table = table.scatter(1, (labels * hangs).flatten(1).long(), (highest * hangs).flatten(1))
            table = _jump(table)
        labels = table[:, 1:].reshape(-1, *self.grid)
        finished = (self._highest_neighbour(labels, links) <= labels).flatten(1).all(dim=1).float()
        return labels, finished

    def _highest_neighbour(self, labels: Tensor, links: list[Tensor]) -> Tensor:
        height, width = self.grid
        padded = F.pad(labels, (1, 1, 1, 1))
        highest = labels * 0
        for (y, x), link in zip(_NEIGHBOURS, links, strict=True):
            highest = torch.maximum(highest, padded[:, y : y + height, x : x + width] * link)
        return highest

    def _find_peaks(self, class_map: Tensor, classes: Tensor, center_heatmap: Tensor) -> _Peaks:
        """Find the pixels that are the largest of their class in their window, and the last one of equals.

        The maximum of a window is bounded by those of the blocks within it and of the blocks it touches, which decides
        nearly all pixels. Windows are looked into only for pixels between the bounds, and where equals compete.
        """
        foreground = (classes > 0).float()
        own_channel = (classes - foreground).long()  # background reads channel 0
        values = read_channel(center_heatmap, own_channel)
        above = foreground * (values > self.spec.center_threshold).float()
        lowest, highest = self._bound_windows(class_map, own_channel, center_heatmap)
        candidates = above * (values >= highest).float()
        if self._block > 1:
            doubtful = above * (values >= lowest).float() - candidates
            candidates = candidates + self._largest_of_window(doubtful, values, classes)
        return self._last_of_window(candidates, values, classes)

    def _bound_windows(self, class_map: Tensor, own_channel: Tensor, center_heatmap: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the largest value of a pixel's class in its window from below and from above, (B, h, w) each."""
        (height, width), block = self.grid, self._block
        channels = torch.arange(1, center_heatmap.shape[1] + 1, device=class_map.device).view(1, -1, 1, 1)
        # Pixels of other classes become 0: the threshold is not negative, so they hide no peak.
        maps = center_heatmap * (class_map.unsqueeze(1) == channels).float()  # (B, C - 1, h, w)
        if block > 1:
            maps = F.max_pool2d(maps, block)  # (B, C - 1, h / block, w / block)
        columns = width // block
        blocks = (self._rows / block).floor() * columns + (self._columns / block).floor()  # (1, h, w)
        places = (own_channel * (height // block * columns) + blocks.long()).flatten(1)
        within, touched = (self._radius - block + 1) // block, -(-self._radius // block)
        maps = _window_maximum(maps, within)
        lowest = maps.flatten(1).gather(1, places).reshape(-1, height, width)
        if touched == within:
            return lowest, lowest
        maps = _window_maximum(maps, touched - within)
        return lowest, maps.flatten(1).gather(1, places).reshape(-1, height, width)

    def _largest_of_window(self, doubtful: Tensor, values: Tensor, classes: Tensor) -> Tensor:
        """Return 1 where a doubtful pixel has the largest value of its class in its window, (B, h, w)."""
        pixels, own_value, exists = _select(doubtful, values, min(_MAX_DOUBTFUL, self._own_labels.numel()))
        own_class = classes.flatten(1).gather(1, pixels)
        side = range(-self._radius, self._radius + 1)
        window = self._window_places(pixels, [(y, x) for y in side for x in side])  # (B, M, steps)
        same_class = (self._read(classes, window) == own_class.unsqueeze(2)).float()
        larger = same_class * (self._read(values, window) > own_value.unsqueeze(2)).float()
        empty = classes.flatten(1) * 0
        return empty.scatter(1, pixels, exists * (1 - larger.amax(2))).reshape(-1, *self.grid)

    def _last_of_window(self, candidates: Tensor, values: Tensor, classes: Tensor) -> _Peaks:
        """Keep the candidates that no later candidate of their class follows in their window."""
        height, width = self.grid
        marks = candidates * classes
        if self._radius:
            padded, followed = F.pad(marks, (1, 1, 0, 1)), candidates * 0
            for y, x in _LATER_NEIGHBOURS:  # few pixels of a plateau remain
                following = (padded[:, y : y + height, x : x + width] == classes).float()
                followed = torch.maximum(followed, following)
            candidates = candidates * (1 - followed)
        pixels, own_value, exists = _select(candidates, values, min(_MAX_CONTENDERS, height * width))
        if self._radius:
            own_class = classes.flatten(1).gather(1, pixels)
            side = range(-self._radius, self._radius + 1)
            later = [(y, x) for y in range(self._radius + 1) for x in side if y or x > 0]
            following = (self._read(marks, self._window_places(pixels, later)) == own_class.unsqueeze(2)).float()
            exists = exists * (1 - following.amax(2))
        return _Peaks(exists, pixels, own_value)

    def _window_places(self, pixels: Tensor, steps: list[tuple[int, int]]) -> Tensor:
        """Return where the pixels some (y, x) steps away lie in a map padded by the radius, (B, M) -> (B, M, steps)."""
        width = self.grid[1]
        padded_width = width + 2 * self._radius
        numbers = pixels.float()
        rows = ((numbers + 0.5) / width).floor()
        places = numbers + rows * (2 * self._radius) + self._radius * (padded_width + 1)
        away = torch.tensor([y * padded_width + x for y, x in steps], dtype=torch.float32, device=pixels.device)
        return (places.unsqueeze(2) + away).long()

    def _read(self, maps: Tensor, places: Tensor) -> Tensor:
        """Read (B, h, w) maps at places in the map padded by the radius; 0 beyond the border."""
        padded = F.pad(maps, [self._radius] * 4).flatten(1)
        return padded.gather(1, places.flatten(1)).reshape(-1, *places.shape[1:])

    def _choose_centers(self, labels: Tensor, peaks: _Peaks, classes: Tensor) -> _Centers:
        """Keep the first K of the peaks and of the last pixels of regions without a peak, in priority order."""
        flat_labels = labels.flatten(1)
        num_pixels = self.grid[0] * self.grid[1]
        with_peak = flat_labels.gather(1, peaks.pixels) * peaks.exists
        has_peak = _table_by_label(with_peak, peaks.exists, flat_labels)[:, 1:]  # (B, N), at the last pixel
        pseudo = (labels == self._own_labels).float().flatten(1) * (1 - has_peak)
        last_pixels = (pseudo * flat_labels).topk(self.num_candidates, dim=1)[0]  # (B, M) labels
        # Peaks have positive priorities, pseudo-centers -N .. -1 by pixel index, all other pixels less.
        absent = -2.0 * num_pixels
        of_peaks = peaks.exists * peaks.values + (1 - peaks.exists) * absent
        of_pseudo = last_pixels - (num_pixels + 1) + (last_pixels == 0).float() * absent
        pseudo_pixels = (last_pixels - (last_pixels > 0).float()).long()
        priority, order = torch.cat([of_peaks, of_pseudo], dim=1).topk(self.num_candidates, dim=1)
        pixels = torch.cat([peaks.pixels, pseudo_pixels], dim=1).gather(1, order)  # (B, M)
        exists = (priority > -num_pixels - 0.5).float()
        regions = flat_labels.gather(1, pixels) * exists
        smallest = -(-self.spec.min_area // self.spec.stride**2)
        if smallest > 1:
            exists = exists * (self._region_areas(flat_labels, regions) >= smallest).float()
        order = self._slots_in_order(priority, pixels.float(), exists)  # (B, K)
        used, pixels, priority = exists.gather(1, order), pixels.gather(1, order), priority.gather(1, order)
        is_peak = (priority > 0).float()
        rows = ((pixels.float() + 0.5) / self.grid[1]).floor()
        return _Centers(
            used=used,
            y=rows,
            x=pixels.float() - rows * self.grid[1],
            region=regions.gather(1, order) * used + used - 1,  # -1 in unused slots: the label of no pixel
            class_value=classes.flatten(1).gather(1, pixels),
            factor=priority * is_peak + (1 - is_peak),
        )

    def _region_areas(self, flat_labels: Tensor, regions: Tensor) -> Tensor:
        """Count the pixels of the regions in which candidates lie, (B, M) -> (B, M)."""
        count = self.num_candidates
        numbers = torch.arange(count, 0, -1, dtype=torch.float32, device=regions.device).view(1, 1, count)
        same = (regions.unsqueeze(2) == regions.unsqueeze(1)).float()
        number = (same * numbers).amax(2)  # equal for all candidates of one region: that of the first
        number_of_pixel = _look_up(_table_by_label(regions, number, flat_labels), flat_labels)  # (B, N)
        areas = _histogram(number_of_pixel.unsqueeze(1), None, count).flatten(1)  # (B, M)
        return areas.gather(1, (number - 1).long())

    def _slots_in_order(self, priority: Tensor, pixels: Tensor, exists: Tensor) -> Tensor:
        """Return the candidates of the K slots: by falling priority, equal ones by falling pixel index."""
        other, own = priority.unsqueeze(1), priority.unsqueeze(2)
        later_pixel = (pixels.unsqueeze(1) > pixels.unsqueeze(2)).float()
        precedes = (other > own).float() + (other == own).float() * later_pixel  # (B, M, M)
        rank = (precedes * exists.unsqueeze(1)).sum(2)
        count = self.num_candidates
        numbers = torch.arange(count, dtype=torch.float32, device=rank.device)
        key = exists * (count - rank) - (1 - exists) * (numbers + 1)  # unique, so order is the same in every runtime
        order: Tensor = key.topk(self.num_slots, dim=1)[1]
        return order

    def _assign_pixels(self, labels: Tensor, centers: _Centers, offset_map: Tensor) -> Tensor:
        """Give each pixel of a region the id of the region's center nearest to where its offset points.

        Labels move regions apart, farther than any offset reaches.
        """
        stride = float(self.spec.stride)
        target_y = (offset_map[:, 0] / stride + self._rows).flatten(1).unsqueeze(1)  # (B, 1, N)
        target_x = (offset_map[:, 1] / stride + self._columns).flatten(1).unsqueeze(1)
        plane = (labels * _LABEL_SCALE).flatten(1).unsqueeze(1)
        turns = -(-self.num_slots // _LANES)
        by_turn = [self._by_turn(t, turns) for t in (centers.y, centers.x, centers.region * _LABEL_SCALE)]
        nearest, ids = plane * 0 + _FAR, plane * 0
        for turn, (y, x, region) in enumerate(zip(*by_turn, strict=True)):
            down = (target_y - y) + (plane - region)  # (B, lanes, N); within a region the second part is 0
            right = target_x - x
            distance = down * down + right * right
            ids = torch.maximum(ids, (distance < nearest).float() * (self._first_ids + turn))
            nearest = torch.minimum(nearest, distance)
        lanes = _LANES
        while lanes > 1:  # the first half wins ties: each of its lanes holds lower ids than its counterpart
            lanes //= 2
            others_win = (nearest[:, lanes:] < nearest[:, :lanes]).float()
            ids = ids[:, :lanes] * (1 - others_win) + ids[:, lanes:] * others_win
            nearest = torch.minimum(nearest[:, :lanes], nearest[:, lanes:])
        return ids.reshape(-1, *self.grid)

    def _by_turn(self, values: Tensor, turns: int) -> list[Tensor]:
        """Deal (B, K) slots to lanes, each lane a run of successive slots: one (B, lanes, 1) per turn."""
        padded = F.pad(values, (0, turns * _LANES - self.num_slots), value=-_LABEL_SCALE)
        runs = padded.reshape(-1, _LANES, turns)
        dealt = runs.index_select(1, torch.tensor(_LANE_ORDER, device=values.device))
        return [dealt[:, :, turn : turn + 1] for turn in range(turns)]

    def _enlarge(self, ids: Tensor, centers: _Centers, full_class_map: Tensor) -> tuple[Tensor, Tensor]:
        """Widen ids by one grid pixel, and find the input pixels at which the class agrees with them.

        Returns:
            (B, h, w) ids, and (B, h, 4, w, 4) float32: 1 where the input pixel keeps the id of its grid pixel.
        """
        widest = F.max_pool2d(ids.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        ids = torch.maximum(ids, widest * (ids == 0).float())
        class_of_id = _look_up(F.pad(centers.class_value * centers.used, (1, 0)), ids.flatten(1)).reshape(
            -1, *self.grid
        )
        height, width = self.grid
        full_classes = full_class_map.float().reshape(-1, height, 4, width, 4)
        agrees = (full_classes == class_of_id[:, :, None, :, None]).float()
        return ids, agrees * (ids > 0).float()[:, :, None, :, None]

    def _count_rows(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """Count pixels, or sum weights, by id in every row: (B, R, S) ids, (B, R, n, S) weights -> (B, R, n, K)."""
        return _histogram(ids, weights, self.num_slots)

    def _padded(self, output: GroupingOutput) -> GroupingOutput:
        missing = self.spec.max_instances - self.num_slots  # only where a grid has fewer pixels than slots
        if not missing:
            return output
        labels, scores, areas = (F.pad(t, (0, missing)) for t in (output.labels, output.scores, output.areas))
        return GroupingOutput(output.instance_ids, labels, scores, areas, F.pad(output.boxes, (0, 0, 0, missing)))


def enlarged_class_map(semantic_probs: Tensor) -> Tensor:
    """Return the argmax of probabilities upsampled bilinearly by 4 (half-pixel centers, clamped at the border).

    Written out in multiplications and additions, so that every runtime rounds alike.

    Args:
        semantic_probs: (B, C, h, w).

    Returns:
        (B, 4h, 4w) int64.
    """
    probs = semantic_probs.permute(0, 2, 3, 1)  # (B, h, w, C): an argmax is fastest along the last axis
    wide = torch.stack(_quarters(probs, dim=2), dim=3).flatten(2, 3)  # (B, h, 4w, C)
    rows = [phase.argmax(dim=3) for phase in _quarters(wide, dim=1)]  # 4 x (B, h, 4w)
    return torch.stack(rows, dim=2).flatten(1, 2)


def read_channel(maps: Tensor, channel: Tensor) -> Tensor:
    """Read one channel of (B, C, h, w) maps at every pixel; channel is (B, h, w) int64, the result (B, h, w)."""
    return maps.gather(1, channel.unsqueeze(1)).squeeze(1)


def _quarters(maps: Tensor, dim: int) -> list[Tensor]:
    """Interpolate at the centers of the four quarters of every pixel along one axis."""
    size = maps.shape[dim]
    first, last = maps.narrow(dim, 0, 1), maps.narrow(dim, size - 1, 1)
    before = torch.cat([first, maps.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([maps.narrow(dim, 1, size - 1), last], dim)
    return [
        before * 0.375 + maps * 0.625,
        before * 0.125 + maps * 0.875,
        maps * 0.875 + after * 0.125,
        maps * 0.625 + after * 0.375,
    ]


def _window_maximum(maps: Tensor, radius: int) -> Tensor:
    while radius:
        part = min(radius, _LARGEST_POOL // 2)
        maps = F.max_pool2d(maps, 2 * part + 1, stride=1, padding=part)
        radius -= part
    return maps


def _select(chosen: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices and values of the ``count`` largest chosen pixels of (B, h, w) maps, and 1 where there is one.

    Values of chosen pixels are positive.
    """
    largest, pixels = (chosen * values).flatten(1).topk(count, dim=1)
    return pixels, largest, (largest > 0).float()


def _table_by_label(labels: Tensor, values: Tensor, flat_labels: Tensor) -> Tensor:
    """Write values at the labels they belong to, (B, M) each; equal labels have equal values, label 0 has none.

    Returns:
        (B, 1 + N) for the (B, N) labels of the pixels. No place is written twice: values whose label was seen before
        go behind the table.
    """
    count = labels.shape[1]
    numbers = torch.arange(count, dtype=torch.float32, device=labels.device)
    earlier = (numbers.unsqueeze(0) < numbers.unsqueeze(1)).float()
    seen = ((labels.unsqueeze(2) == labels.unsqueeze(1)).float() * earlier).amax(2)
    written = (labels > 0).float() * (1 - seen)
    behind = numbers + (flat_labels.shape[1] + 1)
    places = labels * written + behind * (1 - written)
    table = F.pad(flat_labels * 0, (1, count))
    return table.scatter(1, places.long(), values * written)[:, :-count]


def _jump(table: Tensor) -> Tensor:
    """Let every label point to what the one it points to points to, some times over."""
    for _ in range(_JUMPS):
        table = table.gather(1, table.long())
    return table


def _look_up(table: Tensor, keys: Tensor) -> Tensor:
    """Read (B, T) at float32 positions (B, N)."""
    return table.gather(1, keys.long())


def _histogram(ids: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """Sum weights by id within every row, as a product of the one-hot codes of the two digits of the id.

    Args:
        ids: (B, R, S) float32, 0..count; 0 is not counted.
        weights: (B, R, n, S) float32; none where pixels are only counted, n = 1.
        count: number of ids.

    Returns:
        (B, R, n, count) float32.
    """
    base = 1 << max((count - 1).bit_length() + 1, 2) // 2  # a power of two near the square root of count
    high_count = -(-count // base)
    numbers = (ids - 1).unsqueeze(2)  # (B, R, 1, S)
    high = (numbers / base).floor()
    low = numbers - high * base
    digits = torch.arange(max(high_count, base), dtype=torch.float32, device=ids.device).view(1, 1, -1, 1)
    high_code = (high == digits[:, :, :high_count]).float()  # (B, R, high, S); none for id 0
    low_code = (low == digits[:, :, :base]).float()  # (B, R, low, S)
    num_weights = 1
    if weights is not None:
        num_weights = weights.shape[2]
        low_code = (low_code.unsqueeze(2) * weights.unsqueeze(3)).flatten(2, 3)  # (B, R, n * low, S)
    sums = torch.matmul(high_code, low_code.transpose(2, 3))  # (B, R, high, n * low)
    sums = sums.reshape(-1, sums.shape[1], high_count, num_weights, base).transpose(2, 3)  # (B, R, n, high, low)
    flat: Tensor = sums.flatten(3, 4)[..., :count]
    return flat


def _boxes(row_counts: Tensor, column_counts: Tensor) -> Tensor:
    """Return xyxy boxes (B, K, 4) from the pixels of each instance in every row (B, H, K) and column (B, W, K)."""
    top, bottom = _extent(row_counts)
    left, right = _extent(column_counts)
    return torch.stack([left, top, right, bottom], dim=2)


def _extent(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first line that has pixels and the line behind the last, (B, L, K) -> (B, K) each."""
    length = counts.shape[1]
    present = (counts > 0).float()
    lines = torch.arange(1, length + 1, dtype=torch.float32, device=counts.device).view(1, length, 1)
    return length - (present * (length + 1 - lines)).amax(1), (present * lines).amax(1)
