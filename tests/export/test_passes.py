"""Passes and the operator check, on graphs of a few nodes."""

from pathlib import Path

import onnx_ir as ir
import pytest

from cl4wsis.errors import BundleError
from cl4wsis_export.passes import (
    ALLOWED_OPERATORS,
    ConstantShapePass,
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


def test_shapes_that_depend_on_the_batch_alone_become_constant() -> None:
    body = """
        s = Shape<start=0, end=1>(x) n = Constant<value_ints=[2, 2]>() t = Concat<axis=0>(s, n)
        y = Reshape(x, t)
    """
    model = graph(body, outputs="float[batch, 2, 2] y")
    result = ConstantShapePass()(model)
    assert result.modified
    assert count_operators(result.model) == {"Reshape": 1}
    shape = result.model.graph.node(0).inputs[1]
    assert shape is not None
    assert shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [-1, 2, 2]
    assert not ConstantShapePass()(result.model).modified


def test_metadata_replaces_what_the_exporter_noted(tmp_path: Path) -> None:
    model = graph("y = Relu(x)")
    model.metadata_props["trace"] = model.graph.node(0).metadata_props["path"] = "/home/somebody"
    MetadataPass({"cl4wsis.step": "1"})(model)
    ir.save(model, str(tmp_path / "m.onnx"))
    assert b"somebody" not in (tmp_path / "m.onnx").read_bytes()
    assert ir.load(str(tmp_path / "m.onnx")).metadata_props == {"cl4wsis.step": "1"}
