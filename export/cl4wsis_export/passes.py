"""Passes over the exported graph, in the manner of onnx_ir: each does one thing and says whether it changed anything."""

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from cl4wsis.errors import BundleError

ALLOWED_OPERATORS = frozenset(
    # Networks.
    "Add AveragePool BatchNormalization Clip Concat Conv Div Exp Flatten Gemm GlobalAveragePool HardSigmoid HardSwish "
    "LeakyRelu MatMul Mul PRelu Pow ReduceMean Relu Resize Sigmoid Softmax Softplus Sqrt Sub Tanh "
    # Grouping.
    "ArgMax Cast Equal Floor Gather GatherElements Greater GreaterOrEqual Less LessOrEqual Max MaxPool Min Neg "
    "Pad ReduceMax ReduceMin ReduceSum ScatterElements Slice Split Squeeze TopK Transpose Unsqueeze "
    # Shapes, of which only the batch is not a constant.
    "Constant ConstantOfShape Expand Identity Range Reshape Shape".split()
)
"""Operators that ONNX Runtime, TensorRT and TensorRT-RTX run, without data-dependent shapes, loops or branches."""

_STANDARD_DOMAINS = ("", "ai.onnx")


class TidyPass(ir.passes.InPlacePass):
    """Inline functions, compute constants, and leave out what is repeated or unused."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Tidy the graph."""
        modified = common.InlinePass()(model).modified
        modified |= fold_constants(model, onnx_shape_inference=True).modified
        passes = ir.passes.Sequential(
            common.IdentityEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
            common.NameFixPass(),
        )
        return ir.passes.PassResult(model, modified or passes(model).modified)


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
        if node.op_type == "ScatterElements" and "reduction" in node.attributes:
            if node.attributes["reduction"].as_string() != "none":
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
    borders = {*model.graph.inputs, *model.graph.outputs}
    values = [value for node in model.graph.all_nodes() for value in node.outputs if value not in borders]
    inner = [value.name or "?" for value in values if value.dtype == ir.DataType.UINT8]
    read_inputs = [
        f"{value.name} (read by {node.op_type})"
        for value in borders
        if value.dtype == ir.DataType.UINT8
        for node, _ in value.uses()
        if node.op_type != "Cast"
    ]
    return inner + read_inputs


def _spelling(node: ir.Node) -> str:
    return node.op_type if node.domain in _STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"
