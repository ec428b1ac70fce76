"""The exported graph as a whole."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from cl4wsis.errors import BundleError
from cl4wsis_export.graph import export_module
from cl4wsis_export.passes import check_operators, count_operators


def test_operators_of_the_fused_graph_are_allowed(bundle_path: Path) -> None:
    model = ir.load(str(bundle_path / "model.onnx"))
    check_operators(model)
    operators = count_operators(model)
    assert {"Conv", "TopK", "ScatterElements", "MaxPool"} <= operators.keys()
    assert "Shape" not in operators  # nothing is computed from the batch size


def test_no_reshape_has_a_fixed_batch(bundle_path: Path) -> None:
    model = ir.load(str(bundle_path / "model.onnx"))
    for node in model.graph:
        if node.op_type == "Reshape":
            shape = node.inputs[1]
            assert shape is not None
            assert shape.const_value is not None
            assert shape.const_value.numpy()[0] == -1, node.name


def test_weights_of_convolutions_are_constants_without_taps_on_padding(bundle_path: Path) -> None:
    convolutions = [node for node in ir.load(str(bundle_path / "model.onnx")).graph if node.op_type == "Conv"]
    weights = [node.inputs[1] for node in convolutions]
    assert all(value is not None and value.const_value is not None for value in weights)
    assert all(max(node.attributes.get_ints("dilations", [1, 1])) < 6 for node in convolutions)  # maps are 4x6


def test_heads_of_all_steps_are_one_convolution(bundle_path: Path) -> None:
    convolutions = [node for node in ir.load(str(bundle_path / "model.onnx")).graph if node.op_type == "Conv"]
    weights = [node.inputs[1] for node in convolutions]
    shapes = [value.const_value.shape for value in weights if value is not None and value.const_value is not None]
    widths = [shape[0] for shape in shapes if shape[1:] == (16, 1, 1)]  # the branches of this network have 16 channels
    assert widths.count(1 + 3 + 2) == widths.count(3 + 2) == 1
    assert not {1 + 3, 3} & set(widths)


def test_uint8_is_made_by_the_last_operation(bundle_path: Path) -> None:
    model = ir.load(str(bundle_path / "model.onnx"))
    ids = model.graph.outputs[0]
    assert ids.name == "instance_ids"
    assert not ids.uses()
    producer = ids.producer()
    assert producer is not None
    assert producer.op_type == "Cast"


def test_a_data_dependent_module_is_refused() -> None:
    class Sparse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nonzero()

    with pytest.raises(BundleError, match="NonZero"):
        export_module(Sparse(), {"x": torch.ones(2, 3)}, ["y"], opset=18)


def test_a_module_that_depends_on_the_batch_is_refused() -> None:
    class Numbering(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[0]).unsqueeze(1)

    class Averaging(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / x.shape[0]

    with pytest.raises(BundleError, match="depend on the number of images in a batch: Add"):
        export_module(Numbering(), {"x": torch.ones(2, 3)}, ["y"], opset=18)
    with pytest.raises(BundleError, match="depend on the number of images in a batch: Div"):
        export_module(Averaging(), {"x": torch.ones(2, 3)}, ["y"], opset=18)


def test_a_module_that_refuses_its_input_without_a_word_is_found() -> None:
    class Refusing(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            if values.shape[1] != 4:
                raise AssertionError  # as encoders do that want sides of their own
            return values

    with pytest.raises(BundleError, match=r"cannot be exported: AssertionError in test_graph\.py, line \d+: raise"):
        export_module(Refusing(), {"values": torch.zeros(1, 3)}, ["result"], 18)


def test_a_module_that_cannot_be_traced_is_explained() -> None:
    class Branching(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(BundleError, match="the network cannot be exported"):
        export_module(Branching(), {"x": torch.ones(2, 3)}, ["y"], opset=18)
