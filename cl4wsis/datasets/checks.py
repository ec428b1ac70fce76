"""Counts of what a plan will train on and be measured on, and everything that is wrong with it, found beforehand."""

import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cl4wsis.config import Settings
from cl4wsis.cores import usable_cores
from cl4wsis.datasets.coco import AnnotatedImage
from cl4wsis.datasets.indexed import IndexedImage
from cl4wsis.datasets.pictures import Listing, MaskedPicture, Picture, TaggedImage, occurring_classes
from cl4wsis.datasets.plans import (
    MaskedListing,
    describe_missing,
    draw_training_set,
    list_evaluation_pictures,
    list_masked_pictures,
    list_tagged_pictures,
    missing_evaluation_classes,
    sources_of_masks,
)
from cl4wsis.datasets.problems import problems_of, raise_problems
from cl4wsis.datasets.views import build_step_view
from cl4wsis.errors import DataError
from cl4wsis.proposals import read_proposals
from cl4wsis.shapes import check_shape_names, draw_evaluation_picture
from cl4wsis.tasks import CocoSource, FileData, FileSource, Plan, SbdSource, ShapesData

logger = logging.getLogger(__name__)

_LISTED_NAMES = 5

FileImage = TaggedImage | AnnotatedImage | IndexedImage
Progress = Callable[[int, int], None]


class ClassCount(Settings):
    """How often a class occurs."""

    name: str
    images: int
    instances: int | None
    """None where masks are not looked at."""


class StepSummary(Settings):
    """The training images of a step."""

    step: int
    learns_from: Literal["masks", "tags"]
    source_images: int
    """Images of the step's source."""
    images: int
    """Images that belong to the step."""
    with_old: int | None
    """Images of the step that also hold classes of earlier steps; None where nothing was counted."""
    with_later: int | None
    """Images of the step that also hold classes of later steps."""
    unusable: int
    """Images of the source without a usable label: none of the plan's classes, or no valid box."""
    classes: tuple[ClassCount, ...]
    """Classes whose labels the step sees."""

    def __str__(self) -> str:
        counted = ", ".join(f"{count.name} {count.images}" for count in self.classes)
        return (
            f"step {self.step} learns from {self.learns_from} of {self.images} of {self.source_images} images"
            f"{': ' if counted else ''}{counted}"
        )


class EvaluationSummary(Settings):
    """The images a plan is measured on."""

    images: int
    without_objects: int
    """Images that hold no class of the plan; nothing should be found there."""
    classes: tuple[ClassCount, ...]


class Finding(Settings):
    """Something a person should know."""

    kind: str
    """Such as ``unreadable image``, ``unreadable mask``, ``duplicate`` or ``no usable label``."""
    where: str
    """``step <n>`` or ``evaluation``."""
    message: str
    is_broken: bool = True
    """Whether it must be repaired; otherwise it is worth a look."""


class DataReport(Settings):
    """What was found in the data of a plan."""

    plan: str
    selection: str
    steps: tuple[StepSummary, ...]
    """One per step whose annotations could be read."""
    evaluation: EvaluationSummary | None
    """None if the annotations could not be read."""
    findings: tuple[Finding, ...]

    @property
    def is_broken(self) -> bool:
        """Whether anything must be repaired."""
        return any(finding.is_broken for finding in self.findings)


def check_sources(plan: Plan, step: int) -> StepSummary:
    """Check everything that training a step and evaluating it will read, so that nothing fails halfway.

    Annotation files are read, every image that the step or the evaluation uses is decoded once, and so is every mask
    that they use. The masks of a step that learns from tags are not touched.

    Returns:
        What the step will train on; drawn shapes are not counted one by one.

    Raises:
        DataError: the first problems, one per line with file and reason, and the number of the others.
    """
    plan.split(step)
    if isinstance(plan.data, ShapesData):
        check_shape_names(plan.class_names)
        return _uncounted_shapes(plan, plan.data, step)
    survey = _Survey(plan, plan.data)
    survey.add_step(step)
    survey.add_evaluation(step)
    survey.decode(None)
    raise_problems(list(dict.fromkeys(finding.message for finding in survey.findings if finding.is_broken)))
    for message in dict.fromkeys(finding.message for finding in survey.findings):
        logger.warning("%s", message)
    return survey.steps[0]


def check_plan(plan: Plan, progress: Progress | None = None) -> DataReport:
    """Count and check the data of all steps and of the evaluation.

    Every image that is used is decoded, and so is every mask of a class of the plan. Images that are byte for byte the
    same in training and evaluation are reported.

    Args:
        plan: to check.
        progress: called with the number of images done and of all.
    """
    survey = _Survey(plan, plan.data)
    for step in range(plan.num_steps):
        survey.add_step(step)
    survey.add_evaluation(plan.num_steps - 1)
    survey.decode(progress, find_duplicates=True)
    return DataReport(
        plan=plan.name,
        selection=plan.selection,
        steps=tuple(survey.steps),
        evaluation=survey.evaluation,
        findings=tuple(survey.findings),
    )


@dataclass
class _FileUse:
    """An image file, where it is used, and the classes whose masks are used."""

    image: FileImage
    where: str
    mask_names: set[str]
    proposals: Path | None


class _Survey:
    """Collects counts, findings and the files to decode, step by step."""

    def __init__(self, plan: Plan, data: FileData | ShapesData) -> None:
        self.plan, self.data = plan, data
        self.steps: list[StepSummary] = []
        self.evaluation: EvaluationSummary | None = None
        self.findings: list[Finding] = []
        self._uses: dict[tuple[bool, Path, bool], _FileUse] = {}
        self._tagged: dict[str, Listing[TaggedImage]] = {}
        self._masked: dict[str, MaskedListing] = {}

    def add_step(self, step: int) -> None:
        """Count the images of a step, and note the files it uses."""
        where = f"step {step}"
        try:
            listings = self._step_listings(step)
        except DataError as error:
            self._add(where, "annotations", problems_of(error))
            return
        for listing, names in listings:
            self._add(where, "annotations", listing.problems)
            self._add(
                where, "missing class", describe_missing(names, occurring_classes(listing.pictures), listing.file)
            )
        pictures = [picture for listing, _ in listings for picture in listing.pictures]
        self.steps.append(self._summarize(step, pictures, listings[0][0].file))

    def _step_listings(self, step: int) -> Sequence[tuple[Listing[Picture], Sequence[str]]]:
        plan, data = self.plan, self.data
        if isinstance(data, ShapesData):
            drawn = [picture for number in plan.mask_steps(step) for picture in draw_training_set(plan, data, number)]
            return [(Listing(drawn, Path(f"drawn for step {step}"), plan.class_names), plan.steps[step])]
        if plan.learns_from_masks(step):
            sources = sources_of_masks(plan, data, step)
            return [(self._masked_listing(source, step, names), names) for source, names in sources]
        return [(self._tagged_listing(data.source(step), step), plan.steps[step])]

    def _tagged_listing(self, source: FileSource, step: int) -> Listing[TaggedImage]:
        """Read the tags of a source once, however many steps use it."""
        _check_folder(source)
        key = source.model_dump_json()
        if key not in self._tagged:
            self._tagged[key] = list_tagged_pictures(self.plan, source, step)
        return self._tagged[key]

    def _masked_listing(self, source: FileSource, step: int, names: Sequence[str]) -> MaskedListing:
        """Read the masks of a source once, however many steps use it."""
        _check_folder(source)
        key = source.model_dump_json()
        if key not in self._masked:
            self._masked[key] = list_masked_pictures(self.plan, source, step, names)
        return self._masked[key]

    def _evaluation_listing(self, data: FileData) -> MaskedListing:
        source = data.evaluation_source
        _check_folder(source)
        known = self._masked.get(source.model_dump_json())
        return known if known is not None else list_evaluation_pictures(self.plan, data)

    def _summarize(self, step: int, pictures: Sequence[Picture], file: Path) -> StepSummary:
        """Count the images that belong to a step; the others, and what is missing, become findings."""
        plan, where = self.plan, f"step {step}"
        view = build_step_view(plan, step, "base" if plan.learns_from_masks(step) else "semantic")
        unusable = [picture.name for picture in pictures if not self._is_usable(picture)]
        chosen = [picture for picture in pictures if self._is_usable(picture) and view.selects(picture.tags)]
        if unusable:
            listed = ", ".join(unusable[:_LISTED_NAMES]) + (", ..." if len(unusable) > _LISTED_NAMES else "")
            text = f"{file}: {len(unusable)} images without a usable label are left out: {listed}"
            self._add(where, "no usable label", [text], is_broken=False)
        if not chosen:
            text = f"none of {len(pictures)} images belongs to step {step} under '{plan.selection}' selection"
            self._add(where, "no images", [text])
        classes = _count_classes(chosen, view.mask_names or view.tag_names, bool(view.mask_names))
        rare = [f"{file}: class '{c.name}' has no image in step {step}" for c in classes if chosen and not c.images]
        self._add(where, "no images", rare, is_broken=False)
        for picture in chosen:
            self._use(picture, where, view.mask_names, is_training=True)
        split = plan.split(step)
        later = set(plan.class_names) - set(split.seen_names)
        return StepSummary(
            step=step,
            learns_from="masks" if view.mask_names else "tags",
            source_images=len(pictures),
            images=len(chosen),
            with_old=sum(not picture.tags.isdisjoint(split.old_names) for picture in chosen),
            with_later=sum(not picture.tags.isdisjoint(later) for picture in chosen),
            unusable=len(unusable),
            classes=classes,
        )

    def _is_usable(self, picture: Picture) -> bool:
        if isinstance(picture, AnnotatedImage | IndexedImage) and not picture.has_valid_box:
            return False
        return not picture.tags.isdisjoint(self.plan.class_names)

    def add_evaluation(self, step: int) -> None:
        """Count the evaluation images, and note their files, as they are judged after a step."""
        plan, data, where = self.plan, self.data, "evaluation"
        pictures: Sequence[MaskedPicture]
        if isinstance(data, ShapesData):
            try:
                check_shape_names(plan.class_names)
            except DataError:
                return  # reported with the steps
            pictures = [draw_evaluation_picture(plan, data, index) for index in range(data.num_val)]
        else:
            try:
                listing = self._evaluation_listing(data)
                self._add(where, "annotations", listing.problems)
                self._add(where, "missing class", missing_evaluation_classes(plan, data, step, listing))
            except DataError as error:
                self._add(where, "annotations", problems_of(error))
                return
            pictures = listing.pictures
        names = plan.split(step).seen_names
        for picture in pictures:
            self._use(picture, where, names, is_training=False)
        classes = _count_classes(pictures, names, True)
        absent = [count.name for count in classes if not count.images]
        if absent:
            text = f"no object to be measured on: {', '.join(absent)}"
            self._add(where, "no objects", [text], is_broken=False)
        self.evaluation = EvaluationSummary(
            images=len(pictures),
            without_objects=sum(picture.tags.isdisjoint(names) for picture in pictures),
            classes=classes,
        )

    def _use(self, picture: Picture, where: str, mask_names: Iterable[str], is_training: bool) -> None:
        weak_step = is_training and not mask_names
        proposals = self.data.proposal_folder if weak_step else None
        if isinstance(picture, TaggedImage | AnnotatedImage | IndexedImage):
            key = (is_training, picture.path, isinstance(picture, TaggedImage))
            use = self._uses.setdefault(key, _FileUse(picture, where, set(), None))
            use.mask_names.update(mask_names)
            use.proposals = proposals or use.proposals
        elif proposals is not None:
            height, width = picture.read().shape[:2]
            self.findings += _check_proposals(proposals, picture.name, height, width, where)

    def decode(self, progress: Progress | None, find_duplicates: bool = False) -> None:
        """Decode the files that were noted, on all cores."""
        uses = list(self._uses.values())
        logger.info("checking %d images", len(uses))
        digests: dict[bool, dict[bytes, str]] = {True: {}, False: {}}
        with ThreadPoolExecutor(usable_cores()) as pool:
            results = pool.map(functools.partial(_examine, hashes=find_duplicates), uses)
            for done, ((is_training, path, _), (findings, digest)) in enumerate(
                zip(self._uses, results, strict=True), start=1
            ):
                self.findings += findings
                if digest is not None:
                    digests[is_training].setdefault(digest, str(path))
                if progress is not None:
                    progress(done, len(uses))
        if find_duplicates:
            pairs = [
                (path, digests[True][digest]) for digest, path in digests[False].items() if digest in digests[True]
            ]
            texts = [
                f"{path}: is trained on{'' if path == other else f', as {other},'} and measured on"
                for path, other in pairs
            ]
            self._add("evaluation", "duplicate", texts)

    def _add(self, where: str, kind: str, messages: Iterable[str], is_broken: bool = True) -> None:
        known = {finding.message for finding in self.findings} if messages else set()
        self.findings += [
            Finding(kind=kind, where=where, message=message, is_broken=is_broken)
            for message in messages
            if message not in known
        ]


def _examine(use: _FileUse, hashes: bool) -> tuple[list[Finding], bytes | None]:
    """Decode an image and its masks; return what was found, and a digest of the file if one is wanted."""
    image, where = use.image, use.where
    findings = []
    if not isinstance(image, TaggedImage):
        findings = [
            Finding(kind=found.kind, where=where, message=found.message, is_broken=found.is_broken)
            for found in image.check_masks(use.mask_names)
        ]
    try:
        height, width = image.read().shape[:2]
        digest = hashlib.blake2b(image.path.read_bytes(), digest_size=16).digest() if hashes else None
    except DataError as error:
        return [*findings, Finding(kind="unreadable image", where=where, message=str(error))], None
    if use.proposals is not None:
        findings += _check_proposals(use.proposals, image.name, height, width, where)
    return findings, digest


def _check_proposals(folder: Path, name: str, height: int, width: int, where: str) -> list[Finding]:
    try:
        read_proposals(folder, name, height, width)
    except DataError as error:
        return [Finding(kind="proposals", where=where, message=str(error))]
    return []


def _check_folder(source: FileSource) -> None:
    if isinstance(source, CocoSource):
        folder = source.images
    else:
        folder = source.folder / ("img" if isinstance(source, SbdSource) else "JPEGImages")
    if not folder.is_dir():
        raise DataError(f"{folder}: is not a folder of images")


def _count_classes(pictures: Iterable[Picture], names: Sequence[str], has_masks: bool) -> tuple[ClassCount, ...]:
    images: Counter[str] = Counter()
    instances: Counter[str] = Counter()
    for picture in pictures:
        images.update(picture.tags)
        if has_masks:
            instances.update(getattr(picture, "class_names", ()))
    return tuple(
        ClassCount(name=name, images=images[name], instances=instances[name] if has_masks else None) for name in names
    )


def _uncounted_shapes(plan: Plan, data: ShapesData, step: int) -> StepSummary:
    num_images = len(plan.mask_steps(step)) * data.num_train
    return StepSummary(
        step=step,
        learns_from="masks" if plan.learns_from_masks(step) else "tags",
        source_images=num_images,
        images=num_images,
        with_old=None,
        with_later=None,
        unusable=0,
        classes=(),
    )
