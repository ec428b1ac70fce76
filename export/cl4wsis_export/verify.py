"""The check before packing: the graph in ONNX Runtime against torch, and torch against the NumPy reference.

Two comparisons, because two things can go wrong. A graph that says something else than the network shows in the ids of
the first one: rounding may move single pixels at the border of two classes, nothing more. A grouping that differs from
``cl4wsis.grouping`` shows in the second one, in which both sides read the same maps.

A graph of lower precision is compared with the float32 graph by its instances, and must keep to the limits of its
precision (``cl4wsis.checks``). Any graph without grouping must, followed by the grouping, answer as the one with it.
"""

import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cl4wsis.agreement import AgreementCounter
from cl4wsis.bundle import Precision, Verification
from cl4wsis.checks import Agreement, Limits, beyond_limits
from cl4wsis.errors import BundleError, require
from cl4wsis.grouping import group_instances
from cl4wsis.instances import Instances
from cl4wsis.metrics import overlap_matrix
from cl4wsis.preprocess import prepare_image
from cl4wsis.shapes import SHAPE_NAMES, draw_picture
from cl4wsis.steps import InputRule
from cl4wsis_export.fused import INPUT_NAME, MAP_NAMES, FusedOutput, FusedSegmenter

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
        images: (h, w, 3) uint8 RGB; drawn shapes when there are none.

    Returns:
        (B, H, W, 3) uint8 RGB; fewer than ``count`` if there are fewer images.
    """
    chosen = list(images or ())[:count] or [_draw_shapes(seed, index, max(rule.size)) for index in range(count)]
    return np.stack([prepare_image(image, rule)[0] for image in chosen])


def _draw_shapes(seed: int, index: int, side: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng([seed, index])
    return draw_picture(generator, generator.choice(SHAPE_NAMES, size=4).tolist(), side).image


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
    outputs = run_frames(session, frames)
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


def verify_precision(
    graph: bytes, frames: NDArray[np.uint8], truth: Sequence[Outputs], precision: Precision, limits: Limits
) -> tuple[Agreement, list[Outputs]]:
    """Compare a graph of lower precision with the float32 graph.

    In a batch, sums of floats may end in another last digit, and where that decides how a value is rounded, answers
    change as much as by rounding at all. So images in a batch may differ from images alone, but by no more than these
    differ from float32.

    Args:
        graph: contents of the ``.onnx`` file.
        frames: (N, H, W, 3) uint8 RGB.
        truth: what the float32 graph answered to them.
        precision: of the graph, for messages.
        limits: that it must keep to; those of golden images and of AP are not looked at here.

    Returns:
        The figures, and the graph's outputs for every frame, without the batch axis.

    Raises:
        BundleError: the graph cannot be run, answers differently in a batch, or is beyond the limits.
    """
    session = open_session(graph)
    outputs = run_frames(session, frames)
    agreement = _agreement(outputs, truth)
    together = _run(session, frames[: max(BATCH_SIZES)])
    in_batch = _agreement(together, outputs[: len(together)]).differing_pixels
    limit = max(MAX_DIFFERING_PIXELS, agreement.differing_pixels)
    if in_batch > limit:
        raise BundleError(
            f"the {precision} graph answers differently in a batch: {in_batch:.2%} of the foreground belongs to "
            f"another instance (limit {limit:.2%})"
        )
    problems = beyond_limits(limits, agreement)
    if problems:
        raise BundleError(
            f"the {precision} graph is too far from the float32 graph: on {agreement.images} images with "
            f"{agreement.instances} instances, {'; '.join(problems)}. Leave out this --precision"
            + (", calibrate with more images (--set calibration_images=256)" if precision == "int8" else "")
            + f", or accept it with --set limits.{precision}.matched=... and the like"
        )
    return agreement, outputs


def allow_golden(limits: Limits, outputs: Sequence[Outputs], truth: Sequence[Outputs]) -> Limits:
    """Allow a graph that passed on all images what it has on the golden ones, which are so few.

    There a single instance may be more than the limit. What is found adds to it, so that other backends are allowed as
    much as they were.
    """
    found = _agreement(outputs, truth).differing_pixels
    if limits.golden_pixels is None or found <= limits.golden_pixels:
        return limits
    return limits.model_copy(update={"golden_pixels": min(found + limits.golden_pixels, 1.0)})


def verify_host(
    files: Iterable[tuple[str, bytes]],
    host_file: str,
    tail: bytes,
    frames: NDArray[np.uint8],
    outputs: Sequence[Outputs],
) -> None:
    """Check that a graph without grouping, followed by the grouping, answers as the graph with it.

    Args:
        files: names and contents of that graph and of the file that holds its weights.
        host_file: name of the graph.
        tail: the grouping as a graph, from the maps to the outputs.
        frames: (N, H, W, 3) uint8 RGB.
        outputs: what the graph with grouping answered to them.

    Raises:
        BundleError: it cannot be run, or answers differently.
    """
    with tempfile.TemporaryDirectory(prefix="cl4wsis-") as folder:
        for name, content in files:
            (Path(folder) / name).write_bytes(content)
        network, grouping = open_session(Path(folder) / host_file), open_session(tail)
        for frame, expected in zip(frames, outputs, strict=True):
            maps = network.run(list(MAP_NAMES), {INPUT_NAME: frame[None]})
            arrays = grouping.run(list(FusedOutput._fields), dict(zip(MAP_NAMES, maps, strict=True)))
            answer = {name: array[0] for name, array in zip(FusedOutput._fields, arrays, strict=True)}
            _compare_ids([answer], [expected], f"{host_file} answers differently than the graph with grouping")


def run_frames(session: Any, frames: NDArray[np.uint8]) -> list[Outputs]:
    """Return a graph's outputs for every frame by itself, without the batch axis."""
    return [row for frame in frames for row in _run(session, frame[None])]


def open_session(graph: bytes | Path) -> Any:
    """Load a graph into ONNX Runtime on the CPU.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
        MissingExtraError: ONNX Runtime is not installed.
    """
    runtime = _import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
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
    answer = _instances(outputs)
    overlaps = overlap_matrix(answer, reference)
    same_class = answer.labels[:, None] == reference.labels[None]
    return int(((overlaps > _MATCH_IOU) & same_class).any(axis=0).sum())


def _instances(outputs: Outputs) -> Instances:
    """Return the used slots."""
    return Instances.from_slots(outputs).select(outputs["areas"] > 0)


def _agreement(answers: Sequence[Outputs], expected: Sequence[Outputs]) -> Agreement:
    counter = AgreementCounter()
    for answer, reference in zip(answers, expected, strict=True):
        counter.add(_instances(answer), _instances(reference))
    return counter.result()


def _compare_ids(answers: Sequence[Outputs], expected: Sequence[Outputs], what: str) -> None:
    shares = [float((a["instance_ids"] != b["instance_ids"]).mean()) for a, b in zip(answers, expected, strict=False)]
    if max(shares) > MAX_DIFFERING_PIXELS:
        raise BundleError(f"{what}: on up to {max(shares):.3%} of an image's pixels (limit {MAX_DIFFERING_PIXELS:.1%})")


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
