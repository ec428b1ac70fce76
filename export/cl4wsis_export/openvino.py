"""OpenVINO's own format (IR) from a graph of a bundle, checked against the golden outputs before it is kept.

OpenVINO reads the ONNX graph too; its own format loads faster and is what OpenVINO Model Server and other tools of the
family take.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis.agreement import AgreementCounter
from cl4wsis.bundle import LABELS_FILE, Bundle, Manifest, VariantInfo, read_onnx_metadata
from cl4wsis.errors import BackendError, BundleError, require
from cl4wsis.folders import replaced_folder
from cl4wsis.grouping import group_maps
from cl4wsis.images import read_image
from cl4wsis.instances import Instances

INPUT_NAME = "images"
MODEL_FILE = "model.xml"
_WEIGHTS_FILE = "model.bin"
_RUNTIME_SECTION = "cl4wsis"


def write_openvino(bundle: Bundle, variant: VariantInfo, destination: Path) -> Path:
    """Convert a graph and write ``model.xml``, ``model.bin`` and ``labels.txt``.

    The metadata of the graph goes into the model's runtime information, under ``cl4wsis``. The converted model must
    answer the golden inputs as ONNX Runtime does the graph.

    Args:
        bundle: an opened bundle.
        variant: one of its graphs.
        destination: folder to write; one that holds such files already is replaced when the new ones are complete.

    Returns:
        The destination.

    Raises:
        MissingExtraError: openvino or onnxruntime is not installed.
        BackendError: OpenVINO cannot convert the graph, or the result answers otherwise.
        BundleError: the destination is something else, or cannot be written.
    """
    require("openvino")
    require("cpu")
    check_destination(destination)
    import openvino

    graph = bundle.path_of(variant)
    try:
        model = openvino.convert_model(str(graph))
    except Exception as error:  # OpenVINO raises errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise BackendError(f"{graph}: openvino {openvino.__version__} cannot convert it: {reason}") from error
    for key, text in read_onnx_metadata(graph).items():
        model.set_rt_info(text, [_RUNTIME_SECTION, key.removeprefix("cl4wsis.")])
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(destination) as folder:
            openvino.save_model(model, str(folder / MODEL_FILE), compress_to_fp16=False)
            (folder / LABELS_FILE).write_text(bundle.manifest.label_lines, encoding="utf-8")
            _check(openvino, folder / MODEL_FILE, bundle, variant)
    except OSError as error:
        raise BundleError(f"{destination}: cannot be written: {error.strerror or error}") from error
    return destination


def _golden_frames(bundle: Bundle) -> list[NDArray[np.uint8]]:
    """Return the golden inputs, or one gray image where a lone graph has none."""
    if bundle.path.is_dir() and bundle.manifest.golden:
        return [read_image(bundle.path / case.image) for case in bundle.manifest.golden]
    return [np.full((*bundle.manifest.input.size, 3), 127, np.uint8)]


def check_destination(destination: Path) -> None:
    """Check that a model may be written here: the place is free, or holds another one and nothing else.

    Raises:
        BundleError: something else is there.
    """
    if not destination.exists():
        return
    names = {path.name for path in destination.iterdir()} if destination.is_dir() else set()
    if MODEL_FILE not in names or not names <= {MODEL_FILE, _WEIGHTS_FILE, LABELS_FILE}:
        raise BundleError(
            f"{destination}: exists and holds something else than {MODEL_FILE}, {_WEIGHTS_FILE} and {LABELS_FILE}; "
            "choose another folder with --out"
        )


def _check(openvino: Any, model: Path, bundle: Bundle, variant: VariantInfo) -> None:
    """Compare the answers of the converted model with those of the graph in ONNX Runtime.

    They may differ by as much as the limits of the precision allow a golden output to differ.
    """
    import onnxruntime

    graph = bundle.path_of(variant)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    compiled = openvino.Core().compile_model(str(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    counter = AgreementCounter()
    for frame in _golden_frames(bundle):
        expected = session.run(names, {INPUT_NAME: frame[None]})
        answer = compiled({INPUT_NAME: frame[None]})
        counter.add(
            _instances({name: answer[name][0] for name in names}, bundle.manifest),
            _instances({name: value[0] for name, value in zip(names, expected, strict=True)}, bundle.manifest),
        )
    found = counter.result().differing_pixels
    limit = bundle.manifest.limits_of(variant.precision).golden_pixels
    if limit is not None and not found <= limit:
        raise BackendError(
            f"{graph}: converted by openvino {openvino.__version__}, it names other instances than in ONNX Runtime at "
            f"{found:.1%} of the foreground of the golden inputs (limit {limit:.1%}); nothing was written. Use the "
            "ONNX graph"
        )


def _instances(outputs: dict[str, NDArray[Any]], manifest: Manifest) -> Instances:
    """Return the answer to one image, whether the graph groups or leaves that to the host."""
    if "instance_ids" not in outputs:
        maps = (outputs["semantic_logits"], outputs["center_heatmap"], outputs["offset_map"])
        return group_maps(*maps, manifest.input.size, manifest.grouping)
    slots = Instances.from_slots(outputs)
    return slots.select(slots.areas > 0)
