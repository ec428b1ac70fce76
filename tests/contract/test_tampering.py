"""Bundles that were damaged, swapped or forged are refused, with a sentence that names the cause.

Each row damages a real bundle (or a lone graph) and opens it as a user would. ``reseal`` makes the manifest agree with
the files again, as someone would who forges a bundle rather than damages it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import SIZE, color_image, color_manifest, color_model, color_network, write_color_bundle

from cl4wsis.bundle import MANIFEST_FILE, MODEL_FILE, NETWORK_FILE, open_bundle, read_onnx_metadata
from cl4wsis.errors import BundleError, Cl4wsisError
from cl4wsis.steps import file_sha256
from cl4wsis_serve import Predictor

Damage = Callable[[Path], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_color_bundle(tmp_path / "colors.cl4wsis", num_golden=1)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "colors.onnx"
    onnx.save(color_model(color_manifest()), path)
    return path


def open_and_predict(path: Path, **choice: Any) -> None:
    predictor = Predictor.open(path, "onnxruntime", **choice)
    predictor.predict(color_image())


# --- ways to damage a bundle ---


def edit(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the manifest's JSON."""

    def damage(bundle: Path) -> None:
        content = json.loads((bundle / MANIFEST_FILE).read_text())
        change(content)
        (bundle / MANIFEST_FILE).write_text(json.dumps(content))

    return damage


def reseal(bundle: Path) -> None:
    """Write the hashes of the files as they are now into the manifest, wherever it holds them."""

    def agree(manifest: dict[str, Any]) -> None:
        for variant in manifest["variants"]:
            variant["source_sha256"] = manifest["files"][MODEL_FILE]
            if variant["weights_file"] is not None:
                variant["weights_sha256"] = manifest["files"][variant["weights_file"]]

    reseal_files(bundle)
    edit(agree)(bundle)


def reseal_files(bundle: Path) -> None:
    """Write the hashes of the files into their list alone."""
    edit(lambda m: m["files"].update({name: file_sha256(bundle / name) for name in m["files"]}))(bundle)


def forged(damage: Damage) -> Damage:
    """Damage files, and make the manifest agree."""

    def both(bundle: Path) -> None:
        damage(bundle)
        reseal(bundle)

    return both


def flip_byte(name: str) -> Damage:
    """Change one bit in the middle of a file."""

    def damage(bundle: Path) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(content)

    return damage


def truncate(name: str) -> Damage:
    """Cut the second half off a file."""

    def damage(bundle: Path) -> None:
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[: len(content) // 2])

    return damage


def with_model(change: Callable[[onnx.ModelProto], object], name: str = MODEL_FILE) -> Damage:
    """Change a graph and write it back."""

    def damage(bundle: Path) -> None:
        path = bundle if bundle.is_file() else bundle / name
        model = onnx.load(path)
        change(model)
        path.write_bytes(model.SerializeToString())

    return damage


def set_opset(model: onnx.ModelProto, version: int) -> None:
    model.opset_import[0].version = version


def rename_output(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["masks" if name == "instance_ids" else name for name in node.output]
    next(value for value in model.graph.output if value.name == "instance_ids").name = "masks"


def add_channel(model: onnx.ModelProto) -> None:
    """Let the network answer with a class more: the last map is given twice."""
    node = next(node for node in model.graph.node if "semantic_logits" in node.output)
    node.output[0] = "fewer"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1, 2, 2]), "channels_taken"))
    model.graph.node.append(onnx.helper.make_node("Gather", ["fewer", "channels_taken"], ["semantic_logits"], axis=1))
    output = next(value for value in model.graph.output if value.name == "semantic_logits")
    output.type.tensor_type.shape.dim[1].dim_value = 4


def use_foreign_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Explode"


def replace_file(name: str, content: bytes) -> Damage:
    return lambda bundle: (bundle / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda bundle: (bundle / name).unlink()


def make_folder(name: str) -> Damage:
    def damage(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).mkdir()

    return damage


def swap(first: str, second: str) -> Damage:
    def damage(bundle: Path) -> None:
        contents = (bundle / first).read_bytes(), (bundle / second).read_bytes()
        (bundle / second).write_bytes(contents[0])
        (bundle / first).write_bytes(contents[1])

    return damage


def forget_class(manifest: dict[str, Any]) -> None:
    manifest["classes"].pop()


def add_engine(**changes: Any) -> Callable[[dict[str, Any]], None]:
    entry = {
        "file": "engines/a.engine",
        "runtime": "tensorrt-rtx 1",
        "compute_capabilities": ["8.6"],
        "max_batch": 1,
        "graph_sha256": "0" * 64,
    }
    return lambda manifest: manifest.update(engines=[{**entry, **changes}])


def with_engine(graph: str | None = None) -> Damage:
    """Put an engine into the bundle, with its hash; built from ``model.onnx`` unless another graph is named."""

    def damage(bundle: Path) -> None:
        (bundle / "engines").mkdir()
        (bundle / "engines/a.engine").write_bytes(b"engine" * 1000)
        own = file_sha256(bundle / MODEL_FILE)
        edit(add_engine(graph_sha256=graph or own))(bundle)
        edit(lambda m: m["files"].update({"engines/a.engine": file_sha256(bundle / "engines/a.engine")}))(bundle)

    return damage


def both(*steps: Damage) -> Damage:
    """Do one after the other."""

    def damage(bundle: Path) -> None:
        for step in steps:
            step(bundle)

    return damage


DAMAGED = {
    "a changed byte": (flip_byte(MODEL_FILE), "model.onnx: is not the file that was exported"),
    "a truncated graph": (truncate(MODEL_FILE), "model.onnx: is not the file that was exported"),
    "a truncated host graph": (truncate(NETWORK_FILE), "network.onnx: is not the file that was exported"),
    "a truncated golden output": (truncate("golden/0.npz"), "golden/0.npz: is not the file that was exported"),
    "no graph": (remove(MODEL_FILE), "model.onnx is missing"),
    "no host graph": (remove(NETWORK_FILE), "network.onnx is missing"),
    "a folder for a graph": (make_folder(MODEL_FILE), "model.onnx is missing"),
    "swapped graphs": (swap(MODEL_FILE, NETWORK_FILE), "is not the file that was exported"),
    "no manifest": (remove(MANIFEST_FILE), "is no bundle"),
    "a truncated manifest": (truncate(MANIFEST_FILE), "manifest.json: is damaged"),
    "a manifest of bytes": (replace_file(MANIFEST_FILE, b"\xff\xfe\x00"), "manifest.json: is damaged"),
    "a manifest of the future": (edit(lambda m: m.update(format="cl4wsis-bundle/2")), "'cl4wsis-bundle/2'.*update"),
    "no format": (edit(lambda m: m.pop("format")), "does not state its format"),
    "an unknown field": (edit(lambda m: m.update(trust_me=True)), "trust_me"),
    "an unknown precision": (edit(lambda m: m["variants"][0].update(precision="fp4")), r"variants\.0\.precision"),
    "a path upwards": (edit(lambda m: m["files"].update({"../../x": "0"})), "'../../x' leads out of the bundle"),
    "an absolute path": (edit(lambda m: m["files"].update({"/etc/passwd": "0"})), "leads out of the bundle"),
    "a path of Windows": (edit(lambda m: m["files"].update({"..\\x": "0"})), "leads out of the bundle"),
    "a variant elsewhere": (
        edit(lambda m: m["variants"][1].update(file="../network.onnx")),
        "'../network.onnx' leads out of the bundle",
    ),
    "weights elsewhere": (
        edit(lambda m: m["variants"][1].update(weights_file="../../weights")),
        "'../../weights' leads out of the bundle",
    ),
    "a golden input elsewhere": (
        edit(lambda m: m["golden"][0].update(image="/etc/passwd")),
        "'/etc/passwd' leads out of the bundle",
    ),
    "an engine without a hash": (edit(add_engine()), r"gives no hash for engines/a\.engine"),
    "a truncated engine": (
        both(with_engine(), truncate("engines/a.engine")),
        "engines/a.engine: is not the file that was exported",
    ),
    "an engine of another graph": (with_engine(graph="ab" * 32), "engines/a.engine: was built from another graph"),
    "an engine elsewhere": (edit(add_engine(file="../a.engine")), "'../a.engine' leads out of the bundle"),
}

FORGED = {
    "a truncated graph": (forged(truncate(MODEL_FILE)), "model.onnx: onnxruntime .* cannot load it"),
    "text for a graph": (forged(replace_file(MODEL_FILE, b"hello")), "model.onnx: onnxruntime .* cannot load it"),
    "an unknown opset": (forged(with_model(lambda m: set_opset(m, 99))), "(?i)cannot load it: .*opset"),
    "an unknown operator": (forged(with_model(use_foreign_operator)), "cannot load it: .*Explode"),
    "another output": (forged(with_model(rename_output)), "the graph has no output 'instance_ids'; it has masks"),
    "the host graph in its place": (forged(swap(MODEL_FILE, NETWORK_FILE)), "the graph has no output"),
    "a class less": (edit(forget_class), r"'semantic_logits' has shape \(batch, 3, 32, 48\), but it names 1 classes"),
    "no class": (edit(lambda m: m.update(classes=[])), "classes"),
    "another input size": (
        edit(lambda m: m["input"].update(size=[64, 64])),
        r"'images' has shape \(batch, 32, 48, 3\), but its input rule says \(64, 64\)",
    ),
    "another input tensor": (
        edit(lambda m: m["inputs"][0].update(shape=["batch", 64, 96, 3])),
        r"'images' has shape \(batch, 64, 96, 3\), but its input rule says \(32, 48\)",
    ),
    "another number of slots": (
        edit(lambda m: m["grouping"].update(max_instances=5)),
        r"'labels' has shape \(batch, 4\), but max_instances is 5",
    ),
    "another type": (edit(lambda m: m["outputs"][1].update(dtype="int64")), "output 'labels' is int32"),
}

FORGED_NETWORKS = {
    "half of it": (forged(truncate(NETWORK_FILE)), "network.onnx: onnxruntime .* cannot load it"),
    "an unknown opset": (
        forged(with_model(lambda m: set_opset(m, 99), NETWORK_FILE)),
        "(?i)cannot load it: .*opset",
    ),
    "the whole graph in its place": (
        forged(swap(MODEL_FILE, NETWORK_FILE)),
        "the graph has no output 'semantic_logits'",
    ),
    "a class more than in the manifest": (
        forged(with_model(add_channel, NETWORK_FILE)),
        r"'semantic_logits'.* \(batch, 4, 32, 48\)",
    ),
    "a class less in the manifest": (edit(forget_class), "'semantic_logits' has shape .*, but it names 1 classes"),
    "no host graph in the manifest": (
        edit(lambda m: m["variants"].pop(1)),
        "holds no float32 graph with post=host, only float32 with post=graph; export the step again",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_bundle_is_not_opened(bundle: Path, name: str) -> None:
    damage, message = DAMAGED[name]
    open_and_predict(bundle)
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle)
    with pytest.raises(BundleError, match=message):
        Predictor.open(bundle)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_bundle_gives_no_answer(bundle: Path, name: str) -> None:
    damage, message = FORGED[name]
    damage(bundle)
    with pytest.raises(Cl4wsisError, match=message):
        open_and_predict(bundle, post="graph")


@pytest.mark.parametrize("name", FORGED_NETWORKS)
def test_a_forged_host_graph_gives_no_answer(bundle: Path, name: str) -> None:
    damage, message = FORGED_NETWORKS[name]
    open_and_predict(bundle, post="host")
    damage(bundle)
    with pytest.raises(Cl4wsisError, match=message):
        open_and_predict(bundle, post="host")


def test_a_bundle_without_its_engines_is_a_bundle(bundle: Path) -> None:
    """They are a cache, and whoever copies a bundle to another machine may leave them out."""
    both(with_engine(), remove("engines/a.engine"))(bundle)
    assert open_bundle(bundle).manifest.engines == ()
    open_and_predict(bundle)


@pytest.mark.parametrize("choice", [{"precision": "int8"}, {"precision": "float16", "post": "graph"}])
def test_a_variant_that_is_not_there_names_the_way_to_it(bundle: Path, choice: dict[str, str]) -> None:
    option = {"int8": "int8", "float16": "fp16"}[choice["precision"]]
    with pytest.raises(BundleError, match=f"holds no {choice['precision']} graph.*export .* --precision {option}"):
        Predictor.open(bundle, "onnxruntime", **choice)


# --- lone graphs ---


def metadata(key: str, text: str | None) -> Damage:
    """Replace or remove an entry of a graph's metadata."""

    def change(model: onnx.ModelProto) -> None:
        entries = {entry.key: entry.value for entry in model.metadata_props}
        if text is None:
            del entries[key]
        else:
            entries[key] = text
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, entries)

    return with_model(change)


LONE = {
    "no metadata": (with_model(lambda m: m.ClearField("metadata_props")), "was not exported by cl4wsis"),
    "broken JSON": (metadata("cl4wsis.classes", "[{"), "its metadata is damaged"),
    "JSON of another kind": (metadata("cl4wsis.classes", "3"), "classes"),
    "no classes": (metadata("cl4wsis.classes", "[]"), "classes"),
    "no size": (metadata("cl4wsis.input", None), "input: Field required"),
    "another format": (metadata("cl4wsis.format", '"cl4wsis-bundle/7"'), "'cl4wsis-bundle/7'"),
    "an unknown field": (metadata("cl4wsis.engine", '"/tmp/x"'), "engine"),
    "another size": (metadata("cl4wsis.input", '{"size": [8, 8], "mean": [0,0,0], "std": [1,1,1]}'), r"\(8, 8\)"),
    "an unknown opset": (with_model(lambda m: set_opset(m, 99)), "(?i)cannot load it: .*opset"),
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot be read as an ONNX graph"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64), "cannot be read as an ONNX graph"),
    "nothing": (lambda path: path.write_bytes(b""), "was not exported by cl4wsis"),
}


@pytest.mark.parametrize("name", LONE)
def test_a_damaged_lone_graph_is_refused(graph: Path, name: str) -> None:
    damage, message = LONE[name]
    open_and_predict(graph)
    damage(graph)
    with pytest.raises(Cl4wsisError, match=message):
        open_and_predict(graph)


def test_graphs_of_different_bundles_are_not_put_together(bundle: Path, tmp_path: Path) -> None:
    """The list of files was corrected, but each graph names the graph it was made from."""
    other = write_color_bundle(tmp_path / "other.cl4wsis", name="other")
    (bundle / MODEL_FILE).write_bytes((other / MODEL_FILE).read_bytes())
    reseal_files(bundle)
    with pytest.raises(BundleError, match=r"model\.onnx: belongs to another model\.onnx than the one in this bundle"):
        open_bundle(bundle)


def test_weights_of_another_bundle_are_refused(bundle: Path) -> None:
    def name_weights(manifest: dict[str, Any]) -> None:
        manifest["variants"][1] |= {"weights_file": MODEL_FILE, "weights_sha256": "0" * 64}

    edit(name_weights)(bundle)
    with pytest.raises(BundleError, match=r"network\.onnx: belongs to another model\.onnx"):
        open_bundle(bundle)


@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_a_damaged_golden_output_is_named(bundle: Path, kept: float) -> None:
    path = bundle / "golden/0.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    reseal(bundle)
    with pytest.raises(BundleError, match="is no golden output"):
        open_and_predict(bundle, self_test=True)


def test_flipped_bytes_within_a_golden_output_are_named(bundle: Path) -> None:
    path = bundle / "golden/0.npz"
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    reseal(bundle)
    with pytest.raises(BundleError, match="is no golden output"):
        open_and_predict(bundle, self_test=True)


def test_a_manifest_without_end_is_damaged(bundle: Path) -> None:
    (bundle / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(BundleError, match="is damaged"):
        open_bundle(bundle)


def test_an_unknown_precision_is_named(bundle: Path) -> None:
    with pytest.raises(BundleError, match="precision 'fp16' is unknown; expected float32, float16, int8"):
        Predictor.open(bundle, precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "..\\secret"])
def test_a_lone_graph_cannot_point_at_weights_elsewhere(bundle: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "secret").write_bytes(b"not for you")
    opened = open_bundle(bundle)
    variant = opened.variant("float32", "host").model_copy(
        update={"weights_file": place, "weights_sha256": file_sha256(tmp_path / "secret")}
    )
    folder = tmp_path / "inner"
    folder.mkdir()
    path = folder / "network.onnx"
    onnx.save(color_network(opened.manifest, variant), path)
    assert "cl4wsis.variants" in read_onnx_metadata(path)
    with pytest.raises(BundleError, match="leads out of"):
        open_bundle(path)


def test_classes_beyond_the_manifest_are_not_named_by_guess(bundle: Path) -> None:
    """A graph with more classes than its manifest says is caught by what it answers, at the latest."""

    def add_class(model: onnx.ModelProto) -> None:
        labels = next(value for value in model.graph.initializer if value.name == "slot_labels")
        labels.CopyFrom(onnx.numpy_helper.from_array(np.array([[7, 1, 0, 0]], np.int32), "slot_labels"))

    forged(with_model(add_class))(bundle)
    with pytest.raises(Cl4wsisError, match="the graph gave class 7, but the manifest has 2 classes"):
        open_and_predict(bundle, post="graph")


def test_the_original_is_opened(bundle: Path, graph: Path) -> None:
    with_engine()(bundle)
    assert open_bundle(bundle).manifest.input.size == open_bundle(graph).manifest.input.size == SIZE
    open_and_predict(bundle)
    open_and_predict(graph)
