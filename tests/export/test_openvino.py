"""OpenVINO's own format: it answers as the graph in ONNX Runtime, or it is not written."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino", reason="needs the extra 'openvino'")
pytest.importorskip("onnxruntime", reason="needs the extra 'cpu'")

import openvino
from bundles import SIZE, color_image, write_color_bundle
from onnx import helper, load

from cl4wsis.bundle import open_bundle
from cl4wsis.checks import Limits
from cl4wsis.errors import BackendError, BundleError
from cl4wsis_export.openvino import write_openvino


@pytest.mark.parametrize("post", ["graph", "host"])
def test_the_converted_graph_answers_like_the_graph(tmp_path: Path, post: str) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis", num_golden=2))
    folder = write_openvino(bundle, bundle.variant("float32", post), tmp_path / "ir")
    assert sorted(path.name for path in folder.iterdir()) == ["labels.txt", "model.bin", "model.xml"]
    assert (folder / "labels.txt").read_text() == "red\nblue\n"
    compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU")
    answer = compiled({"images": color_image(*SIZE)[None]})
    if post == "graph":
        assert np.unique(answer["instance_ids"]).tolist() == [0, 1, 2]
    else:
        assert answer["semantic_logits"].shape == (1, 3, *SIZE)


def test_what_the_model_is_travels_with_it(tmp_path: Path) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis"))
    folder = write_openvino(bundle, bundle.variant(), tmp_path / "ir")
    model = openvino.Core().read_model(folder / "model.xml")
    assert "blue" in str(model.get_rt_info(["cl4wsis", "classes"]).value)
    assert write_openvino(bundle, bundle.variant(), tmp_path / "ir") == folder  # replaces what it wrote itself
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis"))
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="ir: cannot be written"):
        write_openvino(bundle, bundle.variant(), tmp_path / "file" / "ir")


def test_a_model_that_answers_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion is handed another graph: one in which red and blue have changed places."""
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis", num_golden=1))
    graph = load(bundle.path_of(bundle.variant()))
    swapped = [helper.make_tensor("slot_labels", 6, [1, 4], [1, 0, 0, 0])]
    kept = [value for value in graph.graph.initializer if value.name != "slot_labels"]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend([*kept, *swapped])
    (tmp_path / "swapped.onnx").write_bytes(graph.SerializeToString())
    convert = openvino.convert_model
    monkeypatch.setattr(openvino, "convert_model", lambda path: convert(str(tmp_path / "swapped.onnx")))
    with pytest.raises(BackendError, match="names other instances than in ONNX Runtime at 100"):
        write_openvino(bundle, bundle.variant(), tmp_path / "ir")
    assert not (tmp_path / "ir").exists()
    loose = bundle.manifest.model_copy(update={"limits": {"float32": Limits(golden_pixels=None)}})
    assert write_openvino(type(bundle)(bundle.path, loose), bundle.variant(), tmp_path / "ir").is_dir()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis"))
    (tmp_path / "mine").mkdir()
    for name in ("notes.txt", "model.xml"):  # a model beside notes is no folder to replace either
        (tmp_path / "mine" / name).write_text("precious")
        with pytest.raises(BundleError, match=r"holds something else than model\.xml, model\.bin and labels\.txt"):
            write_openvino(bundle, bundle.variant(), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"
