"""Plans: which classes a step adds, which data it sees and how it is trained.

Class numbers. Foreground classes are numbered from 0 in the order in which the steps add them; labels everywhere are
these numbers. Semantic channel 0 is background, so class ``c`` is semantic channel ``c + 1`` and center channel ``c``.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cl4wsis.config import Settings, build_settings, find_config, merge, parse_overrides, read_toml
from cl4wsis.errors import ConfigError
from cl4wsis.presets import apply_preset
from cl4wsis.recipe import Recipe


def class_name(text: str) -> str:
    """Return a class name in the one form in which names are compared.

    Accented letters are one character or two (Unicode NFC and NFD); macOS and some editors write the latter.
    """
    return unicodedata.normalize("NFC", text)


ClassName = Annotated[str, AfterValidator(class_name)]


class ClassSplit(Settings):
    """The classes of one step: which are old, which are new, and the channels they have."""

    step: int
    """Step number; 0 is the base step."""
    old_names: tuple[str, ...]
    """Names of the classes of all earlier steps, in order."""
    new_names: tuple[str, ...]
    """Names of the classes this step adds, in order."""

    @property
    def seen_names(self) -> tuple[str, ...]:
        """Names of all classes known after this step; the position is the label."""
        return self.old_names + self.new_names

    @property
    def num_old_classes(self) -> int:
        """Number of old foreground classes."""
        return len(self.old_names)

    @property
    def num_new_classes(self) -> int:
        """Number of new foreground classes."""
        return len(self.new_names)

    @property
    def num_classes(self) -> int:
        """Number of foreground classes after this step."""
        return len(self.old_names) + len(self.new_names)

    @property
    def semantic_old(self) -> slice:
        """Semantic channels of background and the old classes: what the previous network knows."""
        return slice(0, self.num_old_classes + 1)

    @property
    def semantic_new(self) -> slice:
        """Semantic channels of the new classes."""
        return slice(self.num_old_classes + 1, self.num_classes + 1)

    @property
    def center_old(self) -> slice:
        """Center channels (and labels) of the old classes."""
        return slice(0, self.num_old_classes)

    @property
    def center_new(self) -> slice:
        """Center channels (and labels) of the new classes."""
        return slice(self.num_old_classes, self.num_classes)


class ShapesData(Settings):
    """Drawn shapes, made in memory from a seed."""

    kind: Literal["shapes"] = "shapes"
    num_train: int = Field(480, gt=0)
    """Number of training pictures per step."""
    num_val: int = Field(120, gt=0)
    """Number of pictures for evaluation, holding the classes of all steps."""
    image_size: int = Field(128, ge=64)
    """Side of the square pictures, px."""
    seed: int = 7
    """Seed of the drawings; training and evaluation pictures never coincide."""
    proposals: Path | None = None
    """Folder of class-agnostic mask proposals for the steps that learn from tags, one JSON file per picture."""

    @property
    def proposal_folder(self) -> Path | None:
        """The folder of mask proposals."""
        return self.proposals


class CocoSource(Settings):
    """A folder of images with COCO annotations."""

    kind: Literal["coco"] = "coco"
    images: Path
    """Folder of the image files."""
    instances: Path | None = None
    """COCO instances JSON; read in step 0, for evaluation and for supervised baselines only."""
    tags: Path | None = None
    """Class names of each image: JSON ``{file: [names]}``, or CSV with a file and then its class names per line."""
    rename: dict[ClassName, ClassName] = Field(default_factory=dict)
    """Class names of this source that the plan calls otherwise: ``{theirs = "ours"}``."""


class VocSource(Settings):
    """A PASCAL VOC folder: ``JPEGImages``, ``ImageSets/Segmentation``, index masks, ``Annotations``."""

    kind: Literal["voc"] = "voc"
    folder: Path = Path()
    """The folder that holds ``JPEGImages``, such as ``VOCdevkit/VOC2012``."""
    split: str = "train"
    """List of image names: ``ImageSets/Segmentation/<split>.txt``."""
    class_masks: str = "SegmentationClass"
    """Folder of the PNG files that hold class numbers 1 to 20; 0 is background, 255 void."""
    object_masks: str = "SegmentationObject"
    """Folder of the PNG files that hold object numbers; 0 is background, 255 void."""
    tags: Path | None = None
    """Class names of each image, as for COCO; read from ``Annotations/*.xml`` when not given."""
    rename: dict[ClassName, ClassName] = Field(default_factory=dict)
    """Class names of VOC that the plan calls otherwise: ``{sofa = "couch"}``."""


class SbdSource(Settings):
    """The Semantic Boundaries Dataset: ``img``, ``cls``, ``inst`` and the lists beside them."""

    kind: Literal["sbd"] = "sbd"
    folder: Path = Path()
    """The folder that holds ``img``, usually called ``dataset``."""
    split: str = "train"
    """List of image names: ``<split>.txt``."""
    instances: Path | None = None
    """The masks as COCO JSON, category ids 1 to 20 in VOC order; read from ``inst/*.mat`` when not given."""
    tags: Path | None = None
    """Class names of each image, as for COCO; when not given, those named in ``cls/*.mat`` or in the COCO JSON."""
    rename: dict[ClassName, ClassName] = Field(default_factory=dict)
    """Class names of VOC that the plan calls otherwise."""


FileSource = CocoSource | VocSource | SbdSource
_TaggedSource = Annotated[FileSource, Field(discriminator="kind")]


class FileData(Settings):
    """Images in files. The kind is that of every source that names none itself, so sources may be mixed."""

    kind: Literal["coco", "voc", "sbd"]
    root: Path = Path()
    """Folder to which relative paths of this section refer."""
    train: _TaggedSource
    """Training images of every step that has no source of its own."""
    val: _TaggedSource
    """Images for evaluation, with instances."""
    steps: dict[int, _TaggedSource] = Field(default_factory=dict)
    """Training images of single steps, for data that arrives over time or comes from elsewhere."""
    val_lacks_classes: bool = False
    """Whether the evaluation images know only some of the plan's classes, as another data set may; what they do not
    know is not measured."""
    proposals: Path | None = None
    """Folder of class-agnostic mask proposals for the steps that learn from tags, one JSON file per image."""

    @model_validator(mode="before")
    @classmethod
    def _inherit_kind(cls, tables: Any) -> Any:
        """Give sources without a kind that of the data."""
        if not isinstance(tables, dict):
            return tables

        def completed(source: Any) -> Any:
            return {"kind": tables.get("kind"), **source} if isinstance(source, dict) else source

        filled = {name: completed(tables[name]) for name in ("train", "val") if name in tables}
        if isinstance(tables.get("steps"), dict):
            filled["steps"] = {step: completed(source) for step, source in tables["steps"].items()}
        return tables | filled

    def source(self, step: int) -> FileSource:
        """Return the training source of a step, its paths joined to the root."""
        return self._rooted(self.steps.get(step, self.train))

    @property
    def evaluation_source(self) -> FileSource:
        """The evaluation source, its paths joined to the root."""
        return self._rooted(self.val)

    @property
    def proposal_folder(self) -> Path | None:
        """The folder of mask proposals, joined to the root."""
        return None if self.proposals is None else self.root / self.proposals

    def _rooted(self, source: FileSource) -> FileSource:
        joined = {name: self.root / value for name, value in source if isinstance(value, Path)}
        return source.model_copy(update=joined)


class Plan(Settings):
    """A series of steps: classes, data and recipe. Read from TOML by :func:`load_plan`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the plan and of its run folder."""
    steps: tuple[tuple[ClassName, ...], ...] = Field(min_length=1)
    """Class names that each step adds; the first are the base classes."""
    selection: Literal["overlap", "disjoint"] = "overlap"
    """Which images belong to a step: with at least one of its classes; ``disjoint`` also excludes future classes."""
    all_seen_labels: bool = False
    """Tags of old classes are given too (ASLA), not only those of the new classes."""
    data: Annotated[ShapesData | FileData, Field(discriminator="kind")]
    """Where images and annotations come from."""
    recipe: Recipe = Recipe()
    """How the network is built and trained."""

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        names = [name for step in self.steps for name in step]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each class belongs to one step; listed more than once: {', '.join(repeated)}")
        empty = [str(step) for step, added in enumerate(self.steps) if not added]
        if empty:
            raise ValueError(f"every step must add a class; empty: step {', '.join(empty)}")
        # Otherwise the step that was meant would learn from data.train, and nobody would be told.
        unknown = sorted(set(self.data.steps) - set(range(self.num_steps))) if isinstance(self.data, FileData) else []
        if unknown:
            raise ValueError(
                f"data.steps.{unknown[0]} is for a step that the plan lacks, which has steps 0 to {self.num_steps - 1};"
                " correct the number, or add the step's classes to 'steps'"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Number of steps, the base step included."""
        return len(self.steps)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of all steps, in label order."""
        return tuple(name for step in self.steps for name in step)

    def split(self, step: int) -> ClassSplit:
        """Return the classes of a step.

        Raises:
            ConfigError: the plan has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ConfigError(f"plan '{self.name}' has steps 0 to {self.num_steps - 1}, not {step}")
        old = tuple(name for added in self.steps[:step] for name in added)
        return ClassSplit(step=step, old_names=old, new_names=self.steps[step])

    def learns_from_masks(self, step: int) -> bool:
        """Tell whether a step is trained on masks: the base step, and every step of the supervised baselines."""
        return step == 0 or self.recipe.method != "cl4wsis"

    def mask_steps(self, step: int) -> range:
        """Return the steps on whose masks a step that learns from masks is trained."""
        return range(0 if self.recipe.method == "joint" else step, step + 1)


class _RecipeTable(Settings):
    """The recipe of a plan by itself."""

    recipe: Recipe


def load_plan(path: str | Path, overrides: Iterable[str] = (), preset: str | None = None) -> Plan:
    """Read a plan.

    Args:
        path: a TOML file, or the name of a plan that comes with the package.
        overrides: assignments such as ``recipe.base.epochs=5``, applied last.
        preset: how later steps learn: the name of a preset, or its file, laid over the plan before the overrides.

    Raises:
        ConfigError: a file is missing or wrong; every problem is named with its field.
    """
    tables = read_toml(find_config(path))
    # Resolved first: whoever sets one field of a table, say the rate of an optimiser, means to keep the others.
    recipe = build_settings(_RecipeTable, {"recipe": tables.get("recipe", {})}, str(path)).recipe
    resolved = recipe.model_dump(mode="json")
    if preset is not None:
        resolved = apply_preset(resolved, preset)
    source = str(path) if preset is None else f"{path} with preset {preset}"
    return build_settings(Plan, merge({**tables, "recipe": resolved}, parse_overrides(overrides)), source)


def class_color(label: int) -> tuple[int, int, int]:
    """Return the RGB color of a class: the bit-reversed palette of PASCAL VOC, label 0 being its first foreground."""
    index, color = label + 1, [0, 0, 0]
    for shift in range(7, -1, -1):
        for channel in range(3):
            color[channel] |= ((index >> channel) & 1) << shift
        index >>= 3
    return color[0], color[1], color[2]
