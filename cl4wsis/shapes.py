"""Drawn shapes: textured pictures with exact instance masks, made in memory from a seed.

They stand in for photographs in the default plan, in tests and in demonstrations. The outline alone tells the class:
color, texture, rotation, size and aspect are drawn independently of it. Objects overlap, touch others of their class
and are cut off by the border; backgrounds carry texture and clutter. Every picture depends on its seed alone.

Lengths are given for ``_REFERENCE_SIDE`` px pictures and grow with the picture.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cl4wsis.errors import DataError
from cl4wsis.tasks import Plan, ShapesData

_REFERENCE_SIDE = 128
_SUPERSAMPLING = 4  # outlines are drawn this much larger, then averaged, for smooth edges
_FIXED_POINT_BITS = 4  # sub-pixel precision of cv2.fillPoly
_RADIUS_RANGE = (17.0, 29.0)  # px at the reference side
_ASPECT_RANGE = (0.85, 1.18)
_MIN_VISIBLE_SHARE = 0.55  # of an object's own area, after occlusion and the border
_MIN_VISIBLE_AREA = 120  # square px at the reference side
_PLACEMENT_TRIES = 24
_NUM_OBJECTS_SHARES = (0.35, 0.40, 0.20, 0.05)  # of pictures with 1, 2, 3, 4 objects
_SUBJECT_TWIN_SHARE = 0.3  # of further objects that repeat the class of the first
_TOUCHING_SHARE = 0.7  # of repeated classes that are put beside their twin
_OTHER_STEP_SHARE = 0.4  # of the remaining objects that come from classes of other steps
_MIN_CONTRAST = 85.0  # distance of object and background colors in RGB

_TRAINING, _EVALUATION = 0, 1

Image = NDArray[np.uint8]
FloatImage = NDArray[np.float32]
Outline = list[NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    """A picture and what is in it.

    Attributes:
        name: unique within its set.
        image: (H, W, 3) uint8 RGB.
        instance_ids: (H, W) int32; visible pixels of object ``i`` hold ``i + 1``, 0 is background.
        class_names: (N,) class of each object; all of them are visible.
    """

    name: str
    image: Image
    instance_ids: NDArray[np.int32]
    class_names: tuple[str, ...]

    @property
    def tags(self) -> frozenset[str]:
        """Classes of which something can be seen."""
        return frozenset(self.class_names)

    def read(self) -> Image:
        """Return the picture, (H, W, 3) uint8 RGB."""
        return self.image

    def rasterize(self, class_names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the id map and labels of the objects of some classes.

        Args:
            class_names: the classes wanted; a label is the position in this list.

        Returns:
            instance_ids (H, W) int32, 0 none, and labels (N,) int32 of ids 1..N.
        """
        label_of = {name: label for label, name in enumerate(class_names)}
        kept = [row for row, name in enumerate(self.class_names) if name in label_of]
        new_ids = np.zeros(len(self.class_names) + 1, np.int32)
        new_ids[np.array(kept, dtype=np.int64) + 1] = np.arange(1, len(kept) + 1, dtype=np.int32)
        labels = np.array([label_of[self.class_names[row]] for row in kept], dtype=np.int32)
        return new_ids[self.instance_ids], labels


def check_shape_names(class_names: Sequence[str]) -> None:
    """Check that every class of a plan can be drawn.

    Raises:
        DataError: a name is no shape; the message gives the nearest.
    """
    problems = []
    for name in class_names:
        if name not in SHAPE_NAMES:
            near = difflib.get_close_matches(name, SHAPE_NAMES, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"shapes are: {', '.join(SHAPE_NAMES)}"
            problems.append(f"no drawn shape is called '{name}'; {hint}")
    if problems:
        raise DataError("\n".join(problems))


def draw_training_picture(plan: Plan, data: ShapesData, step: int, index: int) -> DrawnPicture:
    """Draw a training picture of a step.

    It shows at least one class of the step, in turn. Under ``overlap`` selection it may also show classes of all other
    steps, under ``disjoint`` only of earlier ones.

    Args:
        plan: gives classes and selection.
        data: gives size and seed; the ``data`` of the plan.
        step: step whose classes are the subjects.
        index: number of the picture, from 0.
    """
    split = plan.split(step)
    others = split.old_names if plan.selection == "disjoint" else tuple(set(plan.class_names) - set(split.new_names))
    rng = np.random.default_rng([data.seed, _TRAINING, step, index])
    subject = split.new_names[index % split.num_new_classes]
    name = f"step-{step}/{index:05d}"
    return _draw_subject(rng, name, subject, split.new_names, sorted(others), data.image_size)


def draw_evaluation_picture(plan: Plan, data: ShapesData, index: int) -> DrawnPicture:
    """Draw an evaluation picture; the classes of all steps are the subjects in turn.

    Args:
        plan: gives the classes.
        data: gives size and seed; the ``data`` of the plan.
        index: number of the picture, from 0.
    """
    rng = np.random.default_rng([data.seed, _EVALUATION, index])
    subject = plan.class_names[index % len(plan.class_names)]
    return _draw_subject(rng, f"val/{index:05d}", subject, plan.class_names, (), data.image_size)


def _draw_subject(
    rng: np.random.Generator, name: str, subject: str, companions: Sequence[str], others: Sequence[str], size: int
) -> DrawnPicture:
    """Draw one object of the subject class and up to three more, until the subject can be seen."""
    while True:
        wanted = [subject]
        for _ in range(rng.choice(len(_NUM_OBJECTS_SHARES), p=_NUM_OBJECTS_SHARES)):
            if rng.random() < _SUBJECT_TWIN_SHARE:
                wanted.append(subject)
            else:
                pool = others if others and rng.random() < _OTHER_STEP_SHARE else companions
                wanted.append(pool[int(rng.integers(len(pool)))])
        rng.shuffle(wanted)
        picture = draw_picture(rng, wanted, size, name)
        if subject in picture.class_names:
            return picture


def draw_picture(rng: np.random.Generator, class_names: Sequence[str], size: int, name: str = "") -> DrawnPicture:
    """Draw a picture.

    Args:
        rng: source of every random choice.
        class_names: class of each object, from front to back.
        size: side of the square picture, px.
        name: name of the picture.

    Returns:
        The picture; an object that finds no place where enough of it would be visible is left out.

    Raises:
        DataError: a class is no shape.
    """
    check_shape_names(class_names)
    background, background_color = _draw_background(rng, size)
    objects = _place_objects(rng, class_names, size)
    image = background
    for placed in reversed(objects):
        _paint_object(rng, image, placed, background_color)
    image += rng.normal(0, rng.uniform(1, 5), image.shape).astype(np.float32)
    instance_ids = np.zeros((size, size), np.int32)
    for row, placed in enumerate(objects):
        instance_ids[placed.visible] = row + 1
    return DrawnPicture(
        name=name,
        image=np.clip(image + 0.5, 0, 255).astype(np.uint8),
        instance_ids=instance_ids,
        class_names=tuple(placed.class_name for placed in objects),
    )


# --- outlines: closed polygons around the origin, (M, 2) of (x, y), reaching radius 1; a second one is a hole ---


def _arc(radius: float, start: float, stop: float, num_points: int = 48) -> NDArray[np.float64]:
    angles = np.linspace(start, stop, num_points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _disc() -> Outline:
    return [0.9 * _arc(1, 0, 2 * np.pi)]


def _square() -> Outline:
    return [0.8 * np.array([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]])]


def _triangle() -> Outline:
    return [1.1 * _arc(1, 0, 2 * np.pi, 4)[:3]]


def _star() -> Outline:
    radii = np.where(np.arange(10) % 2 == 0, 1.15, 0.46)
    return [radii[:, None] * _arc(1, 0, 2 * np.pi, 11)[:10]]


def _ring() -> Outline:
    return [_arc(1, 0, 2 * np.pi), _arc(0.52, 0, 2 * np.pi)]


def _cross() -> Outline:
    long, short = 1.05, 0.34
    quarter = np.array([[short, short], [short, long], [-short, long]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]


def _crescent() -> Outline:
    """Disc of radius 1 minus a disc of radius 0.82 around (0.52, 0); shifted so that it lies around the origin."""
    shift, inner_radius = 0.52, 0.82
    meet_x = (1 - inner_radius**2 + shift**2) / (2 * shift)
    meet_y = np.sqrt(1 - meet_x**2)
    outer_angle = np.arctan2(meet_y, meet_x)
    inner_angle = np.arctan2(meet_y, meet_x - shift)
    outer = _arc(1.0, outer_angle, 2 * np.pi - outer_angle)
    inner = _arc(inner_radius, 2 * np.pi - inner_angle, inner_angle) + np.array([shift, 0])
    return [1.1 * (np.concatenate([outer, inner]) + np.array([0.3, 0]))]


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x, -(y + 2.5)], axis=1) / 15.5]


_OUTLINES: dict[str, Callable[[], Outline]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
}

SHAPE_NAMES: tuple[str, ...] = tuple(_OUTLINES)
"""Names of the classes that can be drawn."""


# --- placement ---


@dataclass(frozen=True, eq=False)
class _PlacedObject:
    class_name: str
    center: tuple[float, float]  # (y, x)
    radius: float
    coverage: FloatImage  # (H, W), share of each pixel inside the outline
    visible: NDArray[np.bool_]  # (H, W)


def _place_objects(rng: np.random.Generator, class_names: Sequence[str], size: int) -> list[_PlacedObject]:
    """Find a place for each object, from front to back, where enough of it shows."""
    scale = size / _REFERENCE_SIDE
    occupied = np.zeros((size, size), bool)
    placed: list[_PlacedObject] = []
    for class_name in class_names:
        twins = [other for other in placed if other.class_name == class_name]
        beside_twin = bool(twins) and rng.random() < _TOUCHING_SHARE
        for _ in range(_PLACEMENT_TRIES):
            radius = rng.uniform(*_RADIUS_RANGE) * scale
            center = _center_beside(rng, twins[0], radius) if beside_twin else _center_inside(rng, size, radius)
            coverage, full_area = _draw_coverage(rng, class_name, center, radius, size)
            visible = (coverage >= 0.5) & ~occupied
            area = int(visible.sum())
            if area >= max(_MIN_VISIBLE_SHARE * full_area, _MIN_VISIBLE_AREA * scale**2):
                occupied |= visible
                placed.append(_PlacedObject(class_name, center, radius, coverage, visible))
                break
    return placed


def _center_inside(rng: np.random.Generator, size: int, radius: float) -> tuple[float, float]:
    margin = 0.7 * radius  # the border may cut off a part
    y, x = rng.uniform(margin, size - margin, 2)
    return float(y), float(x)


def _center_beside(rng: np.random.Generator, twin: _PlacedObject, radius: float) -> tuple[float, float]:
    angle = rng.uniform(0, 2 * np.pi)
    distance = rng.uniform(0.65, 0.95) * (twin.radius + radius)
    return twin.center[0] + distance * np.sin(angle), twin.center[1] + distance * np.cos(angle)


def _draw_coverage(
    rng: np.random.Generator, class_name: str, center: tuple[float, float], radius: float, size: int
) -> tuple[FloatImage, float]:
    """Draw a randomly turned and stretched outline.

    Returns:
        coverage (H, W) in [0, 1], and the area of the whole outline in square px, the part beyond the border included.
    """
    angle, stretch_angle = rng.uniform(0, 2 * np.pi, 2)
    stretch = np.exp(rng.uniform(*np.log(_ASPECT_RANGE)))
    turn_back = _rotation(stretch_angle)
    transform = radius * _rotation(angle) @ turn_back @ np.diag([stretch, 1 / stretch]) @ turn_back.T
    polygons = [points @ transform.T for points in _OUTLINES[class_name]()]
    reach = int(np.ceil(np.abs(polygons[0]).max())) + 2
    top, left = int(center[0]) - reach, int(center[1]) - reach
    patch_side = 2 * reach + 1
    inside = np.array([center[1] - left, center[0] - top])
    # cv2 puts pixel centers at whole numbers, hence the half of a fine pixel.
    fine = [((points + inside) * _SUPERSAMPLING - 0.5) * 2**_FIXED_POINT_BITS for points in polygons]
    patch = np.zeros((patch_side * _SUPERSAMPLING, patch_side * _SUPERSAMPLING), np.float32)
    cv2.fillPoly(patch, [np.rint(points).astype(np.int32) for points in fine], (1.0,), cv2.LINE_8, _FIXED_POINT_BITS)
    patch = cv2.resize(patch, (patch_side, patch_side), interpolation=cv2.INTER_AREA).astype(np.float32)
    coverage = np.zeros((size, size), np.float32)
    rows = slice(max(top, 0), max(min(top + patch_side, size), 0))
    columns = slice(max(left, 0), max(min(left + patch_side, size), 0))
    coverage[rows, columns] = patch[
        rows.start - top : max(rows.stop, rows.start) - top,
        columns.start - left : max(columns.stop, columns.start) - left,
    ]
    return coverage, float(patch.sum())


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


# --- color and texture ---


def _draw_background(rng: np.random.Generator, size: int) -> tuple[FloatImage, FloatImage]:
    """Return a textured and cluttered (H, W, 3) float32 background, and its main color (3,)."""
    scale = size / _REFERENCE_SIDE
    color = rng.uniform(30, 225, 3).astype(np.float32)
    second = np.clip(color + rng.uniform(-60, 60, 3), 0, 255).astype(np.float32)
    blend = _draw_texture(rng, size, size, scale)[..., None]
    image = color + (second - color) * blend
    for _ in range(rng.integers(3, 12)):
        clutter_color = np.clip(color + rng.uniform(-75, 75, 3), 0, 255).tolist()
        start = rng.uniform(0, size, 2)
        if rng.random() < 0.5:
            stop = start + rng.uniform(-30, 30, 2) * scale
            thickness = max(1, round(rng.uniform(1, 3) * scale))
            cv2.line(image, _to_point(start), _to_point(stop), clutter_color, thickness, cv2.LINE_AA)
        else:
            corners = start + rng.uniform(-7, 7, (4, 2)) * scale
            cv2.fillPoly(image, [np.rint(corners).astype(np.int32)], clutter_color, cv2.LINE_AA)
    return image, color


def _to_point(xy: NDArray[np.float64]) -> tuple[int, int]:
    return round(float(xy[0])), round(float(xy[1]))


def _paint_object(
    rng: np.random.Generator, image: FloatImage, placed: _PlacedObject, background_color: FloatImage
) -> None:
    """Blend a textured object over the picture, in place."""
    rows, columns = _extent(placed.coverage.max(axis=1)), _extent(placed.coverage.max(axis=0))
    height, width = rows.stop - rows.start, columns.stop - columns.start
    color = _contrasting_color(rng, background_color)
    second = np.clip(color + rng.uniform(-70, 70, 3), 0, 255).astype(np.float32)
    texture = _draw_texture(rng, height, width, image.shape[0] / _REFERENCE_SIDE)[..., None]
    fill = color + (second - color) * texture
    alpha = placed.coverage[rows, columns, None]
    image[rows, columns] += alpha * (fill - image[rows, columns])


def _extent(profile: FloatImage) -> slice:
    positions = np.flatnonzero(profile)
    return slice(int(positions[0]), int(positions[-1]) + 1)


def _contrasting_color(rng: np.random.Generator, background_color: FloatImage) -> FloatImage:
    while True:
        color = rng.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(color - background_color) >= _MIN_CONTRAST:
            return color


def _draw_texture(rng: np.random.Generator, height: int, width: int, scale: float) -> FloatImage:
    """Draw one of five textures: (height, width) float32 in [0, 1]; ``scale`` stretches its grain."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    across = np.float32(np.cos(angle)) * y - np.float32(np.sin(angle)) * x
    frequency = 2 * np.pi / (rng.uniform(7, 22) * scale)
    kind = rng.integers(5)
    if kind == 0:  # even
        texture = np.full((height, width), rng.uniform(0, 0.3))
    elif kind == 1:  # gradient
        texture = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    elif kind == 2:  # stripes
        texture = 0.5 + 0.5 * np.tanh(3 * np.sin(along * frequency))
    elif kind == 3:  # checks
        texture = 0.5 + 0.5 * np.tanh(4 * np.sin(along * frequency) * np.sin(across * frequency))
    else:  # blotches
        cell = rng.uniform(4, 10) * scale
        coarse = rng.random((int(height / cell) + 2, int(width / cell) + 2)).astype(np.float32)
        texture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    clipped: FloatImage = np.clip(texture, 0, 1).astype(np.float32)
    return clipped
