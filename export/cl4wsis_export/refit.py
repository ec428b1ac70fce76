"""Engines that are loaded: reading their layer types back, and putting other weights into them.

Both need the GPU the engine is for. Refitting replaces the weights of an engine by those of another checkpoint of the
same step, without building it again. The next step has more classes and so another graph: it needs its own engine.
"""

from pathlib import Path
from typing import Any

from cl4wsis.bundle import Bundle, VariantInfo
from cl4wsis.errors import BackendError, BundleError
from cl4wsis_export.engines import Library, Log
from cl4wsis_export.inspection import inspector_types


def inspect_engine(library: Library, trt: Any, content: bytes) -> dict[str, int]:
    """Load an engine and count its layers by the type of their first input, as the engine inspector tells it.

    Args:
        library: which of the two.
        trt: its module.
        content: the engine, built with detailed verbosity.

    Raises:
        BackendError: it cannot be loaded here.
    """
    log = Log(trt)
    engine = load_engine(library, trt, content, log)
    context = engine.create_execution_context()
    if context is None:
        raise BackendError(f"{library.title} {trt.__version__} cannot run the engine: {log.last_error}")
    name = engine.get_tensor_name(0)
    context.set_input_shape(name, tuple(engine.get_tensor_profile_shape(name, 0)[1]))  # types show with shapes alone
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return inspector_types(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def refit_engine(library: Library, trt: Any, content: bytes, graph: Path) -> bytes:
    """Put the weights of another graph into an engine.

    TensorRT's release notes report wrong results of refittable engines for some graphs and versions (11.3.0 drops the
    bias of some products): check the outcome with ``cl4wsis verify``.

    Args:
        library: which of the two.
        trt: its module.
        content: an engine that was built as refittable.
        graph: ``.onnx`` file that differs from the engine's own graph in weights alone; see :func:`check_refit`.

    Returns:
        The engine with the new weights.

    Raises:
        BackendError: the engine cannot be loaded here, is not refittable, or does not take the weights.
    """
    log = Log(trt)
    engine = load_engine(library, trt, content, log)
    if not engine.refittable:
        raise BackendError("the engine was built without --refittable; build it again with it")
    refitter = trt.Refitter(engine, log.logger)
    parser = trt.OnnxParserRefitter(refitter, log.logger)
    if not parser.refit_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise BackendError(f"{graph}: its weights do not fit the engine: {errors or log.last_error}; build a new one")
    if not refitter.refit_cuda_engine():
        missing = ", ".join(refitter.get_missing_weights()) or log.last_error
        raise BackendError(f"{graph}: the engine asks for weights that the graph does not name: {missing}")
    return bytes(engine.serialize())


def load_engine(library: Library, trt: Any, content: bytes, log: Log) -> Any:
    """Load an engine that this user has built.

    Raises:
        BackendError: the library cannot load it; the message holds what it said.
    """
    try:
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(content)
    except (TypeError, RuntimeError) as error:  # what the bindings raise when the library gives no runtime
        raise BackendError(f"{library.title} {trt.__version__} cannot start: {error}; check nvidia-smi") from error
    if engine is None:
        raise BackendError(f"{library.title} {trt.__version__} cannot load the engine: {log.last_error}")
    return engine


def check_refit(old: Bundle, new: Bundle, variant: VariantInfo) -> VariantInfo:
    """Check that a graph differs from that of another bundle in weights alone, as far as the manifests tell.

    Args:
        old: bundle whose engine is to be refitted.
        new: bundle whose weights are to be put into it.
        variant: graph of the new bundle.

    Returns:
        The same graph of the old bundle.

    Raises:
        BundleError: step, classes, input size, grouping or operators differ, so the new bundle needs its own engine.
    """
    names = [[info.name for info in bundle.manifest.classes] for bundle in (old, new)]
    pairs = {
        "step": (old.manifest.step, new.manifest.step),
        "classes": (names[0], names[1]),
        "input size": (old.manifest.input.size, new.manifest.input.size),
        "grouping": (old.manifest.grouping, new.manifest.grouping),
        "operators": (old.manifest.graph.operators, new.manifest.graph.operators),
    }
    for name, (before, after) in pairs.items():
        if before != after:
            raise BundleError(
                f"{new.path}: cannot refit an engine of {old.path}: their {name} differ ({_short(before)} and "
                f"{_short(after)}), and refitting replaces weights alone; build an engine without --refit-from"
            )
    return old.variant(variant.precision, variant.post)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
