"""Passes and the operator check, on graphs of a few nodes."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cl4wsis.errors import BundleError
from cl4wsis_export.passes import (
    ALLOWED_OPERATORS,
    FreeBatchPass,
    MetadataPass,
    TidyPass,
    check_operators,
    count_operators,
)


def graph(body: str, inputs: str = "float[batch, 4] x", outputs: str = "float[batch, 4] y") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 18]> g ({inputs}) => ({outputs}) {{ {body} }}')


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("n = NonZero(x) y = Relu(x)", "NonZero .* is not an allowed operator"),
        ("y = foo.Bar(x)", "foo::Bar .* is not an allowed operator"),
        ("i = Cast<to=7>(x) y = ScatterElements<axis=1, reduction='add'>(x, i, x)".replace("'", '"'), "reduces"),
        ("u = Cast<to=2>(x) y = Cast<to=1>(u)", "u is uint8 inside the graph"),
    ],
)
def test_what_not_every_runtime_can_do_is_named(body: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_operators(graph(body))


def test_every_offender_is_listed() -> None:
    with pytest.raises(BundleError, match=r"NonZero .*; .*Unique"):
        check_operators(graph("n = NonZero(x) u = Unique(x) y = Relu(x)"))


def test_uint8_may_enter_through_a_cast_and_leave_through_one() -> None:
    check_operators(graph("f = Cast<to=1>(x) y = Cast<to=2>(f)", "uint8[batch, 4] x", "uint8[batch, 4] y"))
    with pytest.raises(BundleError, match=r"x \(read by Transpose\) is uint8"):
        check_operators(graph("t = Transpose(x) y = Cast<to=1>(t)", "uint8[4, 4] x", "float[4, 4] y"))


def test_non_reducing_scatter_is_allowed() -> None:
    check_operators(graph("i = Cast<to=7>(x) y = ScatterElements<axis=1>(x, i, x)"))


@pytest.mark.parametrize("name", ["NonZero", "Unique", "If", "Loop", "Scan", "ScatterND", "SequenceConstruct", "Where"])
def test_data_dependent_operators_are_not_on_the_list(name: str) -> None:
    assert name not in ALLOWED_OPERATORS


def test_tidying_computes_constants_and_removes_what_is_unused() -> None:
    model = graph("a = Constant<value_float=2.0>() b = Mul(a, a) unused = Exp(x) i = Identity(x) y = Mul(i, b)")
    result = TidyPass()(model)
    assert result.modified
    assert count_operators(result.model) == {"Mul": 1}


def constants(node: ir.Node) -> list[list[float]]:
    """Return the constant inputs of a node."""
    values = (value.const_value for value in node.inputs if value is not None)
    return [array.numpy().tolist() for array in values if array is not None]


def free_batch(model: ir.Model) -> ir.Model:
    """Free a batch of 4099."""
    return FreeBatchPass(4099, "batch").call(TidyPass()(model).model).model


def test_weights_that_are_standardised_are_constants_however_large() -> None:
    weights = np.random.default_rng(0).normal(1, 1, (600, 600, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["w", "axes"], ["mean"]),
        helper.make_node("Sub", ["w", "mean"], ["centered"]),
        helper.make_node("Conv", ["x", "centered"], ["y"]),
    ]
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 600, 1, 1]) for name in "xy"]
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([1, 2, 3]), "axes")]
    made = helper.make_graph(nodes, "g", sides[:1], sides[1:], constants)
    model = ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]))
    result = TidyPass()(model).model
    assert count_operators(result) == {"Conv": 1}
    (conv,) = result.graph
    folded = conv.inputs[1]
    assert folded is not None
    assert folded.const_value is not None
    expected = weights - weights.mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(folded.const_value.numpy(), expected, atol=1e-5)
    assert list(result.graph.initializers) == [folded.name]


def test_a_traced_batch_is_freed_alone_and_merged_with_other_sides() -> None:
    body = """
        two = Constant<value_ints=[4099, 2, 2]>() a = Reshape(x, two)
        merged = Constant<value_ints=[8198, 2]>() b = Reshape(a, merged)
        back = Constant<value_ints=[4099, 4]>() y = Reshape(b, back)
    """
    model = free_batch(graph(body, "float[4099, 4] x", "float[4099, 4] y"))
    assert [constants(node) for node in model.graph] == [[[-1, 2, 2]], [[-1, 2]], [[-1, 4]]]
    shapes = [str(value.shape) for value in (*model.graph.inputs, *(node.outputs[0] for node in model.graph))]
    assert shapes == ["[batch,4]", "[batch,2,2]", "[None,2]", "[batch,4]"]


def test_a_side_that_is_left_open_beside_the_batch_is_filled_in() -> None:
    body = """
        open = Constant<value_ints=[4099, 1, -1]>() a = Reshape(x, open)
        same = Constant<value_ints=[-1, 2, 2]>() y = Reshape(a, same)
    """
    model = free_batch(graph(body, "float[4099, 4] x", "float[4099, 2, 2] y"))
    assert [constants(node) for node in model.graph] == [[[-1, 1, 4]], [[-1, 2, 2]]]


def test_an_expansion_leaves_the_batch_as_it_is() -> None:
    body = "n = Constant<value_ints=[4099, 4, 3]>() y = Expand(x, n)"
    model = free_batch(graph(body, "float[4099, 4, 1] x", "float[4099, 4, 3] y"))
    assert constants(model.graph.node(0)) == [[1, 4, 3]]
    assert str(model.graph.outputs[0].shape) == "[batch,4,3]"


def test_a_resize_says_by_how_much_not_how_large() -> None:
    body = """
        n = Constant<value_ints=[4099, 1, 6, 4]>()
        y = Resize<mode="linear">(x, , , n)
    """
    model = free_batch(graph(body, "float[4099, 1, 2, 2] x", "float[4099, 1, 6, 4] y"))
    assert constants(model.graph.node(0)) == [[1, 1, 3, 2]]
    assert str(model.graph.outputs[0].shape) == "[batch,1,6,4]"


def test_a_batch_that_cannot_be_freed_is_named() -> None:
    model = graph("n = Constant<value_ints=[4099, 4]>() y = Expand(x, n)", "float[1, 4] x", "float[4099, 4] y")
    with pytest.raises(BundleError, match=r"depend on the number of images in a batch: Expand \("):
        free_batch(model)


def test_constants_of_every_type_are_no_batch() -> None:
    body = """
        low = Constant<value_float=0.0>() far = Constant<value = float {inf}>() c = Clip(x, low, far)
        yes = Constant<value = bool {1}>() more = Greater(x, low) both = And(more, yes)
        b = Cast<to=1>(both) y = Mul(c, b)
    """
    model = free_batch(graph(body, "float[4099, 4] x", "float[4099, 4] y"))
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert kinds == {ir.DataType.FLOAT, ir.DataType.BOOL}


def test_metadata_replaces_what_the_exporter_noted(tmp_path: Path) -> None:
    model = graph("y = Relu(x)")
    model.metadata_props["trace"] = model.graph.node(0).metadata_props["path"] = "/home/somebody"
    MetadataPass({"cl4wsis.step": "1"})(model)
    ir.save(model, str(tmp_path / "m.onnx"))
    assert b"somebody" not in (tmp_path / "m.onnx").read_bytes()
    assert ir.load(str(tmp_path / "m.onnx")).metadata_props == {"cl4wsis.step": "1"}
