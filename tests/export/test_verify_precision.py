"""A graph of lower precision against the float32 graph, on graphs that find red and blue pixels."""

import numpy as np
import onnx
import pytest
from bundles import SIZE, color_model
from onnx import helper

from cl4wsis.checks import Limits
from cl4wsis.errors import BundleError
from cl4wsis_export.verify import allow_golden, open_session, run_frames, verify_precision


def frames() -> np.ndarray:
    """Return images of a red stripe that moves from one to the next."""
    images = np.zeros((5, *SIZE, 3), np.uint8)
    for index, image in enumerate(images):
        image[:, 10 * index : 10 * index + 10, 0] = 255
    return images


def mixing_model() -> onnx.ModelProto:
    """Return the graph with the images of a batch answered in reverse order."""
    model = color_model()
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "images":
                node.input[index] = "reversed"
    backwards = {"last": -1, "before_first": -(2**31), "batch_axis": 0, "back": -1}
    for name, number in backwards.items():
        model.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [1], [number]))
    model.graph.node.insert(0, helper.make_node("Slice", ["images", *backwards], ["reversed"]))
    return model


def test_images_that_answer_for_one_another_in_a_batch_are_found() -> None:
    images = frames()
    truth = run_frames(open_session(color_model().SerializeToString()), images)
    agreement, outputs = verify_precision(color_model().SerializeToString(), images, truth, "int8", Limits())
    assert agreement.differing_pixels == 0
    assert len(outputs) == len(images)
    with pytest.raises(BundleError, match=r"int8 graph answers differently in a batch: 88\.37% of the foreground"):
        verify_precision(mixing_model().SerializeToString(), images, truth, "int8", Limits())


def test_golden_images_may_differ_as_much_as_they_do_where_all_images_agree_well_enough() -> None:
    images = frames()
    truth = run_frames(open_session(color_model().SerializeToString()), images)
    limits = Limits(golden_pixels=0.25, matched=0.8)
    assert allow_golden(limits, truth[:2], truth[:2]) == limits
    half_lost = [truth[0], {name: np.zeros_like(array) for name, array in truth[1].items()}]
    assert allow_golden(limits, half_lost, truth[:2]) == limits.model_copy(update={"golden_pixels": 0.75})
    assert allow_golden(Limits(), half_lost, truth[:2]) == Limits()
