"""From a torch module to an ONNX graph with a free batch size and stable names."""

import functools
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from cl4wsis.errors import BundleError
from cl4wsis.grouping import GroupingSpec
from cl4wsis_export.borders import join
from cl4wsis_export.fused import INPUT_NAME, MAP_NAMES, FusedOutput, FusedSegmenter, MapGrouping, TracedNetwork
from cl4wsis_export.passes import BatchDependenceError, FoldPass, FreeBatchPass, TidyPass, check_operators

BATCH = "batch"
_TRACED_BATCHES = (4099, 4111)
"""Primes of which no other side should be a multiple; tracing with a free batch would take twice as long. The second
is for graphs in which a multiple of the first occurs by chance."""


def build_graph(segmenter: FusedSegmenter, opset: int) -> ir.Model:
    """Export the fused module.

    Args:
        segmenter: in evaluation mode.
        opset: ONNX operator set.

    Returns:
        The checked and tidied graph, still without metadata: ``images`` (batch, H, W, 3) uint8 in, the fields of
        :class:`FusedOutput` out. The borders of the network have names within it, at which it can be cut
        (:mod:`cl4wsis_export.borders`).

    Raises:
        BundleError: the network cannot be exported, or needs an operator that not every runtime has.
    """
    network = trace_network(segmenter, opset)
    network.graph.outputs[:] = network.graph.outputs[: len(MAP_NAMES)]
    shapes = tuple(tuple(int(str(side)) for side in (value.shape or ())[1:]) for value in network.graph.outputs)
    tail = _build_tail(segmenter.spec, segmenter.input_size, segmenter.rounds, shapes, opset)
    return join(network, tail)


def trace_network(segmenter: FusedSegmenter, opset: int) -> ir.Model:
    """Export the network of the fused module, from images to raw maps and the names at which it can be cut."""
    height, width = segmenter.input_size
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    return export_module(TracedNetwork(segmenter).eval(), {INPUT_NAME: example}, TracedNetwork.OUTPUT_NAMES, opset)


@functools.lru_cache(maxsize=4)
def _build_tail(
    spec: GroupingSpec, input_size: tuple[int, int], rounds: int, map_shapes: tuple[tuple[int, ...], ...], opset: int
) -> ir.Model:
    """Export the grouping of maps of these shapes (without the batch); not to be changed, as it is kept."""
    examples = {name: torch.zeros(1, *shape) for name, shape in zip(MAP_NAMES, map_shapes, strict=True)}
    tail = export_module(MapGrouping(spec, input_size, rounds).eval(), examples, FusedOutput._fields, opset)
    _pin_output_shapes(tail, input_size, spec.max_instances)
    return tail


def export_module(
    module: nn.Module, examples: Mapping[str, Tensor], output_names: Sequence[str], opset: int
) -> ir.Model:
    """Export a module whose inputs share a free first dimension, tidy the graph and check its operators.

    Args:
        module: in evaluation mode; it takes as many tensors as there are examples, in order.
        examples: input names, and tensors that tell type and shape for one row of a batch; their values are not read.
        output_names: in order.
        opset: ONNX operator set.

    Raises:
        BundleError: the module cannot be exported, or needs an operator that not every runtime has.
    """
    *others, last = _TRACED_BATCHES
    for batch in others:
        try:
            return _export_with(module, examples, output_names, opset, batch)
        except BatchDependenceError:
            continue
    return _export_with(module, examples, output_names, opset, last)


def _export_with(
    module: nn.Module, examples: Mapping[str, Tensor], output_names: Sequence[str], opset: int, batch: int
) -> ir.Model:
    inputs = tuple(example[:1].expand(batch, *example.shape[1:]) for example in examples.values())
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                input_names=list(examples),
                output_names=list(output_names),
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            passes = ir.passes.Sequential(TidyPass(), FreeBatchPass(batch, BATCH), FoldPass(), TidyPass())
            model: ir.Model = passes(program.model).model
    except Exception as error:  # the exporter raises errors of many kinds
        cause = _first_cause(error)
        kind = BatchDependenceError if isinstance(cause, BatchDependenceError) else BundleError
        raise kind(f"the network cannot be exported: {_first_line(cause)}") from error
    check_operators(model)
    written = model.opset_imports.get("")
    if written != opset:
        raise BundleError(f"PyTorch {torch.__version__} wrote operator set {written} instead of {opset}; give another")
    return model


def serialize(model: ir.Model) -> bytes:
    """Return the bytes of an ``.onnx`` file."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _pin_output_shapes(model: ir.Model, size: tuple[int, int], slots: int) -> None:
    """State what the exporter may have left open: everything but the batch is fixed."""
    shapes = {"instance_ids": size, "boxes": (slots, 4)}
    for value in model.graph.outputs:
        value.shape = ir.Shape([BATCH, *shapes.get(value.name or "", (slots,))])


def _first_cause(error: BaseException) -> BaseException:
    """Return what went wrong first: the exporter wraps it into advice on how to report errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    """Return what an error says first; of one that says nothing, as assertions do, where the network raised it."""
    lines = str(error).strip().splitlines()
    if lines:
        return lines[0]
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if "torch" not in Path(frame.filename).parts or frame is frames[0]][-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}: {frame.line}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself from the user's screen; its errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
