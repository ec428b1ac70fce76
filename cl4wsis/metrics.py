"""How good predictions are: VOC-style and COCO-style average precision, class IoU, forgetting.

All values are fractions in [0, 1]. Classes without ground truth are NaN in arrays, None in reports, and left out of
means. Predictions and ground truths come as one :class:`~cl4wsis.instances.Instances` per image, of the same size.

Source: CL4WSIS (ICCV 2023), section 4; VOC-style matching as in SDS (ECCV 2014), area under all points.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cl4wsis.config import Settings
from cl4wsis.instances import Instances
from cl4wsis.tasks import ClassSplit

FloatArray = NDArray[np.float64]

THRESHOLDS_9 = tuple(percent / 100 for percent in range(50, 95, 5))
"""0.50, 0.55, ..., 0.90: what published tables of this task call AP@.5:.95."""
THRESHOLDS_10 = tuple(percent / 100 for percent in range(50, 100, 5))
"""0.50, 0.55, ..., 0.95."""


class GroupMeans(Settings):
    """Unweighted means over classes; None where no class has ground truth."""

    old: float | None
    """Classes of earlier steps; None at step 0."""
    new: float | None
    """Classes the step added."""
    all: float | None
    """All seen classes; for IoU with background."""


class ClassMetrics(Settings):
    """What was measured on one class."""

    name: str
    num_instances: int
    """Ground-truth objects."""
    ap50: float | None
    """VOC-style AP at IoU 0.5."""
    ap: float | None
    """VOC-style AP, mean over the thresholds 0.50 to 0.95."""
    ap9: float | None
    """VOC-style AP, mean over the thresholds 0.50 to 0.90."""
    coco_ap: float | None
    """COCO-style AP, mean over the thresholds 0.50 to 0.95."""
    iou: float | None
    """Pixel IoU of the class map."""


class EvaluationReport(Settings):
    """Measurements of one step on one set of images."""

    step: int
    num_images: int
    num_old_classes: int
    classes: tuple[ClassMetrics, ...]
    """One entry per seen class, by label."""
    background_iou: float | None
    ap50: GroupMeans
    ap: GroupMeans
    ap9: GroupMeans
    coco_ap: GroupMeans
    iou: GroupMeans


class ForgettingReport(Settings):
    """What a later step took away from the classes of earlier steps."""

    step: int
    """The step looked at."""
    classes: dict[str, float | None]
    """Drop of AP50 since the step that introduced the class; negative where it improved."""
    mean: float | None


class _ImageMatches(NamedTuple):
    """The predictions of one image, each with the object of its class that it overlaps most."""

    labels: NDArray[np.int32]  # (P,)
    scores: NDArray[np.float32]  # (P,)
    overlaps: FloatArray  # (P,) IoU, 0 where the image has no object of the class
    objects: NDArray[np.int64]  # (P,) row of the object
    object_labels: NDArray[np.int32]  # (G,)


class _CocoImage(NamedTuple):
    """One image in the form pycocotools reads."""

    size: tuple[int, int]
    truth: list[dict[str, Any]]
    predicted: list[dict[str, Any]]


def voc_average_precision(
    predictions: Iterable[Instances],
    ground_truths: Iterable[Instances],
    num_classes: int,
    iou_thresholds: Sequence[float] = THRESHOLDS_10,
) -> FloatArray:
    """Compute VOC-style average precision of masks.

    Per class, the predictions of all images are pooled and taken by falling score (equal ones in the order given). Each
    is compared with the object of its class that it overlaps most in its image, and with no other: the first prediction
    that reaches the threshold there is right, later ones are wrong. AP is the area under the monotone envelope of
    precision over recall. There are no area ranges, no crowds and no limit on the number of predictions.

    Args:
        predictions: one per image.
        ground_truths: one per image; objects without a pixel do not count.
        num_classes: foreground classes.
        iou_thresholds: T values; a mask IoU of exactly the threshold is enough.

    Returns:
        (num_classes, T); NaN for classes without ground truth.

    Raises:
        ValueError: numbers of images, image sizes or labels do not fit.
    """
    pairs = enumerate(_pairs(predictions, ground_truths))
    matches = [_match_image(index, *pair, num_classes) for index, pair in pairs]
    return _voc_average_precision(matches, num_classes, iou_thresholds)


def coco_average_precision(
    predictions: Iterable[Instances], ground_truths: Iterable[Instances], num_classes: int
) -> FloatArray:
    """Compute COCO-style average precision of masks with pycocotools (all areas, 100 predictions per image and class).

    Args:
        predictions: one per image.
        ground_truths: one per image; objects without a pixel do not count.
        num_classes: foreground classes.

    Returns:
        (num_classes, 10) for the thresholds 0.50 to 0.95; NaN for classes without ground truth.
    """
    images = []
    for index, (prediction, ground_truth) in enumerate(_pairs(predictions, ground_truths)):
        _check_pair(index, prediction, ground_truth, num_classes)
        images.append(_coco_image(index, prediction, ground_truth))
    return _coco_average_precision(images, num_classes)


def confusion_matrix(prediction_map: NDArray[Any], target_map: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """Count pixels by target and predicted class.

    Args:
        prediction_map: (H, W), 0 background, class ``c`` is ``c + 1``.
        target_map: (H, W), same.
        num_classes: foreground classes.

    Returns:
        (num_classes + 1, num_classes + 1), rows are targets.

    Raises:
        ValueError: sizes differ, or a value is no class.
    """
    if prediction_map.shape != target_map.shape:
        raise ValueError(f"class maps must have one size, found {prediction_map.shape} and {target_map.shape}")
    target, prediction = (values.reshape(-1).astype(np.int64) for values in (target_map, prediction_map))
    for name, values in (("target", target), ("prediction", prediction)):
        if values.size and not 0 <= values.min() <= values.max() <= num_classes:
            raise ValueError(f"{name} map must lie in 0..{num_classes}, found {values.min()}..{values.max()}")
    side = num_classes + 1
    return np.bincount(target * side + prediction, minlength=side**2).reshape(side, side)


def mean_iou(confusion: NDArray[Any]) -> tuple[FloatArray, float]:
    """Compute intersection over union of classes.

    Args:
        confusion: (C, C) pixel counts, rows are targets.

    Returns:
        (C,) IoU, background first and NaN for classes without a target pixel; and their mean, background included
        (NaN if there is none).
    """
    right = np.diag(confusion).astype(np.float64)
    targets = confusion.sum(axis=1)
    iou = np.full(len(right), np.nan)
    np.divide(right, targets + confusion.sum(axis=0) - right, out=iou, where=targets > 0)
    return iou, _mean(iou)


class Evaluation:
    """Measures one step on a set of images, one image at a time.

    What is kept of an image grows with its instances, not with its pixels: matches, run-length codes, pixel counts.

    Args:
        split: the classes of the step.
    """

    def __init__(self, split: ClassSplit) -> None:
        self.split = split
        self._matches: list[_ImageMatches] = []
        self._images: list[_CocoImage] = []
        self._confusion = np.zeros((split.num_classes + 1,) * 2, np.int64)

    def __len__(self) -> int:
        """Return the number of images so far."""
        return len(self._images)

    def add(self, prediction: Instances, ground_truth: Instances, semantic_map: NDArray[Any] | None = None) -> None:
        """Take one image.

        Args:
            prediction: for the image.
            ground_truth: of the same size, holding only classes seen so far.
            semantic_map: class map (H, W) of the network, 0 background; when not given, the class map is painted from
                the predicted instances.

        Raises:
            ValueError: sizes or labels do not fit.
        """
        index, num_classes = len(self), self.split.num_classes
        matches = _match_image(index, prediction, ground_truth, num_classes)
        predicted_map = semantic_map_from_instances(prediction) if semantic_map is None else semantic_map
        self._confusion += confusion_matrix(predicted_map, semantic_map_from_instances(ground_truth), num_classes)
        self._matches.append(matches)
        self._images.append(_coco_image(index, prediction, ground_truth))

    def ap50(self, images: Sequence[int] | NDArray[np.int64]) -> GroupMeans:
        """Return VOC-style AP50 on some of the images, each counted as often as it is listed.

        Drawn again and again with replacement, images tell how far a value, or the difference of two evaluations of
        the same images, depends on which images there are (bootstrap, Efron 1979).
        """
        chosen = [self._matches[index] for index in images]
        return group_means(_voc_average_precision(chosen, self.split.num_classes, (0.5,))[:, 0], self.split)

    def report(self) -> EvaluationReport:
        """Return what was measured on the images so far."""
        split, num_classes = self.split, self.split.num_classes
        voc = _voc_average_precision(self._matches, num_classes, THRESHOLDS_10)
        columns = {
            "ap50": voc[:, 0],
            "ap": voc.mean(axis=1),
            "ap9": voc[:, : len(THRESHOLDS_9)].mean(axis=1),
            "coco_ap": _coco_average_precision(self._images, num_classes).mean(axis=1),
        }
        iou, mean_of_all = mean_iou(self._confusion)
        groups = {name: group_means(values, split) for name, values in columns.items()}
        groups["iou"] = group_means(iou[1:], split).model_copy(update={"all": _number(mean_of_all)})
        counts = np.bincount(_objects_by_label(self._matches), minlength=num_classes)
        classes = tuple(
            ClassMetrics(
                name=name,
                num_instances=int(counts[label]),
                iou=_number(iou[label + 1]),
                **{column: _number(values[label]) for column, values in columns.items()},
            )
            for label, name in enumerate(split.seen_names)
        )
        return EvaluationReport(
            step=split.step,
            num_images=len(self),
            num_old_classes=split.num_old_classes,
            classes=classes,
            background_iou=_number(iou[0]),
            **groups,
        )


def group_means(values: FloatArray, split: ClassSplit) -> GroupMeans:
    """Return the means of one value per class, (C,), over the classes of a step's split."""
    return GroupMeans(
        old=_number(_mean(values[split.center_old])),
        new=_number(_mean(values[split.center_new])),
        all=_number(_mean(values)),
    )


def forgetting(reports: Mapping[int, EvaluationReport]) -> ForgettingReport:
    """Compare the last step with the steps that introduced its old classes.

    Args:
        reports: by step; the last one is looked at. A class whose introduction is not among them has no value.

    Raises:
        ValueError: there is no report.
    """
    if not reports:
        raise ValueError("forgetting needs at least the report of one step, found none")
    last = reports[max(reports)]
    introduced = {
        entry.name: entry.ap50 for report in reports.values() for entry in report.classes[report.num_old_classes :]
    }
    drops: dict[str, float | None] = {}
    for entry in last.classes[: last.num_old_classes]:
        before = introduced.get(entry.name)
        drops[entry.name] = None if before is None or entry.ap50 is None else before - entry.ap50
    values = [drop for drop in drops.values() if drop is not None]
    return ForgettingReport(step=last.step, classes=drops, mean=_number(_mean(np.array(values, np.float64))))


def semantic_map_from_instances(instances: Instances) -> NDArray[np.int32]:
    """Paint instances by class: (H, W) int32, 0 background, class ``c`` is ``c + 1``."""
    class_of_id = np.concatenate([np.zeros(1, np.int32), instances.labels + 1]).astype(np.int32)
    return class_of_id[instances.instance_ids]


def _pairs(
    predictions: Iterable[Instances], ground_truths: Iterable[Instances]
) -> Iterator[tuple[Instances, Instances]]:
    for index, (prediction, ground_truth) in enumerate(zip_longest(predictions, ground_truths)):
        if prediction is None or ground_truth is None:
            missing = "prediction" if prediction is None else "ground truth"
            raise ValueError(f"image {index}: there is no {missing}; each image needs both, in the same order")
        yield prediction, ground_truth


def _check_pair(index: int, prediction: Instances, ground_truth: Instances, num_classes: int) -> None:
    found, expected = prediction.instance_ids.shape, ground_truth.instance_ids.shape
    if found != expected:
        raise ValueError(
            f"image {index}: prediction is {found}, ground truth {expected}; both must have the size of the image"
        )
    for name, labels in (("prediction", prediction.labels), ("ground truth", ground_truth.labels)):
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"image {index}: labels of the {name} must lie in 0..{num_classes - 1}, "
                f"found {labels.min()}..{labels.max()}; leave out classes that are not seen yet"
            )


def _match_image(index: int, prediction: Instances, ground_truth: Instances, num_classes: int) -> _ImageMatches:
    _check_pair(index, prediction, ground_truth, num_classes)
    overlaps = overlap_matrix(prediction, ground_truth)
    overlaps[prediction.labels[:, None] != ground_truth.labels[None]] = 0
    objects = overlaps.argmax(axis=1) if len(ground_truth) else np.zeros(len(prediction), np.int64)
    best = overlaps.max(axis=1, initial=0.0)
    return _ImageMatches(
        prediction.labels, prediction.scores, best, objects, ground_truth.labels[ground_truth.areas > 0]
    )


def overlap_matrix(first: Instances, second: Instances) -> FloatArray:
    """Compute mask IoU of all pairs from the two id maps in one pass.

    Args:
        first: N instances.
        second: M instances of an image of the same size.

    Returns:
        (N, M); 0 for pairs of empty masks.
    """
    shape = (len(first) + 1, len(second) + 1)
    pair_ids = first.instance_ids.astype(np.int64) * shape[1] + second.instance_ids
    counts = np.bincount(pair_ids.reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)
    common = counts[1:, 1:].astype(np.float64)
    union = counts.sum(axis=1)[1:, None] + counts.sum(axis=0)[None, 1:] - common
    overlaps: FloatArray = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return overlaps


def _objects_by_label(matches: Sequence[_ImageMatches]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, np.int32), *(match.object_labels for match in matches)])


def _voc_average_precision(
    matches: Sequence[_ImageMatches], num_classes: int, iou_thresholds: Sequence[float]
) -> FloatArray:
    labels = np.concatenate([np.zeros(0, np.int32), *(match.labels for match in matches)])
    scores = np.concatenate([np.zeros(0, np.float32), *(match.scores for match in matches)])
    overlaps = np.concatenate([np.zeros(0), *(match.overlaps for match in matches)])
    images = np.repeat(np.arange(len(matches)), [len(match.labels) for match in matches])
    rows = np.concatenate([np.zeros(0, np.int64), *(match.objects for match in matches)])
    objects = images * (rows.max(initial=0) + 1) + rows  # one number per object of the whole set
    num_objects = np.bincount(_objects_by_label(matches), minlength=num_classes)
    precision = np.full((num_classes, len(iou_thresholds)), np.nan)
    order = np.argsort(-scores, kind="stable")
    for label in np.flatnonzero(num_objects):
        ranked = order[labels[order] == label]
        for column, threshold in enumerate(iou_thresholds):
            hits = np.flatnonzero((overlaps[ranked] >= threshold) & (overlaps[ranked] > 0))
            is_right = np.zeros(len(ranked), bool)
            is_right[hits[np.unique(objects[ranked][hits], return_index=True)[1]]] = True
            precision[label, column] = _area_under_envelope(is_right, int(num_objects[label]))
    return precision


def _area_under_envelope(is_right: NDArray[np.bool_], num_objects: int) -> float:
    """Area under the highest precision at each recall or beyond, for predictions by falling score."""
    precision = np.cumsum(is_right) / np.arange(1, len(is_right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[is_right].sum() / num_objects)  # recall grows by 1 / num_objects at each right prediction


def _coco_image(index: int, prediction: Instances, ground_truth: Instances) -> _CocoImage:
    visible = ground_truth.select(ground_truth.areas > 0)
    size = (int(visible.instance_ids.shape[0]), int(visible.instance_ids.shape[1]))
    return _CocoImage(size, _coco_annotations(index, visible), _coco_annotations(index, prediction))


def _coco_annotations(image: int, instances: Instances) -> list[dict[str, Any]]:
    rows = zip(instances.to_coco(image), instances.areas.tolist(), strict=True)
    return [{**row, "area": area, "iscrowd": 0} for row, area in rows]


def _coco_average_precision(images: Sequence[_CocoImage], num_classes: int) -> FloatArray:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco_index(images, [image.truth for image in images], num_classes)
        predicted = _coco_index(images, [image.predicted for image in images], num_classes)
        evaluation = COCOeval(truth, predicted, iouType="segm")
        settings = evaluation.params  # only objects of all areas and the largest number of predictions are looked at
        settings.areaRng, settings.areaRngLbl, settings.maxDets = (
            settings.areaRng[:1],
            settings.areaRngLbl[:1],
            settings.maxDets[-1:],
        )
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # (10, 101, num_classes): all areas, 100 predictions
    average: FloatArray = np.where(precision.min(axis=1) < 0, np.nan, precision.mean(axis=1)).T
    return average


def _coco_index(images: Sequence[_CocoImage], annotations: Sequence[list[dict[str, Any]]], num_classes: int) -> Any:
    from pycocotools.coco import COCO

    data = COCO()
    data.dataset = {
        "images": [{"id": n, "height": image.size[0], "width": image.size[1]} for n, image in enumerate(images)],
        "categories": [{"id": label + 1} for label in range(num_classes)],
        "annotations": [
            {"id": number, **annotation} for number, annotation in enumerate(chain.from_iterable(annotations), start=1)
        ],
    }
    data.createIndex()
    return data


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
