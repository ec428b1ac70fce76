"""A model repository for the Triton Inference Server: one model, one folder per step, no ensemble and no Python.

    <repository>/<name>/config.pbtxt
    <repository>/<name>/labels.txt
    <repository>/<name>/<step + 1>/model.onnx   (or model.plan)
    <repository>/<name>/warmup/...              golden inputs, raw

Triton's versions are positive numbers, so a step is served as version step + 1; the server keeps the newest two.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cl4wsis.bundle import LABELS_FILE, Bundle, TensorInfo, VariantInfo
from cl4wsis.engines import FoundEngine
from cl4wsis.errors import BundleError
from cl4wsis.folders import replaced_folder
from cl4wsis.images import read_image, write_bytes_atomically

CONFIG_FILE = "config.pbtxt"
WARMUP_FOLDER = "warmup"
MAX_BATCH = 8
_TYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}
_MAX_QUEUE_DELAY_US = 2000
_VERSIONS_KEPT = 2
_CLASS_NAMES, _PLAN = "class_names", "plan"


def write_repository(
    bundle: Bundle,
    variant: VariantInfo,
    repository: Path,
    engine: FoundEngine | None = None,
    max_batch: int = MAX_BATCH,
) -> Path:
    """Add a graph or an engine to a model repository.

    Versions of other steps of the same model stay. What all versions share, class names, configuration and warm-up, is
    that of the highest one, whose classes are those of the others and more. A server that watches the folder sees the
    new version complete, and the new configuration or the old one, never half of a file.

    Args:
        bundle: an opened bundle.
        variant: graph to serve.
        repository: folder of the repository; made if it is not there.
        engine: TensorRT engine of that graph to serve instead; it must be one that runs on the server.
        max_batch: largest batch the server puts together; that of the engine if one is given.

    Returns:
        Folder of the model.

    Raises:
        BundleError: the folder cannot be written, or holds another model of this name or one of larger batches.
        DataError: a file in it cannot be written.
        BackendError: the engine is damaged.
    """
    manifest = bundle.manifest
    name = model_name(manifest.plan)
    _check_engine(engine)
    folder = repository / name
    version = folder / str(manifest.step + 1)
    others = [int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.name != version.name]
    is_highest = all(number < int(version.name) for number in others)
    batch = max_batch if engine is None else engine.info.max_batch
    stated = _stated_batch(folder) if others else None
    if stated is not None and is_highest:
        batch = min(batch, stated)  # the engine of a lower version may take no more
    files = _model_files(bundle, variant, engine)
    warmup = _warmup_files(bundle)
    outputs = manifest.outputs if variant.post == "graph" else manifest.maps
    config = render_config(
        name,
        "onnxruntime_onnx" if engine is None else "tensorrt_plan",
        batch,
        manifest.inputs,
        outputs,
        [info.name for info in manifest.classes],
        [f"{manifest.step}-{path.removesuffix('.raw')}" for path in warmup],
        manifest.plan,
    )
    _check_inputs_agree(folder, config)
    if others:
        _check_same_model(folder, config, is_highest)
    if stated is not None and stated > batch:
        raise BundleError(
            f"{folder}: holds a later step with batches of up to {stated}, and this engine takes {batch}; build it "
            f"with --max-batch {stated}, or choose another folder with --out"
        )
    try:
        (folder / WARMUP_FOLDER).mkdir(parents=True, exist_ok=True)
        if is_highest:
            for file, content in warmup.items():
                write_bytes_atomically(folder / WARMUP_FOLDER / f"{manifest.step}-{file}", content)
            write_bytes_atomically(folder / LABELS_FILE, manifest.label_lines.encode())
        _write_version(version, files)
        if is_highest:
            write_bytes_atomically(folder / CONFIG_FILE, config.encode())
    except OSError as error:
        raise BundleError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def model_name(plan: str) -> str:
    """Return the name under which a server offers the model: that of the plan, as steps are versions of one model."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in plan)


def render_config(
    name: str,
    platform: str,
    max_batch: int,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    class_names: Sequence[str],
    warmup: Sequence[str],
    plan: str,
) -> str:
    """Write the configuration of a model as Triton reads it, the text form of its ``ModelConfig`` message.

    Args:
        name: of the model, which is that of its folder.
        platform: ``onnxruntime_onnx`` or ``tensorrt_plan``.
        max_batch: largest batch.
        inputs: of the graph; the first axis is the batch and is left out, as Triton wants it.
        outputs: likewise.
        class_names: in label order; clients find them as the parameter ``class_names``, a JSON list.
        warmup: names of files in ``warmup/``, one image each, run at every batch size before the model is ready.
        plan: whose steps the versions are; clients find it as the parameter ``plan``.
    """
    preferred = [size for size in (2, 4, 8, 16, 32) if size <= max_batch]
    lines = [f"name: {_quote(name)}", f"platform: {_quote(platform)}", f"max_batch_size: {max_batch}"]
    lines += [line for tensor in inputs for line in _tensor("input", tensor)]
    lines += [line for tensor in outputs for line in _tensor("output", tensor)]
    lines += [
        f"version_policy {{ latest {{ num_versions: {_VERSIONS_KEPT} }} }}",
        "dynamic_batching {",
        *([f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]"] if preferred else []),
        f"  max_queue_delay_microseconds: {_MAX_QUEUE_DELAY_US}",
        "}",
        *_parameter(_CLASS_NAMES, json.dumps(list(class_names), ensure_ascii=False)),
        *_parameter(_PLAN, plan),
    ]
    for file in warmup:
        for batch in sorted({1, *preferred, max_batch}):
            lines += _warmup(file, batch, inputs[0])
    return "\n".join(lines) + "\n"


def _parameter(key: str, text: str) -> list[str]:
    return ["parameters {", f"  key: {_quote(key)}", f"  value {{ string_value: {_quote(text)} }}", "}"]


def _read_parameter(config: str, key: str) -> str | None:
    """Return a parameter of a configuration as :func:`render_config` writes it."""
    text = r'"(?:[^"\\]|\\.)*"'
    found = re.search(rf"key: {re.escape(_quote(key))}\s*value {{ string_value: ({text}) }}", config)
    return None if found is None else str(json.loads(found[1]))


def _tensor(kind: str, tensor: TensorInfo) -> list[str]:
    return [
        f"{kind} {{",
        f"  name: {_quote(tensor.name)}",
        f"  data_type: {_TYPES[tensor.dtype]}",
        f"  dims: [ {_dims(tensor)} ]",
        "}",
    ]


def _warmup(file: str, batch: int, image: TensorInfo) -> list[str]:
    return [
        "model_warmup {",
        f"  name: {_quote(f'{file}, batch {batch}')}",
        f"  batch_size: {batch}",
        "  inputs {",
        f"    key: {_quote(image.name)}",
        "    value {",
        f"      data_type: {_TYPES[image.dtype]}",
        f"      dims: [ {_dims(image)} ]",
        f"      input_data_file: {_quote(f'{file}.raw')}",
        "    }",
        "  }",
        "}",
    ]


def _dims(tensor: TensorInfo) -> str:
    return ", ".join(str(side) if isinstance(side, int) else "-1" for side in tensor.shape[1:])


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _model_files(bundle: Bundle, variant: VariantInfo, engine: FoundEngine | None) -> dict[str, bytes]:
    """Return the files of a version; a graph keeps the name of its weights file, by which it refers to it."""
    if engine is not None:
        return {"model.plan": engine.read()}
    path = bundle.path_of(variant)
    if variant.weights_file is None:
        return {"model.onnx": path.read_bytes()}
    if variant.weights_file == "model.onnx":
        raise BundleError(
            f"{path}: keeps its weights in a file of the name that Triton gives the graph; serve the graph with "
            "post=graph"
        )
    return {"model.onnx": path.read_bytes(), variant.weights_file: (path.parent / variant.weights_file).read_bytes()}


def _check_engine(engine: FoundEngine | None) -> None:
    if engine is not None and not engine.info.runtime.startswith("tensorrt "):
        raise BundleError(
            f"{engine.path}: is an engine of {engine.info.runtime}, and Triton runs those of TensorRT alone; serve the "
            "graph, or build one with --format trt"
        )


def _warmup_files(bundle: Bundle) -> dict[str, bytes]:
    """Return the golden inputs as raw bytes (H, W, 3) uint8."""
    if not bundle.path.is_dir():
        return {}
    images = [bundle.path / case.image for case in bundle.manifest.golden]
    return {f"{image.stem}.raw": read_image(image).tobytes() for image in images}


def check_destination(folder: Path) -> None:
    """Check that a version of a model may be written here: the place is free, or holds versions of one.

    Raises:
        BundleError: something else is there.
    """
    if not (folder / CONFIG_FILE).exists() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder}: exists and is no Triton model; choose another folder with --out")


def _check_inputs_agree(folder: Path, config: str) -> None:
    """Check that the versions of a model, which share one configuration, take and give the same tensors."""
    check_destination(folder)
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    before, after = (_tensor_part(text) for text in (path.read_text(encoding="utf-8"), config))
    if before != after:
        raise BundleError(
            f"{folder}: holds versions with other inputs, outputs or platform than this graph, and all versions share "
            "one configuration; choose another folder with --out"
        )


def _check_same_model(folder: Path, config: str, is_highest: bool) -> None:
    """Check that a version is a step of the plan of the others: classes of the lower steps are the first of the higher.

    Raises:
        BundleError: it is not.
    """
    before = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    plans = [_read_parameter(text, _PLAN) for text in (before, config)]
    lower, higher = (json.loads(_read_parameter(text, _CLASS_NAMES) or "[]") for text in (before, config))
    if not is_highest:
        lower, higher = higher, lower
    if (None not in plans and plans[0] != plans[1]) or higher[: len(lower)] != lower:
        raise BundleError(
            f"{folder}: holds steps of another plan ({plans[0] or 'unknown'}, classes {', '.join(lower)}), and all "
            "versions of a model are steps of one; choose another folder with --out"
        )


def _stated_batch(folder: Path) -> int | None:
    """Return the batch size that the configuration of a model states."""
    path = folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r"^max_batch_size: (\d+)$", text, re.MULTILINE)
    return None if found is None else int(found[1])


def _tensor_part(config: str) -> str:
    """Return what of a configuration concerns all versions: everything before the version policy but the batch size."""
    return "".join(
        line for line in config.partition("version_policy")[0].splitlines(True) if not line.startswith("max_batch_size")
    )


def _write_version(version: Path, files: Mapping[str, bytes]) -> None:
    """Put a version in place as a whole; a server ignores folders whose names are no numbers."""
    with replaced_folder(version) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
