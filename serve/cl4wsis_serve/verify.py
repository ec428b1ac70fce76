"""The verification ladder on the machine where a bundle is to run: every variant on every backend, without torch.

The measure is ``model.onnx``, the float32 graph, in ONNX Runtime on the CPU. Each variant on each backend must give the
golden outputs, and on a set of images the same instances; where the true objects are known, its AP50 of old and of new
classes must not fall either. How far apart they may be depends on the precision (``cl4wsis.checks``); what was found
is stored in the manifest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cl4wsis import __version__
from cl4wsis.agreement import AgreementCounter
from cl4wsis.bundle import Bundle, Manifest, Post, Precision, update_manifest
from cl4wsis.checks import Agreement, Limits, VariantCheck, beyond_limits
from cl4wsis.datasets import load_evaluation_set
from cl4wsis.engines import graph_sha256
from cl4wsis.errors import BackendError
from cl4wsis.images import read_image
from cl4wsis.instances import Instances
from cl4wsis.metrics import GroupMeans, group_means, voc_average_precision
from cl4wsis.tasks import ClassSplit, Plan
from cl4wsis_serve.backends import backend_status
from cl4wsis_serve.evaluate import check_plan
from cl4wsis_serve.predictor import Predictor
from cl4wsis_serve.selftest import golden_agreement, golden_cases

REFERENCE_BACKEND = "onnxruntime"
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
}

Image = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]
"""Called with what is being checked, the number of images done and of all."""


@dataclass(frozen=True)
class ImageSet:
    """Images to verify with; each is read when it is asked for.

    Attributes:
        description: what they are, in words.
        size: number of images.
        image: returns the image at a position, (H, W, 3) uint8 RGB.
        truth: returns its true instances; none where they are not known.
        split: old and new classes; given with the truth.
    """

    description: str
    size: int
    image: Callable[[int], Image]
    truth: Callable[[int], Instances] | None = None
    split: ClassSplit | None = None


class Choice(NamedTuple):
    """One graph on one backend."""

    precision: Precision
    post: Post
    backend: str

    def __str__(self) -> str:
        return f"{self.precision}, post={self.post}, {self.backend}"


class Skipped(NamedTuple):
    """A backend or choice that was not checked, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class LadderResult:
    """What was found out about a bundle on this machine."""

    checks: tuple[VariantCheck, ...]
    skipped: tuple[Skipped, ...]

    @property
    def passed(self) -> bool:
        """Whether every check was within its limits."""
        return all(check.passed for check in self.checks)


class _Answer(NamedTuple):
    """Instances of one image, packed: id maps of thousands of images would not fit into memory."""

    ids: Image
    """The PNG file of the id map, as bytes."""
    labels: NDArray[np.int32]
    scores: NDArray[np.float32]


# --- images ---


def golden_images(bundle: Bundle) -> ImageSet:
    """Take the golden inputs of the bundle itself.

    Raises:
        BundleError: one cannot be read.
    """
    frames = [frame for frame, _ in golden_cases(bundle)]
    return ImageSet("golden inputs of the bundle", len(frames), frames.__getitem__)


def folder_images(description: str, paths: Sequence[Path], limit: int | None = None) -> ImageSet:
    """Take image files, at most ``limit`` of them, spread over the list."""
    chosen = [paths[position] for position in _spread(len(paths), limit)]
    description = f"{description} ({len(chosen)} of {len(paths)} images)"
    return ImageSet(description, len(chosen), lambda index: read_image(chosen[index]))


def plan_images(plan: Plan, bundle: Bundle, limit: int | None = None) -> ImageSet:
    """Take the evaluation images of a plan, at most ``limit`` of them, with their true instances.

    Raises:
        BundleError: the bundle's classes are not those of the plan at the bundle's step.
        DataError: the plan has no evaluation images, or they cannot be read.
    """
    split = check_plan(bundle.manifest, plan)
    samples = load_evaluation_set(plan, bundle.manifest.step)
    positions = _spread(len(samples), limit)

    def truth(index: int) -> Instances:
        sample = samples[positions[index]]
        return Instances.from_ids(sample.instance_ids, sample.labels, np.ones(len(sample.labels), np.float32))

    return ImageSet(
        f"{len(positions)} evaluation images of plan {plan.name}",
        len(positions),
        lambda index: samples[positions[index]].image,
        truth,
        split,
    )


def _spread(size: int, limit: int | None) -> list[int]:
    count = size if limit is None else min(limit, size)
    return [index * size // count for index in range(count)]


# --- the ladder ---


def choose(
    bundle: Bundle, backends: Sequence[str] = (), precisions: Sequence[Precision] = (), posts: Sequence[Post] = ()
) -> tuple[list[Choice], list[Skipped]]:
    """Combine the variants of a bundle with the backends of this machine.

    Args:
        bundle: to be checked.
        backends: only these; all that work here when empty.
        precisions: only these; all that the bundle holds when empty.
        posts: only these; both when empty.

    Raises:
        BackendError: a backend that was asked for is unknown or does not work here.
        BundleError: the bundle does not hold a precision that was asked for.
    """
    status = backend_status()
    for name in backends:
        if name not in status:
            raise BackendError(f"unknown backend '{name}'; known: {', '.join(status)}")
        if (reason := status[name]) is not None:
            raise BackendError(reason)
    for precision in precisions:
        bundle.variant(precision, posts[0] if posts else "graph")
    variants = [
        variant
        for variant in bundle.manifest.variants
        if variant.precision in (precisions or (variant.precision,)) and variant.post in (posts or (variant.post,))
    ]
    ready = backends or [name for name, reason in status.items() if reason is None]
    choices = [Choice(variant.precision, variant.post, name) for name in ready for variant in variants]
    skipped = [Skipped(name, reason) for name, reason in status.items() if reason is not None]
    return choices, [] if backends else skipped


def verify_bundle(
    bundle: Bundle,
    images: ImageSet,
    choices: Sequence[Choice],
    threads: int | None = None,
    progress: Progress | None = None,
) -> LadderResult:
    """Climb the ladder.

    Args:
        bundle: to be checked.
        images: on which answers are compared.
        choices: see :func:`choose`.
        threads: CPU threads of each backend; all usable cores when not given.
        progress: told how far it is.

    Raises:
        BackendError: ``model.onnx`` cannot be run in ONNX Runtime, so there is nothing to compare with.
        DataError: an image cannot be read.
    """
    report = progress or (lambda what, done, total: None)
    reference, reference_ap50 = _record_reference(bundle, images, threads, report)
    checks: list[VariantCheck] = []
    skipped: list[Skipped] = []
    for choice in choices:
        try:
            predictor = _open(bundle, choice, threads)
        except BackendError as error:
            if choice.backend == REFERENCE_BACKEND:  # it must run every variant; others may refuse one
                checks.append(_check(bundle, choice, images, None, None, None, None, [str(error)]))
            else:
                skipped.append(Skipped(str(choice), str(error)))
            continue
        checks.append(_climb(bundle, choice, predictor, images, reference, reference_ap50, report))
    return LadderResult(tuple(checks), tuple(skipped))


def store_checks(bundle: Bundle, checks: Sequence[VariantCheck]) -> None:
    """Write results into the manifest; earlier ones of the same graph, backend and images are replaced.

    Raises:
        BundleError: the manifest cannot be written, or the bundle is a lone graph.
    """
    replaced = {_key(check) for check in checks}

    def add(current: Manifest) -> dict[str, Any]:
        kept = [check for check in current.checks if _key(check) not in replaced]
        present = set(current.files.values())  # the bundle may have been replaced meanwhile
        return {"checks": [check for check in (*kept, *checks) if check.sha256 in present]}

    update_manifest(bundle, add)


def _key(check: VariantCheck) -> tuple[str, ...]:
    return check.precision, check.post, check.backend, check.data


def _open(bundle: Bundle, choice: Choice, threads: int | None) -> Predictor:
    return Predictor.open(bundle.path, choice.backend, precision=choice.precision, post=choice.post, threads=threads)


def _record_reference(
    bundle: Bundle, images: ImageSet, threads: int | None, report: Progress
) -> tuple[list[_Answer], GroupMeans | None]:
    predictor = _open(bundle, Choice("float32", "graph", REFERENCE_BACKEND), threads)
    recorded: list[_Answer] = []

    def answers() -> Iterator[Instances]:
        for index in range(images.size):
            answer = predictor.predict(images.image(index))
            recorded.append(_pack(answer))
            report("reference", index + 1, images.size)
            yield answer

    ap50 = _measure(answers(), images)
    return recorded, ap50


def _climb(
    bundle: Bundle,
    choice: Choice,
    predictor: Predictor,
    images: ImageSet,
    reference: Sequence[_Answer],
    reference_ap50: GroupMeans | None,
    report: Progress,
) -> VariantCheck:
    golden: Agreement | None = None
    agreement: Agreement | None = None
    ap50: GroupMeans | None = None
    counter = AgreementCounter()

    def answers() -> Iterator[Instances]:
        for index in range(images.size):
            answer = predictor.predict(images.image(index))
            counter.add(answer, _unpack(reference[index]))
            report(str(choice), index + 1, images.size)
            yield answer

    problems: list[str] = []
    try:
        golden = golden_agreement(predictor, bundle)
        ap50 = _measure(answers(), images)
        agreement = counter.result()
    except BackendError as error:
        problems.append(str(error))
    return _check(bundle, choice, images, golden, agreement, ap50, reference_ap50, problems)


def _measure(answers: Iterator[Instances], images: ImageSet) -> GroupMeans | None:
    """Go through all answers, and judge them by the true objects where these are known."""
    if images.truth is None or images.split is None:
        for _ in answers:
            pass
        return None
    truths = map(images.truth, range(images.size))
    values = voc_average_precision(answers, truths, images.split.num_classes, (0.5,))[:, 0]
    return group_means(values, images.split)


def _check(
    bundle: Bundle,
    choice: Choice,
    images: ImageSet,
    golden: Agreement | None,
    agreement: Agreement | None,
    ap50: GroupMeans | None,
    reference_ap50: GroupMeans | None,
    failures: Sequence[str],
) -> VariantCheck:
    limits = bundle.manifest.limits_of(choice.precision)
    problems = [*failures, *find_problems(limits, golden, agreement, ap50, reference_ap50)]
    return VariantCheck(
        precision=choice.precision,
        post=choice.post,
        backend=choice.backend,
        sha256=graph_sha256(bundle, bundle.variant(choice.precision, choice.post)),
        data=images.description,
        golden=golden,
        agreement=agreement,
        ap50=ap50,
        ap50_reference=reference_ap50 if ap50 is not None else None,
        limits=limits,
        problems=tuple(problems),
        versions=_versions(choice.backend),
        checked=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def find_problems(
    limits: Limits,
    golden: Agreement | None,
    agreement: Agreement | None,
    ap50: GroupMeans | None,
    reference_ap50: GroupMeans | None,
) -> list[str]:
    """Say what is beyond the limits, in words with figures; what was not measured is no problem."""
    problems = []
    if golden is not None and _exceeds(golden.differing_pixels, limits.golden_pixels):
        problems.append(
            f"{golden.differing_pixels:.2%} of the foreground of the golden images differ "
            f"(limit {limits.golden_pixels:.2%})"
        )
    if agreement is not None:
        problems += beyond_limits(limits, agreement)
    if ap50 is not None and reference_ap50 is not None:
        for group in ("old", "new", "all"):
            found, expected = getattr(ap50, group), getattr(reference_ap50, group)
            if found is not None and expected is not None and _exceeds(expected - found, limits.ap50_drop):
                problems.append(
                    f"AP50 of {group} classes falls by {100 * (expected - found):.2f} points "
                    f"(limit {100 * (limits.ap50_drop or 0):.2f})"
                )
    return problems


def _exceeds(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _versions(backend: str) -> dict[str, str]:
    names = sorted(_DISTRIBUTIONS, key=len, reverse=True)
    family = next((name for name in names if backend.startswith(name)), "")
    found = {"cl4wsis": __version__}
    for distribution in _DISTRIBUTIONS.get(family, ()):
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def _pack(answer: Instances) -> _Answer:
    from cl4wsis.images import encode_png

    ids = answer.instance_ids.astype(np.uint8 if len(answer) <= 255 else np.uint16)
    return _Answer(np.frombuffer(encode_png(ids), np.uint8), answer.labels, answer.scores)


def _unpack(answer: _Answer) -> Instances:
    import cv2

    ids = cv2.imdecode(answer.ids, cv2.IMREAD_UNCHANGED)
    return Instances.from_ids(np.asarray(ids, np.int32), answer.labels, answer.scores)
