"""From a trained step to a bundle: build the graph, verify it, and write everything a runtime needs beside it."""

import io
import logging
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from cl4wsis import __version__
from cl4wsis.bundle import (
    CARD_FILE,
    LABELS_FILE,
    PRECISION_OPTIONS,
    GoldenCase,
    GraphInfo,
    Manifest,
    Precision,
    TensorInfo,
    Verification,
    write_bundle,
)
from cl4wsis.checks import DEFAULT_LIMITS, Limits
from cl4wsis.errors import BundleError
from cl4wsis.grouping import GroupingSpec
from cl4wsis.recipe import NetworkSettings
from cl4wsis.steps import StepInfo
from cl4wsis_export.borders import grouping_tail, network_graph
from cl4wsis_export.fused import INPUT_NAME, MAP_NAMES, FusedSegmenter
from cl4wsis_export.graph import BATCH, build_graph, serialize, trace_network
from cl4wsis_export.passes import count_operators
from cl4wsis_export.spec import ExportSpec
from cl4wsis_export.variants import GraphPair, float_pair, lower_pair
from cl4wsis_export.verify import (
    Outputs,
    allow_golden,
    open_session,
    run_frames,
    verification_frames,
    verify_graph,
    verify_host,
    verify_precision,
)
from cl4wsis_train.checkpoint import load_step
from cl4wsis_train.models.network import InstanceSegmenter

logger = logging.getLogger(__name__)

_HOST_IMAGES = 2
"""Images on which a graph without grouping is tried: it holds the same network, so its wiring is what can be wrong."""


def export_step(
    step_folder: Path,
    destination: Path,
    spec: ExportSpec,
    images: Sequence[NDArray[np.uint8]] | None = None,
    calibration: Sequence[NDArray[np.uint8]] | None = None,
) -> Path:
    """Export a trained step as a bundle.

    Args:
        step_folder: what training left behind.
        destination: folder to write; a bundle there is replaced once the new one is complete and verified.
        spec: settings of the export.
        images: (h, w, 3) uint8 RGB for the verification; drawn shapes when not given.
        calibration: (h, w, 3) uint8 RGB on which the ranges of an int8 network are measured
            (:func:`cl4wsis_export.calibration.calibration_images`); drawn shapes when not given, which only suits a
            network that was trained on them.

    Returns:
        The destination.

    Raises:
        RunError: the folder is no complete step.
        ConfigError: the grouping profile cannot be a graph.
        BundleError: the graph cannot be exported or disagrees with the network, and nothing is written; or a lower
            precision is too far from it, and the bundle is written without that.
        MissingExtraError: ONNX Runtime, or TensorRT-RTX when engines are wanted, is not installed.
    """
    network, info = load_step(step_folder)
    return export_network(network, info, destination, spec, images, calibration)


def check_exportable(settings: NetworkSettings, input_size: tuple[int, int]) -> None:
    """Export a network of these settings with random weights, and keep nothing of it.

    What an encoder is made of decides whether it can be deployed, which is better known before it is trained for hours.

    Args:
        settings: of the network; its initial weights are not looked for.
        input_size: (height, width) of the network input, px.

    Raises:
        BundleError: such a network cannot be exported.
    """
    network = InstanceSegmenter(settings.model_copy(update={"weights": "none"}), (1,))
    trace_network(FusedSegmenter(network, GroupingSpec(), input_size, rounds=1).eval(), ExportSpec().opset)


def export_network(
    network: InstanceSegmenter,
    info: StepInfo,
    destination: Path,
    spec: ExportSpec,
    images: Sequence[NDArray[np.uint8]] | None = None,
    calibration: Sequence[NDArray[np.uint8]] | None = None,
) -> Path:
    """Export a network that is loaded already; see :func:`export_step`."""
    grouping = spec.grouping or info.plan.recipe.grouping
    segmenter = FusedSegmenter(network.eval(), grouping, info.input.size, spec.region_rounds).eval()
    logger.info("exporting step %d of plan %s at %dx%d px", info.step, info.plan.name, *info.input.size)
    model = build_graph(segmenter, spec.opset)
    manifest = _describe(info, spec, segmenter, model)
    pair = float_pair(model, manifest)
    frames = verification_frames(info.input, spec.verification_images, spec.seed, images)
    logger.info("verifying the graph on %d images", len(frames))
    verification, outputs = verify_graph(segmenter, pair.graph_content, frames)
    tail = serialize(grouping_tail(model))
    verify_host(pair.files(), pair.host.file, tail, frames[:_HOST_IMAGES], outputs[:_HOST_IMAGES])
    count = min(spec.golden_images, len(frames))
    cases, files = _golden_files(frames[:count], outputs[:count])
    lower, limits, refused = _lower_pairs(model, manifest, pair, info, spec, images, calibration)
    pairs = [pair, *lower]
    for written in pairs:
        files.update(written.files())
    known = {
        "verification": verification,
        "golden": cases,
        "limits": limits,
        "variants": tuple(variant for written in pairs for variant in (written.graph, written.host)),
    }
    complete = manifest.model_copy(update=known)
    files[LABELS_FILE] = manifest.label_lines.encode()
    files[CARD_FILE] = _card(complete, verification).encode()
    path = write_bundle(destination, complete, files)
    if refused:
        raise BundleError(f"{destination} is written without {' and '.join(refused)}: {'; '.join(refused.values())}")
    return path


def _lower_pairs(
    model: ir.Model,
    manifest: Manifest,
    truth: GraphPair,
    info: StepInfo,
    spec: ExportSpec,
    images: Sequence[NDArray[np.uint8]] | None,
    calibration: Sequence[NDArray[np.uint8]] | None,
) -> tuple[list[GraphPair], dict[Precision, Limits], dict[str, str]]:
    """Make and verify the graphs of lower precision that were asked for.

    Returns:
        The graphs; the limits they are to keep to from now on; and why those left out are refused.
    """
    precisions = [
        precision for precision in PRECISION_OPTIONS if precision in spec.precisions and precision != "float32"
    ]
    limits = dict(spec.limits)
    if not precisions:
        return [], limits, {}
    frames = verification_frames(info.input, spec.precision_images, spec.seed, images)
    expected = run_frames(open_session(truth.graph_content), frames)
    tail = serialize(grouping_tail(model))
    pairs: list[GraphPair] = []
    refused: dict[str, str] = {}
    for precision in precisions:
        ranges = _calibration_frames(info, spec, calibration) if precision == "int8" else frames
        logger.info("making the %s graph, verifying it on %d images", precision, len(frames))
        own = spec.limits.get(precision, DEFAULT_LIMITS[precision])
        try:
            pair = lower_pair(model, manifest, precision, truth.graph, ranges)
            agreement, outputs = verify_precision(pair.graph_content, frames, expected, precision, own)
            verify_host(pair.files(), pair.host.file, tail, frames[:_HOST_IMAGES], outputs[:_HOST_IMAGES])
        except BundleError as error:
            refused[precision] = str(error)
            continue
        pairs.append(pair.with_agreement(agreement))
        limits[precision] = allow_golden(own, outputs[: spec.golden_images], expected[: spec.golden_images])
    return pairs, limits, refused


def _calibration_frames(
    info: StepInfo, spec: ExportSpec, images: Sequence[NDArray[np.uint8]] | None
) -> NDArray[np.uint8]:
    if images:
        count = min(spec.calibration_images, len(images))
    else:
        count = spec.calibration_images
        logger.warning("calibrating on drawn shapes, since no training images were given")
    return verification_frames(info.input, count, spec.seed + 1, images)


def _describe(info: StepInfo, spec: ExportSpec, segmenter: FusedSegmenter, model: ir.Model) -> Manifest:
    (height, width), slots = info.input.size, segmenter.spec.max_instances
    recipe = info.plan.recipe
    return Manifest(
        name=spec.name or f"{info.plan.name}-step{info.step}",
        plan=info.plan.name,
        step=info.step,
        classes=info.classes,
        input=info.input,
        inputs=(_tensor(INPUT_NAME, "uint8", (height, width, 3), "RGB images, fitted and padded, not normalised"),),
        outputs=(
            _tensor("instance_ids", "uint8", (height, width), "0 none, k + 1 for slot k"),
            _tensor("labels", "int32", (slots,), "class of each slot, from 0; slots of area 0 are unused"),
            _tensor("scores", "float32", (slots,), "center value times mean class probability"),
            _tensor("areas", "int32", (slots,), "pixels of each instance"),
            _tensor("boxes", "float32", (slots, 4), "xyxy, right and lower edge behind the last pixel"),
        ),
        grouping=segmenter.spec,
        maps=_describe_maps(model),
        graph=GraphInfo(opset=spec.opset, operators=count_operators(model), region_rounds=spec.region_rounds),
        weights_sha256=info.weights_sha256,
        parent_sha256=info.parent_sha256,
        accuracy=info.metrics,
        training={
            "steps": info.plan.steps,
            "selection": info.plan.selection,
            "network": info.network.model_dump(mode="json"),
            "recipe": recipe.model_dump(mode="json"),
            "seconds": info.seconds,
        },
        versions={
            **{f"training {name}": version for name, version in info.versions.items()},
            "cl4wsis": __version__,
            "torch": torch.__version__,
            "onnx_ir": ir.__version__,
            "python": platform.python_version(),
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _describe_maps(model: ir.Model) -> tuple[TensorInfo, ...]:
    """Describe the outputs of the host variants by the values of the same names within the graph."""
    meanings = ("raw, channel 0 is background", "raw, one channel per class", "(dy, dx), center minus pixel, px")
    values = {value.name: value for value in network_graph(model).graph.outputs}
    return tuple(
        TensorInfo(name=name, dtype="float32", shape=(BATCH, *(values[name].shape or ())[1:]), meaning=meaning)
        for name, meaning in zip(MAP_NAMES, meanings, strict=True)
    )


def _tensor(name: str, dtype: str, shape: tuple[int, ...], meaning: str) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=(BATCH, *shape), meaning=meaning)


def _golden_files(
    frames: NDArray[np.uint8], outputs: Sequence[Outputs]
) -> tuple[tuple[GoldenCase, ...], dict[str, bytes]]:
    """Store inputs as PNG, and what the graph answered to them as NPZ."""
    import cv2

    cases, files = [], {}
    for index, (frame, answer) in enumerate(zip(frames, outputs, strict=True)):
        case = GoldenCase(image=f"golden/{index}.png", outputs=f"golden/{index}.npz")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **answer)
        files[case.image] = cv2.imencode(".png", frame[..., ::-1])[1].tobytes()
        files[case.outputs] = buffer.getvalue()
        cases.append(case)
    return tuple(cases), files


def _card(manifest: Manifest, check: Verification) -> str:
    """Describe the model for people, in Markdown."""
    height, width = manifest.input.size
    rows = "\n".join(f"| {label} | {c.name} | {c.step_added} |" for label, c in enumerate(manifest.classes))
    return f"""# {manifest.name}

Instance segmentation of {len(manifest.classes)} classes, step {manifest.step} of plan `{manifest.plan}`.
Exported {manifest.created} by cl4wsis {manifest.versions["cl4wsis"]}.

| label | class | added in step |
| --- | --- | --- |
{rows}

**Input**: `{INPUT_NAME}` (batch, {height}, {width}, 3) uint8 RGB. Fit the image into {width}x{height} px with its
aspect kept, pad right and below with the mean color; the graph normalises.

**Output**: `instance_ids` (batch, {height}, {width}) uint8, and one row of `labels`, `scores`, `areas` and `boxes` for
each of {manifest.grouping.max_instances} slots; id `k + 1` belongs to slot `k`, slots of area 0 are unused.

**Check**: on {check.images} images, {check.matched:.2%} of {check.instances} instances agree with the reference; ids
differ between torch and ONNX Runtime on at most {check.differing_pixels:.3%} of an image's pixels.

{_accuracy(manifest.accuracy)}"""


def _accuracy(metrics: dict[str, Any]) -> str:
    """Tabulate what was measured after training, for the old and the new classes and for all."""
    rows = [
        f"| {title} | " + " | ".join(_percent(metrics[name].get(group)) for group in ("old", "new", "all")) + " |"
        for name, title in (("ap50", "AP50"), ("ap", "AP"), ("coco_ap", "COCO AP"), ("iou", "mIoU"))
        if isinstance(metrics.get(name), dict)
    ]
    head = "**Accuracy** after training, percent, by classes\n\n| | old | new | all |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
