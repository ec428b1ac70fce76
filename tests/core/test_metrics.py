import gc
import json
import weakref

import numpy as np
import pytest
from cases import grouping_scene
from hypothesis import given, settings
from hypothesis import strategies as st

from cl4wsis.instances import Instances
from cl4wsis.metrics import (
    THRESHOLDS_9,
    THRESHOLDS_10,
    Evaluation,
    EvaluationReport,
    coco_average_precision,
    confusion_matrix,
    forgetting,
    mean_iou,
    overlap_matrix,
    semantic_map_from_instances,
    voc_average_precision,
)
from cl4wsis.tasks import ClassSplit


def row(text, labels, scores=None):
    """One-row image from digits; the scores of ground truth do not matter."""
    ids = np.array([[int(digit) for digit in text]], np.int32)
    return Instances.from_ids(ids, labels, np.ones(len(labels)) if scores is None else scores)


def evaluated(predictions, ground_truths, split, semantic_maps=None):
    evaluation = Evaluation(split)
    predictions = list(predictions)
    for images in zip(predictions, ground_truths, semantic_maps or [None] * len(predictions), strict=True):
        evaluation.add(*images)
    return evaluation.report()


def ap50(predictions, ground_truths, num_classes=1):
    return voc_average_precision(predictions, ground_truths, num_classes, [0.5])[:, 0].tolist()


def test_thresholds():
    assert THRESHOLDS_9 == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    assert (*THRESHOLDS_9, 0.95) == THRESHOLDS_10


def test_perfect_predictions_reach_one():
    truth = [row("1122", [0, 1]), row("0111", [0])]
    np.testing.assert_array_equal(voc_average_precision(truth, truth, 2, THRESHOLDS_10), np.ones((2, 10)))
    np.testing.assert_allclose(coco_average_precision(truth, truth, 2), np.ones((2, 10)))


def test_area_lies_under_the_envelope_of_all_images_pooled():
    truth = [row("1122", [0, 0]), row("1100", [0])]
    # By score: right (0.9), wrong (0.8), right (0.7): precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3.
    predictions = [row("1100", [0], [0.9]), row("1122", [0, 0], [0.7, 0.8])]
    np.testing.assert_allclose(ap50(predictions, truth), [(1 + 2 / 3) / 3])


def test_envelope_lifts_an_early_mistake():
    predictions = [row("1122030", [0, 0, 0], [0.6, 0.5, 0.9])]
    truth = [row("1122000", [0, 0])]
    np.testing.assert_allclose(ap50(predictions, truth), [2 / 3])


def test_second_prediction_of_an_object_is_wrong():
    truth = [row("1111110022", [0, 0])]
    # Both overlap object 1 most; at 0.25 both reach it, and the lower one does not fall back to anything.
    predictions = [row("1112220033", [0, 0, 0], [0.9, 0.8, 0.7])]
    expected = (1 + 2 / 3) / 2
    np.testing.assert_allclose(voc_average_precision(predictions, truth, 1, [0.25]), [[expected]])


def test_prediction_below_the_threshold_does_not_use_up_its_object():
    truth = [row("1111", [0])]
    predictions = [row("1222", [0, 0], [0.9, 0.8])]
    np.testing.assert_allclose(ap50(predictions, truth), [0.5])


@pytest.mark.parametrize(("texts", "expected"), [(("110", "000"), 1.0), (("000", "110"), 0.5)])
def test_equal_scores_keep_their_order(texts, expected):
    truth = [row(text, [0] if "1" in text else []) for text in texts]
    np.testing.assert_allclose(ap50([row("110", [0], [0.5])] * 2, truth), [expected])


def test_overlap_equal_to_the_threshold_counts():
    assert ap50([row("1100", [0])], [row("1111", [0])]) == [1.0]
    np.testing.assert_array_equal(
        voc_average_precision([row("1111111000", [0])], [row("1111111111", [0])], 1, [0.7, 0.75]), [[1.0, 0.0]]
    )


def test_only_objects_of_the_same_class_match():
    assert ap50([row("1111", [1])], [row("1111", [0])], 3)[0] == 0
    assert np.isnan(ap50([row("1111", [1])], [row("1111", [0])], 3)[1:]).all()


def test_prediction_matches_within_its_class_though_another_class_overlaps_more():
    truth = [row("1112200000", [1, 0])]
    prediction = [row("1111100000", [0])]
    np.testing.assert_allclose(voc_average_precision(prediction, truth, 2, [0.4])[0], [1.0])


def test_class_without_ground_truth_is_nan_and_without_prediction_zero():
    values = voc_average_precision([row("000", [])], [row("110", [1])], 2, [0.5, 0.75])
    np.testing.assert_array_equal(values, [[np.nan, np.nan], [0, 0]])
    np.testing.assert_array_equal(
        coco_average_precision([row("000", [])], [row("110", [1])], 2), [[np.nan] * 10, [0] * 10]
    )


def test_objects_without_a_pixel_do_not_count():
    truth = Instances.from_ids(np.array([[1, 1, 0]], np.int32), [0, 0], [1, 1])
    prediction = [row("110", [0])]
    assert ap50(prediction, [truth]) == [1.0]
    np.testing.assert_allclose(coco_average_precision(prediction, [truth], 1), np.ones((1, 10)))


def test_empty_prediction_is_a_mistake():
    empty = Instances.from_ids(np.array([[2, 2, 0]], np.int32), [0, 0], [0.9, 0.8])
    np.testing.assert_allclose(ap50([empty], [row("110", [0])]), [0.5])


def test_no_images():
    assert np.isnan(voc_average_precision([], [], 2, [0.5])).all()


@pytest.mark.parametrize(
    ("predictions", "truths", "message"),
    [
        ([row("11", [0])], [row("111", [0])], r"image 0: prediction is \(1, 2\), ground truth \(1, 3\)"),
        ([row("11", [0])], [row("11", [5])], r"labels of the ground truth must lie in 0\.\.1, found 5\.\.5"),
        ([row("11", [-1])], [row("11", [0])], "labels of the prediction"),
        ([row("11", [0])] * 2, [row("11", [0])], "image 1: there is no ground truth"),
        ([], [row("11", [0])], "image 0: there is no prediction"),
    ],
)
def test_images_that_do_not_fit_are_refused(predictions, truths, message):
    for measure in (voc_average_precision, coco_average_precision):
        with pytest.raises(ValueError, match=message):
            measure(predictions, truths, 2)


def slow_voc_ap(predictions, truths, label, threshold):
    """The textbook loop: one mask, one object, one prediction at a time."""
    pool = []
    for image, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        objects = [(g, m) for g, m in enumerate(truth.masks()) if truth.labels[g] == label and m.any()]
        for n, mask in enumerate(prediction.masks()):
            if prediction.labels[n] != label:
                continue
            overlaps = [(mask & m).sum() / (mask | m).sum() for _, m in objects]
            best = int(np.argmax(overlaps)) if overlaps else -1
            hit = best >= 0 and overlaps[best] >= threshold
            pool.append((-float(prediction.scores[n]), len(pool), (image, objects[best][0]) if hit else None))
    total = sum(int(truth.labels[g] == label and m.any()) for truth in truths for g, m in enumerate(truth.masks()))
    if total == 0:
        return np.nan
    seen, right, precisions, recalls = set(), 0, [], []
    for rank, (_, _, target) in enumerate(sorted(pool), start=1):
        right += target is not None and target not in seen
        seen.add(target)
        precisions.append(right / rank)
        recalls.append(right / total)
    area, last = 0.0, 0.0
    for index, recall in enumerate(recalls):
        area += (recall - last) * max(precisions[index:])
        last = recall
    return area


def drawn_set(seed, num_images=4, num_classes=3):
    """Ground truth drawn as ellipses; predictions are the drawing shifted, split, relabelled and scored at random."""
    generator = np.random.default_rng(seed)
    predictions, truths = [], []
    for _ in range(num_images):
        scene = grouping_scene(int(generator.integers(1 << 30)), num_classes, 24, 32, int(generator.integers(0, 6)))
        truths.append(Instances.from_ids(scene.instance_ids, scene.labels, np.ones(len(scene.labels))))
        ids = np.roll(scene.instance_ids, generator.integers(-1, 2, size=2), axis=(0, 1))
        count = len(scene.labels)
        halves = ids + np.where((ids > 0) & (np.arange(32) % 7 == 0), count, 0)
        labels = np.concatenate([scene.labels, scene.labels])
        labels = np.where(generator.random(2 * count) < 0.2, generator.integers(num_classes, size=2 * count), labels)
        scores = generator.integers(1, 6, size=2 * count) / 5
        predictions.append(Instances.from_ids(halves.astype(np.int32), labels, scores))
    return predictions, truths


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100_000))
def test_voc_agrees_with_the_textbook_loop(seed):
    predictions, truths = drawn_set(seed)
    predictions = [p.select(p.areas > 0) for p in predictions]
    found = voc_average_precision(predictions, truths, 3, THRESHOLDS_10)
    expected = [[slow_voc_ap(predictions, truths, label, t) for t in THRESHOLDS_10] for label in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100_000), st.sampled_from([0.5, 0.75]))
def test_better_scores_for_all_change_nothing_and_order_of_classes_neither(seed, threshold):
    predictions, truths = drawn_set(seed)
    first = voc_average_precision(predictions, truths, 3, [threshold])
    higher = [Instances(p.instance_ids, p.labels, p.scores * 10 + 3, p.boxes) for p in predictions]
    np.testing.assert_array_equal(voc_average_precision(higher, truths, 3, [threshold]), first)
    swap = np.array([2, 0, 1], np.int32)
    renamed = [[Instances(p.instance_ids, swap[p.labels], p.scores, p.boxes) for p in s] for s in (predictions, truths)]
    np.testing.assert_array_equal(voc_average_precision(*renamed, 3, [threshold])[swap], first)


def test_coco_interpolates_at_101_recalls(capsys):
    truth = [row("1122", [0, 0])]
    predictions = [row("1100", [0], [0.9])]
    np.testing.assert_allclose(coco_average_precision(predictions, truth, 1), np.full((1, 10), 51 / 101))
    assert capsys.readouterr().out == ""


def test_overlap_matrix():
    np.testing.assert_allclose(
        overlap_matrix(row("11220", [0, 0, 0]), row("11112", [0, 0])), [[0.5, 0], [0.5, 0], [0, 0]]
    )


def test_confusion_matrix_counts_targets_by_row():
    target = np.array([[0, 1, 1, 2]])
    found = confusion_matrix(np.array([[0, 1, 2, 2]]), target, 2)
    np.testing.assert_array_equal(found, [[1, 0, 0], [0, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [([[0, 3]], [[0, 1]], "prediction map"), ([[0, 1]], [[0, 9]], "target map"), ([[0]], [[0, 1]], "one size")],
)
def test_confusion_matrix_refuses_unknown_classes(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(prediction), np.array(target), 2)


def test_mean_iou_includes_background_and_skips_absent_classes():
    iou, mean = mean_iou(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    np.testing.assert_allclose(iou, [6 / 9, 3 / 6, np.nan])
    assert mean == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert np.isnan(mean_iou(np.zeros((2, 2), np.int64))[1])


def test_semantic_map_is_painted_by_label():
    assert semantic_map_from_instances(row("0123", [4, 0, 4])).tolist() == [[0, 5, 1, 5]]


STEP_1 = ClassSplit(step=1, old_names=("bear", "tiger"), new_names=("deer",))


def test_report_groups_old_and_new_classes():
    truth = [row("1122330000", [0, 1, 2])]
    report = evaluated([row("1100330000", [0, 0, 2])], truth, STEP_1)
    assert [entry.name for entry in report.classes] == ["bear", "tiger", "deer"]
    assert [entry.ap50 for entry in report.classes] == [1, 0, 1]
    assert (report.ap50.old, report.ap50.new) == (0.5, 1)
    assert report.ap50.all == pytest.approx(2 / 3)
    assert report.ap9 == report.ap == report.ap50
    assert [entry.iou for entry in report.classes] == [1, 0, 1]
    assert report.background_iou == pytest.approx(4 / 6)
    assert (report.iou.old, report.iou.new) == (0.5, 1)
    assert report.iou.all == pytest.approx((1 + 0 + 1 + 4 / 6) / 4)  # with background
    assert [entry.num_instances for entry in report.classes] == [1, 1, 1]


def test_nine_and_ten_thresholds_differ_only_in_the_last():
    truth = [row("1" * 37 + "0" * 3, [0])]
    prediction = [row("1" * 34 + "0" * 6, [0])]  # IoU 34 / 37 = 0.919
    report = evaluated(prediction, truth, ClassSplit(step=0, old_names=(), new_names=("bear",)))
    assert report.ap9.all == 1
    assert report.ap.all == pytest.approx(0.9)
    assert report.coco_ap.all == pytest.approx(0.9)


def test_report_takes_the_networks_own_class_map():
    truth = [row("1122", [0, 2])]
    report = evaluated([row("0000", [])], truth, STEP_1, [np.array([[1, 1, 3, 0]], np.uint8)])
    assert [entry.iou for entry in report.classes] == [1, None, 0.5]
    assert report.ap50.all == 0


def test_evaluation_keeps_no_maps():
    evaluation = Evaluation(STEP_1)
    images = row("1122", [0, 2]), row("1120", [0, 1]), np.zeros((1, 4), np.uint8)
    maps = [weakref.ref(image) for image in images]
    evaluation.add(*images)
    del images
    gc.collect()
    assert [found() for found in maps] == [None] * 3
    assert len(evaluation) == evaluation.report().num_images == 1


def test_ap50_of_images_drawn_with_replacement():
    evaluation = Evaluation(STEP_1)
    right, wrong, other = row("1100", [0]), row("0011", [0]), row("1100", [2])
    for prediction, truth in ((right, right), (wrong, right), (other, other)):
        evaluation.add(prediction, truth)
    assert evaluation.ap50(range(3)) == evaluation.report().ap50
    assert evaluation.ap50([0, 0]).model_dump() == {"old": 1.0, "new": None, "all": 1.0}
    assert evaluation.ap50([1, 1, 2]).model_dump() == {"old": 0.0, "new": 1.0, "all": 0.5}
    assert evaluation.ap50([0, 1, 1, 1]).old == pytest.approx(1 / 4)


def test_more_classes_than_a_byte_holds():
    split = ClassSplit(step=0, old_names=(), new_names=tuple(str(label) for label in range(300)))
    report = evaluated([row("1122", [254, 299])], [row("1122", [254, 299])], split)
    assert report.classes[254].iou == report.classes[299].iou == 1


def test_report_survives_json_and_step_0_has_no_old_classes():
    base = ClassSplit(step=0, old_names=(), new_names=("bear", "tiger"))
    report = evaluated([row("11", [0])], [row("11", [0])], base)
    assert report.ap50.old is None
    assert report.classes[1].ap50 is None
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.model_dump_json())["ap50"] == {"old": None, "new": 1.0, "all": 1.0}


def test_report_agrees_with_its_parts():
    predictions, truths = drawn_set(5, num_images=6)
    report = evaluated(iter(predictions), iter(truths), STEP_1)
    voc = voc_average_precision(predictions, truths, 3)
    np.testing.assert_allclose([entry.ap for entry in report.classes], voc.mean(axis=1))
    coco = coco_average_precision(predictions, truths, 3)
    np.testing.assert_allclose([entry.coco_ap for entry in report.classes], coco.mean(axis=1))
    assert 0 < report.ap50.all < 1


def test_forgetting_counts_from_the_step_that_introduced_a_class():
    splits = [
        ClassSplit(step=0, old_names=(), new_names=("a",)),
        ClassSplit(step=1, old_names=("a",), new_names=("b",)),
        ClassSplit(step=2, old_names=("a", "b"), new_names=("c",)),
    ]
    right = row("1122", [0, 1])
    truths = [[row("1100", [0])], [right], [right]]
    predictions = [[row("1100", [0])], [right], [row("0022", [0, 1])]]
    reports = {s: evaluated(predictions[s], truths[s], splits[s]) for s in range(3)}
    found = forgetting(reports)
    assert (found.step, found.classes, found.mean) == (2, {"a": 1.0, "b": 0.0}, 0.5)
    assert forgetting({0: reports[0]}).mean is None
    assert forgetting({1: reports[1], 2: reports[2]}).classes == {"a": None, "b": 0.0}
    with pytest.raises(ValueError, match="at least the report of one step"):
        forgetting({})
