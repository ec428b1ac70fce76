"""Generated inputs shared by the tests of every package."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

FloatMap = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GroupingScene:
    """Network maps of one image, and the drawing they were made from.

    Attributes:
        semantic_probs: (C, h, w) float32, channels sum to 1.
        center_heatmap: (C - 1, h, w) float32.
        offset_map: (2, h, w) float32, (dy, dx) in pixels of the network input (grid pixels times stride).
        instance_ids: (h, w) int32, the drawing; 0 is none. Later ellipses cover earlier ones.
        labels: (N,) int32, class of each id.
    """

    semantic_probs: FloatMap
    center_heatmap: FloatMap
    offset_map: FloatMap
    instance_ids: NDArray[np.int32]
    labels: NDArray[np.int32]


def grouping_scene(
    seed: int,
    num_classes: int = 6,
    height: int = 128,
    width: int = 128,
    num_instances: int = 12,
    pseudo_fraction: float = 0.1,
    noise: float = 0.2,
    stride: int = 1,
) -> GroupingScene:
    """Draw overlapping ellipses and the maps that a fairly good network would give for them.

    About half of the ellipses touch or cover an earlier one of the same class. A quarter of the heatmap bumps is cut
    off at 0.5, which makes plateaus and equal center values; ``pseudo_fraction`` of the ellipses has no bump at all.

    Args:
        seed: of everything drawn.
        num_classes: foreground classes.
        height: of the maps, grid pixels.
        width: of the maps, grid pixels.
        num_instances: ellipses drawn; some may be covered by others.
        pseudo_fraction: share of ellipses without a heatmap bump.
        noise: 0 for clean maps; at 0.2 offsets stray by some pixels and class borders are ragged.
        stride: network-input pixels per grid pixel; only the offsets depend on it.
    """
    generator = np.random.default_rng(seed)
    ids, labels = _draw_ellipses(generator, num_classes, height, width, num_instances)
    present = np.flatnonzero(np.bincount(ids.reshape(-1), minlength=num_instances + 1)[1:]) + 1
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    heatmap = generator.normal(0, 0.05 * noise, (num_classes, height, width)).astype(np.float32)
    offsets = generator.normal(0, 0.03 * noise * (height + width) / 2, (2, height, width)).astype(np.float32)
    for index in present:
        mask = ids == index
        center_y, center_x = rows[mask].mean(), columns[mask].mean()
        offsets[0, mask] += center_y - rows[mask]
        offsets[1, mask] += center_x - columns[mask]
        if generator.random() >= pseudo_fraction:
            bump = _bump(generator, (rows - center_y) ** 2 + (columns - center_x) ** 2, (height + width) / 2)
            np.maximum(heatmap[labels[index - 1]], bump, out=heatmap[labels[index - 1]])
    return GroupingScene(
        semantic_probs=_class_probs(generator, ids, labels, num_classes, noise),
        center_heatmap=heatmap,
        offset_map=offsets * np.float32(stride),
        instance_ids=ids,
        labels=labels,
    )


@dataclass(frozen=True, eq=False)
class NetworkScene:
    """Raw maps of one image as a network gives them, each at its own stride.

    Attributes:
        semantic_logits: (C, H / 16, W / 16) or as asked, float32.
        center_heatmap: (C - 1, H / 4, W / 4) float32.
        offset_map: (2, H / 4, W / 4) float32, (dy, dx) in pixels of the network input.
        input_size: (H, W).
    """

    semantic_logits: FloatMap
    center_heatmap: FloatMap
    offset_map: FloatMap
    input_size: tuple[int, int]


def network_scene(
    seed: int,
    num_classes: int = 20,
    height: int = 512,
    width: int = 512,
    num_instances: int = 10,
    noise: float = 0.1,
    semantic_stride: int = 16,
) -> NetworkScene:
    """Draw ellipses, and the maps that a network of the usual strides would give for them.

    Logits are the share of each class in a coarse pixel on a scale of 12, so that borders between two coarse pixels
    fall where the drawing has them; heatmap and offsets are those of :func:`grouping_scene` at stride 4.

    Args:
        seed: of everything drawn.
        num_classes: foreground classes.
        height: of the network input, px; a multiple of the stride.
        width: of the network input, px.
        num_instances: ellipses drawn; some may be covered by others.
        noise: 0 for clean maps.
        semantic_stride: of the logits, a multiple of 4.
    """
    scene = grouping_scene(seed, num_classes, height // 4, width // 4, num_instances, noise=noise, stride=4)
    class_map = np.concatenate([[0], scene.labels + 1])[scene.instance_ids]
    shares = (class_map[None] == np.arange(num_classes + 1)[:, None, None]).astype(np.float32)
    side = semantic_stride // 4
    shares = shares.reshape(num_classes + 1, height // semantic_stride, side, width // semantic_stride, side)
    logits = 12 * shares.mean(axis=(2, 4)) - 6
    logits += np.random.default_rng(seed).normal(0, 2 * noise, logits.shape)
    return NetworkScene(logits.astype(np.float32), scene.center_heatmap, scene.offset_map, (height, width))


def _draw_ellipses(
    generator: np.random.Generator, num_classes: int, height: int, width: int, count: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    side = (height + width) / 2
    largest = side * min(0.25, 0.5 / np.sqrt(max(count, 1)))
    rows, columns = np.mgrid[:height, :width]
    ids = np.zeros((height, width), np.int32)
    labels = generator.integers(num_classes, size=count).astype(np.int32)
    placed: list[tuple[float, float, float]] = []
    for index in range(count):
        radius_y, radius_x = generator.uniform(0.4 * largest, largest, 2)
        center_y, center_x = generator.uniform(0, height), generator.uniform(0, width)
        if placed and generator.random() < 0.5:
            neighbour = int(generator.integers(len(placed)))
            neighbour_y, neighbour_x, neighbour_radius = placed[neighbour]
            angle = generator.uniform(0, 2 * np.pi)
            reach = 0.8 * (neighbour_radius + min(radius_y, radius_x))
            center_y, center_x = neighbour_y + reach * np.sin(angle), neighbour_x + reach * np.cos(angle)
            labels[index] = labels[neighbour]
        placed.append((center_y, center_x, (radius_y + radius_x) / 2))
        ids[((rows - center_y) / radius_y) ** 2 + ((columns - center_x) / radius_x) ** 2 < 1] = index + 1
    return ids, labels


def _bump(generator: np.random.Generator, squared_distance: FloatMap, side: float) -> FloatMap:
    sigma = max(side / 64, 1.0)
    bump = generator.uniform(0.4, 1.0) * np.exp(-squared_distance / (2 * sigma**2))
    return (np.minimum(bump, 0.5) if generator.random() < 0.25 else bump).astype(np.float32)


def _class_probs(
    generator: np.random.Generator, ids: NDArray[np.int32], labels: NDArray[np.int32], num_classes: int, noise: float
) -> FloatMap:
    """Softmax of noisy class scores; most noise is drawn on a coarser grid, so that borders wave and few crumble."""
    class_map = np.concatenate([[0], labels + 1])[ids]
    logits = 4.0 * (class_map[None] == np.arange(num_classes + 1)[:, None, None])
    coarse = generator.normal(0, 4.5 * noise, (num_classes + 1, ids.shape[0] // 4 + 1, ids.shape[1] // 4 + 1))
    logits += coarse.repeat(4, axis=1).repeat(4, axis=2)[:, : ids.shape[0], : ids.shape[1]]
    logits += generator.normal(0, 1.5 * noise, logits.shape)
    exponentials = np.exp(logits - logits.max(axis=0))
    return (exponentials / exponentials.sum(axis=0)).astype(np.float32)


def connected_parts(mask: NDArray[np.bool_], connectivity: int) -> list[list[tuple[int, int]]]:
    """Find the connected parts of a boolean map by flooding, each a sorted list of (y, x), in order of first pixels."""
    mask, parts = mask.copy(), []
    steps = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if connectivity == 8 or 0 in (dy, dx)]
    for start in zip(*np.nonzero(mask), strict=True):
        front, part = [start], []
        while front:
            y, x = front.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
                mask[y, x] = False
                part.append((int(y), int(x)))
                front += [(y + dy, x + dx) for dy, dx in steps]
        if part:
            parts.append(sorted(part))
    return parts


def encoded_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Encode an (H, W) mask as COCO compressed RLE, with the text that JSON holds."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
