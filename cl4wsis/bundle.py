"""The bundle: what export writes and every runtime reads.

``<name>.cl4wsis/`` holds ``manifest.json``, ``model.onnx`` (the truth), ``labels.txt``, ``card.md``, ``golden/``
(inputs with the outputs expected for them) and, as a cache, ``engines/``. The manifest lists the SHA-256 of every other
file. A folder is complete when it has its final name: it is written under a temporary one and renamed.

Variants of ``model.onnx`` differ in two things: the arithmetic of the network (``precision``), and whether the grouping
is part of the graph (``post`` is ``graph``: images to instances) or left to the runtime (``host``: images to the three
raw maps of the network). ``network.onnx`` is the host variant of ``model.onnx``; a host variant keeps its weights in
the file of the graph variant of its precision.

``model.onnx`` also works by itself: what a runtime needs to know stands in its metadata, one JSON text per field of the
manifest under keys that begin with ``cl4wsis.``. So does every other variant, beside the file that holds its weights.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from cl4wsis.checks import DEFAULT_LIMITS, Agreement, Limits, VariantCheck
from cl4wsis.config import Settings
from cl4wsis.errors import BundleError
from cl4wsis.folders import lock_by_name, replaced_folder
from cl4wsis.grouping import GroupingSpec
from cl4wsis.protobuf import length_delimited
from cl4wsis.steps import ClassInfo, InputRule, file_sha256, write_text_atomically

FORMAT: Literal["cl4wsis-bundle/1"] = "cl4wsis-bundle/1"
_FORMAT_NAME = FORMAT.partition("/")[0] + "/"
SUFFIX = ".cl4wsis"
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
NETWORK_FILE = "network.onnx"
LABELS_FILE = "labels.txt"
CARD_FILE = "card.md"

Precision = Literal["float32", "float16", "int8"]
"""Arithmetic of the network; the grouping is float32 always."""
Post = Literal["graph", "host"]
"""Where the grouping runs: within the graph, or in the runtime."""
PRECISION_OPTIONS: Mapping[Precision, str] = {"float32": "fp32", "float16": "fp16", "int8": "int8"}
"""Precisions as the command line spells them."""

Changes = Mapping[str, Any]
"""New values of a manifest's fields."""

_METADATA_PREFIX = "cl4wsis."
_METADATA_FIELD = 14  # of ModelProto in onnx.proto


class TensorInfo(Settings):
    """An input or output of the graph."""

    name: str
    dtype: str
    """As NumPy spells it."""
    shape: tuple[str | int, ...]
    """Numbers where fixed; ``batch`` where free."""
    meaning: str


class GraphInfo(Settings):
    """What the graph is made of."""

    opset: int
    operators: dict[str, int]
    """Number of nodes of each operator."""
    precision: Literal["float32"] = "float32"
    """Arithmetic of ``model.onnx``; that of other graphs stands in :class:`VariantInfo`."""
    region_rounds: int
    """Rounds of the region labelling (see the export package); more are needed for more intricate shapes."""


class Verification(Settings):
    """How the graph was checked before it was packed."""

    images: int
    """Number of images compared."""
    batch_sizes: tuple[int, ...]
    """Batch sizes at which every image had the same ids."""
    differing_pixels: float
    """Largest share of an image's pixels whose id differs between torch and ONNX Runtime."""
    score_error: float
    """Largest difference of a score between torch and ONNX Runtime."""
    instances: int
    """Instances that the reference found on the images."""
    matched: float
    """Share of them that the graph finds with the same class and a mask IoU above 0.99; 1 if there are none."""
    unconverged: int
    """Images whose regions were not finished after the fixed number of rounds."""
    runtimes: dict[str, str]
    """Versions of what was compared."""


def _check_path(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"'{name}' leads out of the bundle")
    return name


PathInBundle = Annotated[str, AfterValidator(_check_path)]
"""Path of a file relative to the bundle's folder, with ``/``."""


class VariantInfo(Settings):
    """One graph of a bundle."""

    file: PathInBundle
    """Path within the bundle."""
    precision: Precision
    post: Post
    """``graph``: images to the instance outputs; ``host``: images to :attr:`Manifest.maps`."""
    source_sha256: str
    """SHA-256 of the ``model.onnx`` it was made from; its own if it is that file."""
    calibration: tuple[str, ...] = ()
    """SHA-256 of the pixels of each calibration image, as given to the graph; for ``int8`` alone."""
    weights_file: PathInBundle | None = None
    """File beside it that holds its weights; none if it holds them itself."""
    weights_sha256: str | None = None
    """SHA-256 of that file."""
    types: dict[str, int] = Field(default_factory=dict)
    """Number of layers with weights by their arithmetic; an engine built from the graph must have the same."""
    agreement: Agreement | None = None
    """How its answers agreed with those of ``model.onnx`` before it was packed; none for that file itself."""


class GoldenCase(Settings):
    """An input of the graph with the output expected for it."""

    image: PathInBundle
    """PNG file of the network's input size, RGB."""
    outputs: PathInBundle
    """NPZ file, one array per output of the graph, without the batch axis."""


HardwareLevel = Literal["none", "same-compute-capability", "ampere-plus"]
"""On which GPUs beside the one it was built on a TensorRT engine shall run."""


class EngineInfo(Settings):
    """An engine built from one of the graphs; a cache, only of use where it fits."""

    file: PathInBundle
    runtime: str
    """``tensorrt`` or ``tensorrt-rtx``, with its version."""
    compute_capabilities: tuple[str, ...]
    """GPUs it was built for, such as ``8.6``."""
    min_batch: int = 1
    """Smallest batch it accepts."""
    opt_batch: int = 1
    """Batch for which its kernels were chosen."""
    max_batch: int
    """Largest batch it accepts."""
    graph_sha256: str
    """The graph it was built from."""
    gpu: str | None = None
    """Name of the GPU it was built on; none if it was built without one."""
    driver: str | None = None
    """Driver of that GPU."""
    platform: str = ""
    """Operating system and processor of the machine it was built on, such as ``linux-x86_64``."""
    hardware_level: HardwareLevel = "none"
    version_compatible: bool = False
    """Whether later versions of TensorRT accept it too."""
    refittable: bool = False
    """Whether other weights can be put into it."""
    workspace_mib: int | None = None
    """Limit of the memory of a layer while it was built, MiB."""
    types: dict[str, int] = Field(default_factory=dict)
    """Layers with weights by the arithmetic that was read back from it."""


class Manifest(Settings):
    """Everything about a bundle but its files' contents."""

    format: Literal["cl4wsis-bundle/1"] = FORMAT
    name: str
    plan: str
    """Name of the plan it was trained by."""
    step: int
    classes: tuple[ClassInfo, ...] = Field(min_length=1)
    """All classes of the model, in label order."""
    input: InputRule
    """Images are fitted into ``size``, padded with the mean and given as uint8 RGB; the graph normalises."""
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    grouping: GroupingSpec
    """Post-processing that the graph contains."""
    maps: tuple[TensorInfo, ...] = ()
    """Outputs of the variants with ``post`` ``host``: what the network says, before any enlargement."""
    variants: tuple[VariantInfo, ...] = ()
    """Graphs of the bundle; an opened bundle has at least the one of ``model.onnx``."""
    graph: GraphInfo
    weights_sha256: str
    """Weights of the step it was exported from."""
    parent_sha256: str | None
    """Weights of the step that one was trained from; none for step 0."""
    accuracy: dict[str, Any] = Field(default_factory=dict)
    """Evaluation after training, as written into the step."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Where the weights come from: the plan as resolved, and seconds of each phase."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what trained and exported it."""
    created: str = ""
    """Time of export, ISO 8601, UTC."""
    verification: Verification | None = None
    """Result of the check before packing; a graph taken out of its bundle has none."""
    limits: dict[Precision, Limits] = Field(default_factory=dict)
    """How far variants may be from ``model.onnx``; the defaults of ``cl4wsis.checks`` where it says nothing."""
    checks: tuple[VariantCheck, ...] = ()
    """Results of ``cl4wsis verify``, on whatever machines it was run."""
    golden: tuple[GoldenCase, ...] = ()
    engines: tuple[EngineInfo, ...] = ()
    files: dict[PathInBundle, str] = Field(default_factory=dict)
    """SHA-256 of every file of the bundle but the manifest, by path within it."""

    @property
    def label_lines(self) -> str:
        """Contents of ``labels.txt``: the name of each class on a line of its own, in label order."""
        return "".join(f"{info.name}\n" for info in self.classes)

    def limits_of(self, precision: Precision) -> Limits:
        """Return what variants of a precision must keep to: what is stated, or the defaults of the precision."""
        return self.limits.get(precision, DEFAULT_LIMITS[precision])


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, every file of which was found unchanged.

    Attributes:
        path: the folder, or the lone ``.onnx`` file.
        manifest: what it says about itself.
    """

    path: Path
    manifest: Manifest

    def variant(self, precision: Precision = "float32", post: Post = "graph") -> VariantInfo:
        """Choose one of the graphs.

        Raises:
            BundleError: the bundle does not hold it; the message says which it holds and how to get the other.
        """
        for variant in self.manifest.variants:
            if (variant.precision, variant.post) == (precision, post):
                return variant
        if precision not in PRECISION_OPTIONS:
            raise BundleError(f"precision {precision!r} is unknown; expected {', '.join(PRECISION_OPTIONS)}")
        held = ", ".join(f"{variant.precision} with post={variant.post}" for variant in self.manifest.variants)
        way_out = (
            "open the bundle folder it was taken from"
            if self.path.is_file()
            else f"export the step again with --precision {PRECISION_OPTIONS[precision]}"
        )
        raise BundleError(f"{self.path}: holds no {precision} graph with post={post}, only {held}; {way_out}")

    def path_of(self, variant: VariantInfo) -> Path:
        """Return the file of a graph."""
        return self.path if self.path.is_file() else self.path / variant.file

    def link_in_the_way(self, variant: VariantInfo) -> str | None:
        """Say why runtimes would not read the weights of a graph: they refuse those of another folder, links too."""
        if variant.weights_file is None:
            return None
        graph = self.path_of(variant)
        for path in (graph, graph.parent / variant.weights_file):
            if path.resolve().parent != graph.parent.resolve():
                return f"{path} is a link to another folder, where runtimes read no weights; copy the files (cp -rL)"
        return None


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle folder, or an ``.onnx`` file that was exported by cl4wsis.

    Raises:
        BundleError: there is no such bundle; it was not written by cl4wsis or by a newer version; a file is missing or
            is not the one that was exported.
    """
    path = Path(path)
    if path.is_dir():
        bundle = Bundle(path, _without_lost_engines(path, _read_manifest(path)))
        _check_files(bundle)
        if bundle.manifest.variants:
            return bundle
        only = _truth(MODEL_FILE, bundle.manifest.files[MODEL_FILE])
        return Bundle(path, bundle.manifest.model_copy(update={"variants": (only,)}))
    if not path.exists():
        raise BundleError(f"{path}: does not exist; give a bundle folder or an .onnx file written by 'cl4wsis export'")
    if path.name == MANIFEST_FILE:
        raise BundleError(f"{path}: give the bundle folder {path.parent}, not its manifest")
    return _open_lone_graph(path)


def metadata_from_manifest(manifest: Manifest, variant: VariantInfo | None = None) -> dict[str, str]:
    """Return the texts to store in the metadata of a graph: all of the manifest but what is known only afterwards.

    Args:
        manifest: of the bundle.
        variant: the graph; none for ``model.onnx``, which cannot hold its own hash.
    """
    own = {"variants": () if variant is None else (variant,)}
    if variant is not None and variant.post == "host":
        own |= {"outputs": manifest.maps}  # type: ignore[dict-item]
    left_out = {"verification", "checks", "golden", "engines", "files"} | ({"variants"} if variant is None else set())
    content = manifest.model_copy(update=own).model_dump(mode="json", exclude=left_out)
    return {f"{_METADATA_PREFIX}{key}": json.dumps(value, ensure_ascii=False) for key, value in content.items()}


def manifest_from_metadata(metadata: Mapping[str, str], source: str) -> Manifest:
    """Read the manifest out of the metadata of a graph.

    Args:
        metadata: keys and texts as stored in an ONNX file.
        source: name of the file, for messages.

    Raises:
        BundleError: the graph was not exported by cl4wsis, or by another version.
    """
    texts = {
        key.removeprefix(_METADATA_PREFIX): text for key, text in metadata.items() if key.startswith(_METADATA_PREFIX)
    }
    if not texts:
        raise BundleError(f"{source}: was not exported by cl4wsis (its metadata says nothing about classes)")
    try:
        content = {key: json.loads(text) for key, text in texts.items()}
    except json.JSONDecodeError as error:
        raise BundleError(f"{source}: its metadata is damaged ({error}); export the step again") from error
    return _build_manifest(content, source)


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of an ONNX file without any runtime, by walking its outermost protobuf fields.

    Raises:
        BundleError: the file cannot be read or is no ONNX graph.
    """
    metadata: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for field, length in length_delimited(file, size):
                if field == _METADATA_FIELD:
                    entry = {number: file.read(n).decode("utf-8") for number, n in length_delimited(file, length)}
                    metadata[entry.get(1, "")] = entry.get(2, "")  # StringStringEntryProto: key = 1, value = 2
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as an ONNX graph ({error})") from error
    return metadata


def write_bundle(destination: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Path:
    """Write a bundle folder; readers see the old bundle, or the new one complete, never half of it.

    Args:
        destination: final name of the folder. A bundle that is there already is replaced when the new one is complete.
        manifest: its ``files`` are filled in here.
        files: contents by path within the bundle.

    Returns:
        The destination.

    Raises:
        BundleError: the destination exists and is no bundle, or cannot be written.
    """
    check_destination(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replaced_folder(destination) as folder:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            hashes = {name: file_sha256(folder / name) for name in sorted(files)}
            complete = Manifest.model_validate({**manifest.model_dump(), "files": hashes})
            (folder / MANIFEST_FILE).write_text(_manifest_text(complete), encoding="utf-8")
    except OSError as error:
        raise BundleError(f"{destination}: cannot be written: {error.strerror or error}") from error
    return destination


def check_destination(destination: Path) -> None:
    """Check that a bundle may be written here: the place is free, or holds another bundle.

    Raises:
        BundleError: something else is there.
    """
    if destination.exists() and not is_bundle(destination):
        raise BundleError(f"{destination}: exists and is no bundle; move it away or choose another name with --out")


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder is a bundle, of whatever version; others may have a ``manifest.json`` too."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("format")).startswith(_FORMAT_NAME)


def update_manifest(bundle: Bundle, changes: Changes | Callable[[Manifest], Changes]) -> None:
    """Change fields of a bundle's manifest; readers see the old manifest or the new one, never half of it.

    Processes take turns, so that what one adds to a field is not lost to another, where changes are made of what stands
    in the file.

    Args:
        bundle: an opened bundle folder.
        changes: new values by field, or what makes them of the manifest in the file; other fields stay as they are.

    Raises:
        BundleError: the bundle is a lone graph, its manifest cannot be read or written, or a value is impossible.
    """
    if not bundle.path.is_dir():
        raise BundleError(f"{bundle.path}: is a graph by itself and has no manifest; open the bundle folder")
    path = bundle.path / MANIFEST_FILE
    with lock_by_name(bundle.path):
        current = _read_manifest(bundle.path)
        values = changes(current) if callable(changes) else changes
        changed = _build_manifest({**current.model_dump(), **values}, str(path))
        try:
            write_text_atomically(path, _manifest_text(changed))
        except OSError as error:
            raise BundleError(f"{path}: cannot be written: {error.strerror or error}") from error


def _manifest_text(manifest: Manifest) -> str:
    return json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleError(f"{folder}: is no bundle ({MANIFEST_FILE} is missing)") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is damaged ({error}); export the step again") from error
    return _build_manifest(content, str(path))


def _without_lost_engines(folder: Path, manifest: Manifest) -> Manifest:
    """Forget engines that are not there: they are a cache, left out by whoever copies a bundle to another machine."""
    listed = {engine.file for engine in manifest.engines} & manifest.files.keys()
    lost = {file for file in listed if not (folder / file).is_file()}
    kept = tuple(engine for engine in manifest.engines if engine.file not in lost)
    files = {name: digest for name, digest in manifest.files.items() if name not in lost}
    return manifest.model_copy(update={"engines": kept, "files": files}) if lost else manifest


def _build_manifest(content: Any, source: str) -> Manifest:
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        kind = f"has format {found!r}" if isinstance(found, str) else "does not state its format"
        raise BundleError(
            f"{source}: {kind}, this version of cl4wsis reads '{FORMAT}'; "
            "update cl4wsis, or export the step again with this version"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        is_newer = first["type"] == "extra_forbidden"
        way_out = "update cl4wsis, or export the step again with this version" if is_newer else "export the step again"
        raise BundleError(f"{source}: cannot be understood: {where}: {first['msg']}; {way_out}") from error
    _check_sizes(manifest, source)
    return manifest


def _check_sizes(manifest: Manifest, source: str) -> None:
    """Check that tensors have the sizes that input rule, grouping and classes ask for."""
    size, classes = manifest.input.size, len(manifest.classes)
    expected: dict[str, tuple[dict[int, int], str]] = {
        "images": ({1: size[0], 2: size[1]}, f"its input rule says {size} (height, width)"),
        "instance_ids": ({1: size[0], 2: size[1]}, f"its input rule says {size} (height, width)"),
        "labels": ({1: manifest.grouping.max_instances}, f"max_instances is {manifest.grouping.max_instances}"),
        "semantic_logits": ({1: classes + 1}, f"it names {classes} classes"),
        "center_heatmap": ({1: classes}, f"it names {classes} classes"),
    }
    for tensor in (*manifest.inputs, *manifest.outputs, *manifest.maps):
        sides, reason = expected.get(tensor.name, ({}, ""))
        if any(axis < len(tensor.shape) and tensor.shape[axis] != side for axis, side in sides.items()):
            shape = ", ".join(str(side) for side in tensor.shape)
            raise BundleError(f"{source}: '{tensor.name}' has shape ({shape}), but {reason}; export the step again")


def _open_lone_graph(path: Path) -> Bundle:
    manifest = manifest_from_metadata(read_onnx_metadata(path), str(path))
    if len(manifest.variants) > 1:
        raise BundleError(f"{path}: its metadata describes {len(manifest.variants)} graphs instead of itself")
    if not manifest.variants:
        own = _truth(path.name, file_sha256(path))
    else:
        own = manifest.variants[0].model_copy(update={"file": path.name})
        _check_weights(path, own)
    return Bundle(path, manifest.model_copy(update={"variants": (own,)}))


def _truth(file: str, digest: str) -> VariantInfo:
    return VariantInfo(file=file, precision="float32", post="graph", source_sha256=digest)


def _check_weights(path: Path, variant: VariantInfo) -> None:
    """Check that the file with the weights of a lone graph lies beside it."""
    if variant.weights_file is None:
        return
    weights = path.parent / variant.weights_file
    if not weights.is_file() or file_sha256(weights) != variant.weights_sha256:
        found = "is another file" if weights.is_file() else "is missing"
        raise BundleError(
            f"{path}: its weights lie in {variant.weights_file}, which {found} in {path.parent}; "
            "open the bundle folder, or keep both files of one bundle together"
        )


def _check_files(bundle: Bundle) -> None:
    files = bundle.manifest.files
    used = {MODEL_FILE, *(engine.file for engine in bundle.manifest.engines)}
    used |= {variant.file for variant in bundle.manifest.variants}
    used |= {variant.weights_file for variant in bundle.manifest.variants if variant.weights_file is not None}
    used |= {name for case in bundle.manifest.golden for name in (case.image, case.outputs)}
    unlisted = sorted(used - files.keys())
    if unlisted:
        raise BundleError(f"{bundle.path / MANIFEST_FILE}: gives no hash for {', '.join(unlisted)}; export again")
    for name, expected in files.items():
        path = bundle.path / name
        if not path.is_file():
            raise BundleError(f"{bundle.path}: {name} is missing; copy the bundle again or export the step again")
        if file_sha256(path) != expected:
            raise BundleError(
                f"{path}: is not the file that was exported (its SHA-256 differs from the manifest); "
                "copy the bundle again or export the step again"
            )
    for variant in bundle.manifest.variants:
        used_with: dict[str, str | None] = {MODEL_FILE: variant.source_sha256}
        if variant.weights_file is not None:
            used_with[variant.weights_file] = variant.weights_sha256
        for name, needed in used_with.items():
            if files[name] != needed:
                raise BundleError(
                    f"{bundle.path / variant.file}: belongs to another {name} than the one in this bundle; "
                    "copy the bundle again or export the step again"
                )
    graphs = {files[name] for name in (MODEL_FILE, *(variant.file for variant in bundle.manifest.variants))}
    for engine in bundle.manifest.engines:
        if engine.graph_sha256 not in graphs:
            raise BundleError(
                f"{bundle.path / engine.file}: was built from another graph than those of this bundle; "
                "build it again from this bundle"
            )
