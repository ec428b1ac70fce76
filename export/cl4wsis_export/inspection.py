"""In which arithmetic an engine computes: read back after the build, and compared with what its graph states.

An engine is looked at in three ways, of which each machine can do some:

- the **network definition** that the parser made of the graph. A strongly typed build may not depart from it: a layer
  whose data is half precision there is half precision in the engine. This always works.
- the **program text** within a TensorRT-RTX engine, which names each convolution with its operands and their types. It
  is the engine itself, and can be read without a GPU, but its form is not documented: where it is not found, nothing is
  concluded.
- the **engine inspector**, which needs the engine loaded, and so its GPU. It tells the types of the tensors between
  layers after fusion.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cl4wsis.errors import BackendError

_PROGRAM_TENSOR = re.compile(rb'tensor=\{ [^\n]*?name="([^"\n]+)"[^\n]*? type=([a-z0-9]+) \}')
_PROGRAM_CONVOLUTION = re.compile(rb'corrltn=\{ name="[^"\n]+" output=\{[^}\n]*\} input=\{"([^"\n]+)" "([^"\n]+)"')
_PROGRAM_TYPES = {"float": "float32", "half": "float16", "int8": "int8"}
_INSPECTOR_TYPES = {"int8": "int8", "half": "float16", "fp16": "float16", "float": "float32", "fp32": "float32"}
_INSPECTOR_KEYS = ("Format/Datatype", "DataType", "Datatype", "Format")
"""Where the inspector tells a type: the first up to TensorRT 10, the others from 11 on."""
_NETWORK_TYPES = {"FLOAT": "float32", "HALF": "float16"}


def network_types(network: Any) -> dict[str, int]:
    """Count the layers with weights of a network definition by the type of their data.

    A layer is a convolution, or a product with a constant; it is int8 when data and weights are dequantised right
    before it, which is how an explicitly quantised layer looks before it is fused.

    Args:
        network: ``INetworkDefinition``, strongly typed.

    Returns:
        Number of layers by ``float32``, ``float16`` or ``int8`` (or another type as TensorRT names it).
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = {
        layer.get_output(index).name: layer.type.name for layer in layers for index in range(layer.num_outputs)
    }  # kind of layer that makes a tensor
    counts: Counter[str] = Counter()
    for layer in layers:
        inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
        makers = [kinds.get(tensor.name, "") if tensor is not None else "" for tensor in inputs]
        kind = layer.type.name
        is_product = kind == "MATRIX_MULTIPLY" and makers[1] in ("CONSTANT", "DEQUANTIZE")
        if kind in ("CONVOLUTION", "DECONVOLUTION") or is_product:
            dtype = inputs[0].dtype.name
            quantised = len(makers) > 1 and makers[0] == makers[1] == "DEQUANTIZE"
            counts["int8" if quantised else _NETWORK_TYPES.get(dtype, dtype.lower())] += 1
    return dict(sorted(counts.items()))


def program_types(engine: bytes) -> dict[str, int]:
    """Count the convolutions of a TensorRT-RTX engine by the type of both their operands, without loading it.

    Args:
        engine: the serialised engine.

    Returns:
        Number of convolutions by type; empty if the engine holds no program text of the known form. Convolutions that
        the builder has merged count once, those it made of other layers count too.
    """
    tensors = {name: dtype.decode() for name, dtype in _PROGRAM_TENSOR.findall(engine)}
    counts: Counter[str] = Counter()
    for data, weights in _PROGRAM_CONVOLUTION.findall(engine):
        types = {tensors.get(data, "unknown"), tensors.get(weights, "unknown")}
        counts[_PROGRAM_TYPES.get(types.pop(), "unknown") if len(types) == 1 else "mixed"] += 1
    return dict(sorted(counts.items()))


def inspector_types(text: str) -> dict[str, int]:
    """Count the layers of a loaded engine by the type of their first input, as the engine inspector tells it.

    Args:
        text: JSON of ``EngineInspector.get_engine_information`` for an engine built with detailed verbosity.

    Returns:
        Number of layers by type; empty if the inspector tells no types.
    """
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return {}
    counts = Counter(
        dtype
        for layer in layers
        if isinstance(layer, dict) and (dtype := _first_type(layer.get("Inputs", []))) is not None
    )
    return dict(sorted(counts.items()))


def check_types(found: Mapping[str, int], stated: Mapping[str, int], where: str) -> None:
    """Compare the layer types of a network definition with those that the graph states.

    Args:
        found: by :func:`network_types`.
        stated: by the manifest; nothing is checked if it states nothing.
        where: what was built, for the message.

    Raises:
        BackendError: they differ, so the engine would not compute as was asked.
    """
    if stated and dict(found) != dict(stated):
        raise BackendError(
            f"{where}: the graph states {_text(stated)} layers, but TensorRT read {_text(found)} from it; "
            "the precision that was asked for would not be honoured. Export the step again with this version"
        )


def check_built_types(built: Mapping[str, int], stated: Mapping[str, int], where: str) -> None:
    """Check that an engine computes in every low precision that its graph asks for, and in no other.

    Args:
        built: by :func:`program_types` or :func:`inspector_types`; nothing is checked if it is empty.
        stated: layers of the graph.
        where: what was built, for the message.

    Raises:
        BackendError: a low precision was not honoured, or appears without having been asked for.
    """
    if not built or not stated:
        return
    for precision in ("float16", "int8"):
        if bool(stated.get(precision)) != bool(built.get(precision)):
            verb = "has no" if stated.get(precision) else "has unasked"
            raise BackendError(
                f"{where}: the graph states {_text(stated)} layers, but the engine {verb} {precision} layer "
                f"({_text(built)}); the precision that was asked for was not honoured, and the engine is not kept"
            )


def _first_type(inputs: Iterable[Any]) -> str | None:
    for entry in inputs:
        for text in _texts(entry):
            for word in re.findall(r"[a-z0-9]+", text.lower()):
                if word in _INSPECTOR_TYPES:
                    return _INSPECTOR_TYPES[word]
    return None


def _texts(entry: Any) -> Iterator[str]:
    if isinstance(entry, dict):
        yield from (entry[key] for key in _INSPECTOR_KEYS if isinstance(entry.get(key), str))


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "no"
