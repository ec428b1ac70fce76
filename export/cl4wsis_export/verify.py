"""The check before packing: the graph in ONNX Runtime against torch, and torch against the NumPy reference.

Two comparisons, because two things can go wrong. A graph that says something else than the network shows in the ids of
the first one: rounding may move single pixels at the border of two classes, nothing more. A grouping that differs from
``cl4wsis.grouping`` shows in the second one, in which both sides read the same maps.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cl4wsis.bundle import Verification
from cl4wsis.errors import BundleError, require
from cl4wsis.grouping import group_instances
from cl4wsis.instances import Instances
from cl4wsis.masks import mask_iou, rle_from_ids
from cl4wsis.preprocess import prepare_image
from cl4wsis.shapes import SHAPE_NAMES, draw_picture
from cl4wsis.steps import InputRule
from cl4wsis_export.fused import INPUT_NAME, FusedOutput, FusedSegmenter

logger = logging.getLogger(__name__)

Outputs = dict[str, NDArray[Any]]

BATCH_SIZES = (1, 2, 5)
MAX_DIFFERING_PIXELS = 1e-3
MAX_SCORE_ERROR = 1e-3
MIN_MATCHED = 0.995
_MATCH_IOU = 0.99


def verification_frames(
    rule: InputRule, count: int, seed: int, images: Sequence[NDArray[np.uint8]] | None = None
) -> NDArray[np.uint8]:
    """Prepare the images on which a graph is verified.

    Args:
        rule: of the network's input.
        count: number of images.
        seed: of drawn pictures.
        images: (h, w, 3) uint8 RGB, taken first; drawn shapes fill up what is missing.

    Returns:
        (count, H, W, 3) uint8 RGB.
    """
    chosen = list(images or ())[:count]
    for index in range(len(chosen), count):
        generator = np.random.default_rng([seed, index])
        names = generator.choice(SHAPE_NAMES, size=4).tolist()
        chosen.append(draw_picture(generator, names, max(rule.size)).image)
    return np.stack([prepare_image(image, rule)[0] for image in chosen])


def verify_graph(
    segmenter: FusedSegmenter, graph: bytes, frames: NDArray[np.uint8]
) -> tuple[Verification, list[Outputs]]:
    """Compare an exported graph with the network it came from and with the NumPy reference.

    Args:
        segmenter: what was exported, in evaluation mode.
        graph: contents of the ``.onnx`` file.
        frames: (N, H, W, 3) uint8 RGB.

    Returns:
        The figures, and the graph's outputs for every frame, without the batch axis.

    Raises:
        BundleError: the graph cannot be run, or disagrees beyond the limits of this module; figures are in the message.
        MissingExtraError: ONNX Runtime is not installed.
    """
    session = open_session(graph)
    outputs = [row for frame in frames for row in _run(session, frame[None])]
    torch_outputs, found, matched, unconverged = [], 0, 0, 0
    for frame in frames:
        of_torch, maps = _run_torch(segmenter, frame)
        reference = group_instances(*maps, segmenter.spec)
        torch_outputs.append(of_torch)
        found += len(reference)
        matched += _count_matches(reference, of_torch)
        unconverged += _is_unconverged(segmenter, maps[0])
    pixels, scores = 0.0, 0.0
    for size in BATCH_SIZES:
        batch = frames[np.arange(size * -(-len(frames) // size)) % len(frames)].reshape(-1, size, *frames.shape[1:])
        rows = outputs if size == 1 else [row for part in batch for row in _run(session, part)]
        for row, expected in zip(rows, torch_outputs, strict=False):  # what fills up the last batch is not compared
            pixels = max(pixels, float((row["instance_ids"] != expected["instance_ids"]).mean()))
            scores = max(scores, float(np.abs(row["scores"] - expected["scores"]).max(initial=0)))
    result = Verification(
        images=len(frames),
        batch_sizes=BATCH_SIZES,
        differing_pixels=pixels,
        score_error=scores,
        instances=found,
        matched=matched / found if found else 1.0,
        unconverged=unconverged,
        runtimes={"onnxruntime": _import_onnxruntime().__version__, "torch": torch.__version__},
    )
    _judge(result)
    return result, outputs


def open_session(graph: bytes) -> Any:
    """Load a graph into ONNX Runtime on the CPU.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = _import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public base class for its errors
        raise BundleError(f"ONNX Runtime {runtime.__version__} cannot load the exported graph: {error}") from error


def _import_onnxruntime() -> Any:
    require("cpu")
    import onnxruntime

    return onnxruntime


def _run(session: Any, batch: NDArray[np.uint8]) -> list[Outputs]:
    arrays = session.run(list(FusedOutput._fields), {INPUT_NAME: batch})
    return [dict(zip(FusedOutput._fields, row, strict=True)) for row in zip(*arrays, strict=True)]


def _run_torch(
    segmenter: FusedSegmenter, frame: NDArray[np.uint8]
) -> tuple[Outputs, tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """Return the outputs of the module for one frame, and the maps that the reference reads."""
    with torch.inference_mode():
        images = torch.from_numpy(frame)[None]
        maps = segmenter.network_maps(images)
        outputs = {name: tensor[0].numpy() for name, tensor in segmenter(images)._asdict().items()}
    probs, heatmap, offsets = (t[0].numpy() for t in (maps.semantic_logits.softmax(dim=1), *maps[1:]))
    return outputs, (probs, heatmap, offsets)


def _is_unconverged(segmenter: FusedSegmenter, semantic_probs: NDArray[np.float32]) -> bool:
    classes = torch.from_numpy(semantic_probs.argmax(axis=0)).float()[None]
    with torch.inference_mode():
        _, finished = segmenter.grouping.label_regions(classes)
    return not bool(finished.item())


def _count_matches(reference: Instances, outputs: Outputs) -> int:
    """Count the instances of the reference that were found with the same class and a mask IoU above 0.99."""
    used = np.flatnonzero(outputs["areas"])
    new_ids = np.zeros(len(outputs["areas"]) + 1, np.int32)
    new_ids[used + 1] = np.arange(1, len(used) + 1)
    rles = rle_from_ids(new_ids[outputs["instance_ids"]], len(used))
    overlaps = mask_iou(rles, rle_from_ids(reference.instance_ids, len(reference)))
    same_class = outputs["labels"][used][:, None] == reference.labels[None]
    return int(((overlaps > _MATCH_IOU) & same_class).any(axis=0).sum())


def _judge(result: Verification) -> None:
    problems = []
    if result.differing_pixels > MAX_DIFFERING_PIXELS:
        problems.append(
            f"up to {result.differing_pixels:.3%} of an image's pixels have another id in ONNX Runtime than in torch "
            f"(limit {MAX_DIFFERING_PIXELS:.1%})"
        )
    if result.score_error > MAX_SCORE_ERROR:
        problems.append(f"scores differ by up to {result.score_error:.2g} (limit {MAX_SCORE_ERROR:.0e})")
    if result.matched < MIN_MATCHED:
        problems.append(
            f"{result.matched:.2%} of {result.instances} instances agree with the reference (limit {MIN_MATCHED:.1%}), "
            f"regions were unfinished on {result.unconverged} of {result.images} images"
        )
    if problems:
        more_rounds = "; try more rounds with --set region_rounds=12" if result.unconverged else ""
        raise BundleError(f"the exported graph does not answer as the network did: {'; '.join(problems)}{more_rounds}")
    if result.unconverged:
        logger.warning(
            "regions were unfinished on %d of %d images; more rounds: --set region_rounds=12",
            result.unconverged,
            result.images,
        )
    if not result.instances:
        logger.warning("nothing was found on the images of the verification, so masks could not be compared")
