"""How alike two answers are, on id maps one can check by eye."""

import numpy as np
import pytest

from cl4wsis.agreement import AgreementCounter
from cl4wsis.instances import Instances

TWO = Instances.from_ids(
    np.array(
        [
            [1, 1, 1, 0, 2, 2],
            [1, 1, 1, 0, 2, 2],
        ],
        np.int32,
    ),
    [0, 1],
    [0.9, 0.5],
)


def agreement(answer: Instances, reference: Instances = TWO):
    counter = AgreementCounter()
    counter.add(answer, reference)
    return counter.result()


def with_ids(ids: list[list[int]], labels: list[int], scores: list[float]) -> Instances:
    return Instances.from_ids(np.array(ids, np.int32), labels, scores)


def test_the_same_answer_agrees() -> None:
    result = agreement(TWO)
    assert (result.images, result.instances) == (1, 2)
    assert (result.differing_pixels, result.matched, result.mask_iou, result.score_error) == (0, 1, 1, 0)


def test_the_order_of_instances_does_not_matter() -> None:
    result = agreement(TWO.select(np.array([1, 0])))
    assert (result.differing_pixels, result.matched, result.mask_iou, result.score_error) == (0, 1, 1, 0)


def test_a_moved_border_counts_its_pixels() -> None:
    result = agreement(with_ids([[1, 1, 1, 0, 2, 2], [1, 1, 0, 0, 2, 2]], [0, 1], [0.9, 0.4]))
    assert result.differing_pixels == pytest.approx(1 / 10)
    assert result.matched == 1
    assert result.mask_iou == pytest.approx((5 / 6 + 1) / 2)
    assert result.score_error == pytest.approx(0.1)


def test_another_class_is_no_match() -> None:
    result = agreement(with_ids(TWO.instance_ids.tolist(), [0, 0], [0.9, 0.5]))
    assert result.matched == pytest.approx(2 / 4)
    assert result.differing_pixels == pytest.approx(4 / 10)
    assert result.mask_iou == 1


def test_half_a_mask_is_no_match() -> None:
    result = agreement(with_ids([[1, 1, 1, 0, 2, 2], [1, 1, 1, 0, 0, 0]], [0, 1], [0.9, 0.5]))
    assert result.matched == pytest.approx(2 / 4)


def test_invented_instances_count_against_it() -> None:
    result = agreement(with_ids([[1, 1, 1, 3, 2, 2], [1, 1, 1, 3, 2, 2]], [0, 1, 1], [0.9, 0.5, 0.2]))
    assert result.matched == pytest.approx(4 / 5)
    assert result.differing_pixels == pytest.approx(2 / 12)


def test_nothing_on_both_sides_agrees_and_nothing_on_one_does_not() -> None:
    nothing = Instances.empty(2, 6)
    both = agreement(nothing, nothing)
    assert (both.differing_pixels, both.matched, both.mask_iou) == (0, 1, 1)
    one = agreement(nothing)
    assert (one.differing_pixels, one.matched) == (1, 0)


def test_images_are_weighed_by_what_they_hold() -> None:
    counter = AgreementCounter()
    counter.add(TWO, TWO)
    counter.add(Instances.empty(2, 6), TWO)
    result = counter.result()
    assert (result.images, result.instances) == (2, 4)
    assert result.differing_pixels == pytest.approx(1 / 2)
    assert result.matched == pytest.approx(4 / 6)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        agreement(Instances.empty(3, 6))
