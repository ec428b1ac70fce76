"""The bundle: written whole or not at all, and opened only if nothing was changed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from cl4wsis import folders
from cl4wsis.bundle import (
    MANIFEST_FILE,
    EngineInfo,
    GoldenCase,
    GraphInfo,
    Manifest,
    TensorInfo,
    VariantInfo,
    manifest_from_metadata,
    metadata_from_manifest,
    open_bundle,
    read_onnx_metadata,
    update_manifest,
    write_bundle,
)
from cl4wsis.errors import BundleError
from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import ClassInfo, InputRule

TRUTH = VariantInfo(file="model.onnx", precision="float32", post="graph", source_sha256=sha256(b"graph").hexdigest())
HOST = TRUTH.model_copy(
    update={
        "file": "network.onnx",
        "post": "host",
        "weights_file": "model.onnx",
        "weights_sha256": TRUTH.source_sha256,
    }
)
FILES = {"model.onnx": b"graph", "labels.txt": b"cat\nd\xc3\xb6g\n", "golden/0.png": b"png", "golden/0.npz": b"npz"}


def make_manifest(**changes: object) -> Manifest:
    fields = {
        "name": "pets-step1",
        "plan": "pets",
        "step": 1,
        "classes": (
            ClassInfo(name="cat", step_added=0, color=(1, 2, 3)),
            ClassInfo(name="dög", step_added=1, color=(4, 5, 6)),
        ),
        "input": InputRule(size=(32, 64), mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)),
        "inputs": (TensorInfo(name="images", dtype="uint8", shape=("batch", 32, 64, 3), meaning="RGB"),),
        "outputs": (TensorInfo(name="labels", dtype="int32", shape=("batch", 4), meaning="classes"),),
        "grouping": GroupingSpec(max_instances=4),
        "graph": GraphInfo(opset=18, operators={"Conv": 3}, region_rounds=6),
        "weights_sha256": "ab" * 32,
        "parent_sha256": None,
        "golden": (GoldenCase(image="golden/0.png", outputs="golden/0.npz"),),
    }
    return Manifest.model_validate({**fields, **changes})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "pets.cl4wsis", make_manifest(), FILES)


def varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low]) if value < 0x80 else bytes([low | 0x80]) + varint(value >> 7)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx_bytes(metadata: dict[str, str]) -> bytes:
    """Spell an ONNX file by hand: ir_version, producer_name, a graph, and the metadata."""
    entries = [field(14, field(1, key.encode()) + field(2, text.encode())) for key, text in metadata.items()]
    return varint(1 << 3) + varint(10) + field(2, b"somebody") + field(7, b"\x00" * 300) + b"".join(entries)


def test_a_bundle_reads_back_what_was_written(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.path_of(opened.variant()) == bundle / "model.onnx"
    assert set(opened.manifest.files) == set(FILES)
    assert opened.manifest.model_copy(update={"files": {}}) == make_manifest(variants=(TRUTH,))


def test_nothing_but_the_bundle_is_left_beside_it(bundle: Path) -> None:
    write_bundle(bundle, make_manifest(step=2), FILES)
    assert [path.name for path in bundle.parent.iterdir()] == ["pets.cl4wsis"]
    assert open_bundle(bundle).manifest.step == 2


def change_byte(bundle: Path) -> None:
    content = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(b"X" + content[1:])


def remove_golden(bundle: Path) -> None:
    (bundle / "golden/0.npz").unlink()


def edit_manifest(bundle: Path, change: Callable[[dict], None]) -> None:
    content = json.loads((bundle / MANIFEST_FILE).read_text())
    change(content)
    (bundle / MANIFEST_FILE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_byte, "model.onnx: is not the file that was exported"),
        (remove_golden, "golden/0.npz is missing"),
        (lambda b: (b / MANIFEST_FILE).unlink(), "is no bundle"),
        (lambda b: (b / MANIFEST_FILE).write_text('{"format": '), "is damaged"),
        (lambda b: (b / MANIFEST_FILE).write_text("[]"), "does not state its format"),
        (lambda b: edit_manifest(b, lambda m: m.update(format="cl4wsis-bundle/9")), "'cl4wsis-bundle/9'.*update"),
        (lambda b: edit_manifest(b, lambda m: m.update(surprise=1)), "surprise"),
        (lambda b: edit_manifest(b, lambda m: m.pop("step")), "step: Field required"),
        (lambda b: edit_manifest(b, lambda m: m["files"].pop("model.onnx")), "no hash for model.onnx"),
        (lambda b: edit_manifest(b, lambda m: m["files"].update({"../x": "0"})), "leads out of the bundle"),
        (lambda b: edit_manifest(b, lambda m: m["files"].update({"/etc/passwd": "0"})), "leads out of the bundle"),
    ],
)
def test_a_damaged_bundle_is_refused(bundle: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)


def test_an_engine_without_a_hash_is_refused(bundle: Path) -> None:
    engine = EngineInfo(
        file="engines/a.engine", runtime="x", compute_capabilities=("8.6",), max_batch=1, graph_sha256="0"
    )
    edit_manifest(bundle, lambda m: m.update(engines=[engine.model_dump(mode="json")]))
    with pytest.raises(BundleError, match=r"no hash for engines/a\.engine"):
        open_bundle(bundle)


def test_a_failed_write_leaves_the_old_bundle_and_no_traces(bundle: Path) -> None:
    with pytest.raises(TypeError):
        write_bundle(bundle, make_manifest(step=2), {**FILES, "z.txt": None})  # type: ignore[dict-item]
    assert open_bundle(bundle).manifest.step == 1
    assert [path.name for path in bundle.parent.iterdir()] == ["pets.cl4wsis"]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_bundle(tmp_path / "new.cl4wsis", make_manifest(), {**FILES, "z.txt": None})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"precious")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        write_bundle(tmp_path / "photos", make_manifest(), FILES)
    assert (tmp_path / "photos/a.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("content", ['{"manifest_version": 3}', '{"format": "zip"}', "[]", "no JSON"])
def test_manifests_of_others_make_no_bundle(tmp_path: Path, content: str) -> None:
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension/manifest.json").write_text(content)
    (tmp_path / "extension/thesis.tex").write_text("precious")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        write_bundle(tmp_path / "extension", make_manifest(), FILES)
    assert (tmp_path / "extension/thesis.tex").read_text() == "precious"


def test_ctrl_c_while_a_bundle_is_replaced_brings_the_old_one_back(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle, make_manifest(step=2), FILES)
    assert open_bundle(bundle).manifest.step == 1
    assert [path.name for path in bundle.parent.iterdir()] == ["pets.cl4wsis"]


def test_a_link_to_a_bundle_stays_a_link(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest.cl4wsis"
    link.symlink_to(bundle)
    write_bundle(link, make_manifest(step=2), FILES)
    assert link.is_symlink()
    assert open_bundle(bundle).manifest.step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.cl4wsis", "pets.cl4wsis"]


def test_a_manifest_is_changed_in_the_bundle_that_bears_the_name(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process waits for the lock, an export puts another bundle in place."""
    opened, lock = open_bundle(bundle), folders.lock_folder
    exports = [2]

    @contextmanager
    def late(folder: Path, wait: bool = False) -> Iterator[bool]:
        with lock(folder, wait) as is_held:
            if exports:
                write_bundle_elsewhere(bundle, exports.pop())
            yield is_held

    def write_bundle_elsewhere(path: Path, step: int) -> None:
        path.rename(path.with_name("before"))
        write_bundle(path.with_name("new"), make_manifest(step=step), FILES).rename(path)

    monkeypatch.setattr(folders, "lock_folder", late)
    update_manifest(opened, {"name": "renamed"})
    manifest = open_bundle(bundle).manifest
    assert (manifest.name, manifest.step) == ("renamed", 2)


def test_an_unwritable_destination_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "x.cl4wsis", make_manifest(), FILES)


def test_a_lone_graph_is_opened_by_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "alone.onnx"
    path.write_bytes(onnx_bytes({"other": "tool", **metadata_from_manifest(make_manifest())}))
    opened = open_bundle(path)
    assert opened.path_of(opened.variant()) == path
    own = TRUTH.model_copy(update={"file": "alone.onnx", "source_sha256": sha256(path.read_bytes()).hexdigest()})
    assert opened.manifest == make_manifest(golden=(), variants=(own,))
    assert opened.path_of(opened.variant()) == path
    assert opened.manifest.classes[1].name == "dög"


def test_variants_are_chosen_by_precision_and_post(tmp_path: Path) -> None:
    files = {**FILES, "network.onnx": b"network"}
    opened = open_bundle(write_bundle(tmp_path / "pets.cl4wsis", make_manifest(variants=(TRUTH, HOST)), files))
    assert opened.variant() == TRUTH
    assert opened.variant(post="host") == HOST
    assert opened.path_of(HOST).read_bytes() == b"network"
    message = "no int8 graph with post=host, only float32 with post=graph, float32 with post=host;.*--precision int8"
    with pytest.raises(BundleError, match=message):
        opened.variant("int8", "host")


def test_a_variant_without_its_file_is_refused(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "pets.cl4wsis", make_manifest(variants=(TRUTH, HOST)), FILES)
    with pytest.raises(BundleError, match=r"no hash for network\.onnx"):
        open_bundle(path)


def test_a_lone_variant_tells_what_it_is_and_wants_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "taken.onnx"
    maps = (TensorInfo(name="semantic_logits", dtype="float32", shape=("batch", 3, 2, 4), meaning="raw"),)
    path.write_bytes(onnx_bytes(metadata_from_manifest(make_manifest(maps=maps), HOST)))
    with pytest.raises(BundleError, match=r"weights lie in model\.onnx, which is missing in .*keep both files"):
        open_bundle(path)
    (tmp_path / "model.onnx").write_bytes(b"of another model")
    with pytest.raises(BundleError, match="which is another file"):
        open_bundle(path)
    (tmp_path / "model.onnx").write_bytes(FILES["model.onnx"])
    opened = open_bundle(path)
    assert opened.manifest.variants == (HOST.model_copy(update={"file": "taken.onnx"}),)
    assert opened.manifest.outputs == maps
    with pytest.raises(BundleError, match=r"no float32 graph with post=graph.*open the bundle folder"):
        opened.variant()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (onnx_bytes({"names": "{0: 'person'}"}), "was not exported by cl4wsis"),
        (onnx_bytes({"cl4wsis.format": '"cl4wsis-bundle/9"'}), "'cl4wsis-bundle/9'"),
        (onnx_bytes({"cl4wsis.format": "{"}), "metadata is damaged"),
        (onnx_bytes({"cl4wsis.format": '"cl4wsis-bundle/1"'})[:-3], "cannot be read as an ONNX graph"),
        (b"not a graph at all, but some text", "cannot be read as an ONNX graph"),
        (b"\xff" * 40, "cannot be read as an ONNX graph"),
        (b"", "was not exported by cl4wsis"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        open_bundle(path)


def test_metadata_of_a_real_graph_is_read(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    model = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(model, {"a": "1", "long": "ü" * 5000})
    onnx.save(model, tmp_path / "m.onnx")
    assert read_onnx_metadata(tmp_path / "m.onnx") == {"a": "1", "long": "ü" * 5000}


def test_metadata_round_trip() -> None:
    manifest = make_manifest(golden=(), accuracy={"all": {"ap": 0.25}})
    assert manifest_from_metadata(metadata_from_manifest(manifest), "x") == manifest


def test_a_missing_path_and_a_manifest_are_explained(bundle: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(bundle.parent / "nowhere.onnx")
    with pytest.raises(BundleError, match="give the bundle folder"):
        open_bundle(bundle / MANIFEST_FILE)
