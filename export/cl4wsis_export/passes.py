"""Passes over the exported graph in the manner of onnx_ir: each does one thing and says whether it changed anything."""

import math
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from cl4wsis.errors import BundleError

_OPERATORS = """
Add AveragePool BatchNormalization Clip Concat Conv Div Erf Exp Flatten Gemm GlobalAveragePool HardSigmoid HardSwish
InstanceNormalization LayerNormalization LeakyRelu Log MatMul Mul PRelu Pow ReduceL2 ReduceMean Relu Resize Sigmoid
Softmax Softplus Sqrt Sub Tanh

ArgMax Cast Equal Floor Gather GatherElements Greater GreaterOrEqual Less LessOrEqual Max MaxPool Min Neg Pad Reciprocal
ReduceMax ReduceMin ReduceSum ScatterElements Slice Split Squeeze TopK Transpose Unsqueeze

Constant Expand Identity Reshape Shape
"""
# Networks; grouping; shapes, of which only the batch is not a constant.
ALLOWED_OPERATORS = frozenset(_OPERATORS.split())
"""Operators that ONNX Runtime, TensorRT and TensorRT-RTX run, without data-dependent shapes, loops or branches."""

_MOST_NEW_NUMBERS = 1 << 18
"""As many numbers an operator may make of fewer while the graph is written; a runtime makes more of them."""
_STANDARD_DOMAINS = ("", "ai.onnx")
_SHAPE_INPUTS = {("Reshape", 1), ("Expand", 1), ("Resize", 3)}
"""Operators and the inputs that tell them a shape."""


class TidyPass(ir.passes.InPlacePass):
    """Inline functions, compute constants, and leave out what is repeated or unused."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Tidy the graph."""
        modified = common.InlinePass()(model).modified
        folded = fold_constants(
            model, onnx_shape_inference=True, output_size_limit=sys.maxsize, should_fold=_is_worth_folding
        )
        modified |= folded.modified
        passes = ir.passes.Sequential(
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common.RemoveUnusedOpsetsPass(),
            common.NameFixPass(),
        )
        modified |= passes(model).modified
        return ir.passes.PassResult(model, modified)


def _is_worth_folding(node: ir.Node) -> bool | None:
    """Compute of constants what has no more numbers than they have, such as standardised weights, whatever their size.

    Of what has more, such as expansions, only the small is computed, as of casts, whose source is read elsewhere too.
    """
    if node.op_type in ("Slice", "Concat"):
        return True
    if node.op_type == "Cast":
        return None
    before, after = (sum(map(_count_numbers, values)) for values in (node.inputs, node.outputs))
    if _MOST_NEW_NUMBERS < after < math.inf:
        return after <= before
    return True if after <= before else None


def _count_numbers(value: ir.Value | None) -> float:
    if value is None:
        return 0
    if value.shape is None or not all(isinstance(side, int) for side in value.shape):
        return math.inf
    return math.prod(side for side in value.shape if isinstance(side, int))


class BatchDependenceError(BundleError):
    """Parts of a graph depend on the number of images it was traced with."""


class FreeBatchPass(ir.passes.InPlacePass):
    """Free the batch of a graph that was traced with a fixed one, as if the exporter had left it open.

    The size must be a prime so large that no other side is a multiple of it: wherever it occurs, it is the batch. A
    reshape that names it gets -1 in its place, an expansion 1, and a resize factors in place of sizes, so that no shape
    is computed while the graph runs.

    Args:
        size: of the batch the graph was traced with.
        name: of the free dimension.
    """

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        self._size = size
        self._name = name

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Free the batch.

        Raises:
            BatchDependenceError: a constant depends on it in another way; every one is named.
        """
        for node in model.graph.all_nodes():
            if node.op_type == "Reshape":
                self._free_reshape(model, node)
            elif node.op_type == "Resize":
                _scale_by_factors(model, node)
            elif node.op_type == "Expand":
                self._free_expansion(model, node)
        common.RemoveUnusedNodesPass()(model)  # with the constants that were replaced
        self._refuse_fixed(model)
        for value in (*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)):
            self._free_shape(value)
        return ir.passes.PassResult(model, modified=True)

    def _free_reshape(self, model: ir.Model, node: ir.Node) -> None:
        sides = _constant(node.inputs[1])
        if sides is None:
            return
        if node.outputs[0].shape is not None:  # what -1 stands for was known when the graph was traced
            known = [side if isinstance(side, int) else -1 for side in node.outputs[0].shape]
            sides = np.where(sides == -1, known, sides)
        if -1 in sides or np.count_nonzero(self._depends(sides)) != 1:
            return  # of something without a batch, or refused below
        free = np.where(self._depends(sides), -1, sides)
        node.replace_input_with(1, add_constant(model, free, f"{node.name}_shape"))

    def _free_expansion(self, model: ir.Model, node: ir.Node) -> None:
        """Ask for 1 image where the source has the whole batch already, which leaves it as it is."""
        sides, source = _constant(node.inputs[1]), node.inputs[0].shape if node.inputs[0] is not None else None
        if sides is None or source is None or len(source) != len(sides):
            return
        kept = np.array([side == wanted for side, wanted in zip(source, sides.tolist(), strict=True)], bool)
        if np.any(kept & self._depends(sides)):
            free = np.where(kept & self._depends(sides), 1, sides)
            node.replace_input_with(1, add_constant(model, free, f"{node.name}_shape"))

    def _free_shape(self, value: ir.Value) -> None:
        if value.shape is not None:
            sides = (self._free_side(side) for side in value.shape)
            value.shape = ir.Shape(list(sides))

    def _free_side(self, side: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim | None:
        if not isinstance(side, int) or side % self._size or side == 0:
            return side
        return self._name if side == self._size else None

    def _refuse_fixed(self, model: ir.Model) -> None:
        fixed = []
        for node in model.graph.all_nodes():
            for index, value in enumerate(node.inputs):
                array = _constant(value)
                if array is None:
                    continue
                tells_sides = array.size == 1 or (node.op_type, index) in _SHAPE_INPUTS
                if np.any(self._depends(np.array(array.shape))) or (tells_sides and np.any(self._depends(array))):
                    fixed.append(f"{node.op_type} ({node.name})")
        if fixed:
            raise BatchDependenceError(
                f"parts of the network depend on the number of images in a batch: {', '.join(fixed[:10])}. "
                "Choose an encoder without them (recipe.network.encoder)"
            )

    def _depends(self, sides: NDArray[Any]) -> NDArray[np.bool_]:
        numbers = np.asarray(sides, np.float64)  # of any type, bool and infinity among them
        with np.errstate(invalid="ignore"):
            depends: NDArray[np.bool_] = (numbers != 0) & (numbers % self._size == 0)
        return depends


class FoldPass(ir.passes.InPlacePass):
    """Fold batch normalisations and zero padding into the convolutions beside them, as every runtime would."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold them, and leave out what is unused then."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "BatchNormalization":
                modified |= _fold_normalization(model, node)
            elif node.op_type == "Conv":
                modified |= _fold_padding(node)
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _fold_normalization(model: ir.Model, node: ir.Node) -> bool:
    conv = node.inputs[0].producer() if node.inputs[0] is not None else None
    if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output():
        return False
    constants = [_constant(value) for value in (*conv.inputs[1:], *node.inputs[1:])]
    if any(constant is None for constant in constants):
        return False
    weight, *bias, gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in constants)
    factor = gamma / np.sqrt(variance + node.attributes["epsilon"].as_float())
    weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    shift = beta + ((bias[0] if bias else 0) - mean) * factor
    conv.resize_inputs(3)
    for index, (array, name) in enumerate(((weight, "weight"), (shift, "bias")), start=1):
        conv.replace_input_with(index, add_constant(model, array.astype(np.float32), f"{conv.name}_{name}"))
    _take_over(node.outputs[0], conv.outputs[0])
    model.graph.remove(node, safe=True)
    return True


def _fold_padding(conv: ir.Node) -> bool:
    pad = conv.inputs[0].producer() if conv.inputs[0] is not None else None
    if pad is None or pad.op_type != "Pad" or len(pad.inputs) > 3 or pad.inputs[0] is None:
        return False
    modes = pad.attributes.get_string("mode", "constant"), conv.attributes.get_string("auto_pad", "NOTSET")
    amounts = _constant(pad.inputs[1])
    fill = _constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(())
    if modes != ("constant", "NOTSET") or amounts is None or fill is None or np.any(fill) or np.any(amounts < 0):
        return False
    begins, ends = np.split(amounts, 2)
    if np.any(begins[:2]) or np.any(ends[:2]):  # of batch and channels
        return False
    amounts = np.concatenate([begins[2:], ends[2:]])
    own = conv.attributes.get_ints("pads", [0] * len(amounts))
    conv.attributes["pads"] = ir.AttrInt64s("pads", (amounts + np.array(own)).tolist())
    conv.replace_input_with(0, pad.inputs[0])
    return True


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let one value stand for another, under the name of that one."""
    name = old.name
    ir.convenience.replace_all_uses_with(old, new)
    old.name, new.name = f"{name}_unused", name


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _scale_by_factors(model: ir.Model, node: ir.Node) -> None:
    """Let a resize of (B, C, h, w) maps say by how much it enlarges them, and not how large they become."""
    source = node.inputs[0].shape if node.inputs[0] is not None else None
    result = node.outputs[0].shape
    if source is None or result is None or len(node.inputs) < 4 or node.inputs[3] is None:
        return
    sides = [*source[2:], *result[2:]]
    if len(sides) != 4 or not all(isinstance(side, int) for side in sides):
        return
    factors = np.array([1, 1, sides[2] / sides[0], sides[3] / sides[1]], np.float32)
    node.replace_input_with(2, add_constant(model, factors, f"{node.name}_factors"))
    node.replace_input_with(3, None)


def add_constant(model: ir.Model, array: NDArray[Any], name: str) -> ir.Value:
    """Add a constant to a graph, as an initialiser."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    return value


class MetadataPass(ir.passes.InPlacePass):
    """Replace what the exporter noted (stack traces, paths of the machine) by the texts given.

    Args:
        metadata: keys and texts for the whole graph.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        super().__init__()
        self._metadata = dict(metadata)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the metadata."""
        common.ClearMetadataAndDocStringPass()(model)
        model.metadata_props.clear()
        model.metadata_props.update(self._metadata)
        model.graph.name = "cl4wsis"
        model.producer_name, model.producer_version = "cl4wsis", None
        return ir.passes.PassResult(model, modified=True)


def count_operators(model: ir.Model) -> dict[str, int]:
    """Return the number of nodes of each operator, in alphabetical order."""
    return dict(sorted(Counter(_spelling(node) for node in model.graph.all_nodes()).items()))


def check_operators(model: ir.Model) -> None:
    """Check that the graph keeps to what every runtime can do.

    Raises:
        BundleError: a node has an operator that is not allowed, a scatter reduces, a subgraph or function is left, or
            uint8 is used inside the graph; every offender is named.
    """
    problems = []
    for node in model.graph.all_nodes():
        name = f"{_spelling(node)} ({node.name})"
        if node.domain not in _STANDARD_DOMAINS or node.op_type not in ALLOWED_OPERATORS:
            problems.append(f"{name} is not an allowed operator")
        reduction = node.attributes.get("reduction")
        if reduction is not None and reduction.as_string() != "none":
            problems.append(f"{name} reduces")
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            problems.append(f"{name} holds a subgraph")
    problems += [f"{name} is uint8 inside the graph" for name in _inner_uint8_values(model)]
    problems += [f"function {function} is left" for function in model.functions]
    if problems:
        rest = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise BundleError(
            f"the exported graph has parts that not every runtime can run: {'; '.join(problems[:10])}{rest}. "
            "Choose an encoder without them (recipe.network.encoder)"
        )


def _inner_uint8_values(model: ir.Model) -> list[str]:
    """Name the uint8 values within the graph, and its uint8 inputs that are not cast at once."""
    borders = {*model.graph.inputs, *model.graph.outputs}
    inner = [
        value.name or "?"
        for node in model.graph.all_nodes()
        for value in node.outputs
        if value not in borders and (value.dtype == ir.DataType.UINT8 or _casts_to_uint8(node))
    ]
    read = [
        f"{value.name} (read by {node.op_type})"
        for value in borders
        if value.dtype == ir.DataType.UINT8
        for node, _ in value.uses()
        if node.op_type != "Cast"
    ]
    return inner + read


def _casts_to_uint8(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.UINT8


def _spelling(node: ir.Node) -> str:
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"
