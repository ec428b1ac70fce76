"""Which backend, precision and placement of the grouping are chosen, and that nothing is given up in silence."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from bundles import SIZE, color_image, write_color_bundle

from cl4wsis.bundle import MANIFEST_FILE, open_bundle, update_manifest
from cl4wsis.cores import usable_cores
from cl4wsis.errors import BackendError, BundleError
from cl4wsis.steps import file_sha256
from cl4wsis_serve import BACKENDS, Predictor, backend_status
from cl4wsis_serve.backends import BackendEntry, device_of
from cl4wsis_serve.backends.base import BackendRequest

ONLY = {"onnxruntime": BACKENDS["onnxruntime"]}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_color_bundle(tmp_path / "colors.cl4wsis", num_golden=1)


def pretend(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, reason: str | None, failure: str | None = None
) -> None:
    """Put a backend before the one of ONNX Runtime: one that is unavailable, or one that fails when it is opened."""

    def open_backend(request: BackendRequest) -> object:
        raise BackendError(failure)

    module = ModuleType(f"pretended_{name}")
    module.why_unavailable = lambda asked: reason  # type: ignore[attr-defined]
    module.open_backend = open_backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    table = {name: BackendEntry(module.__name__, device), **ONLY}  # type: ignore[arg-type]
    for owner in ("cl4wsis_serve.backends", "cl4wsis_serve.selection"):
        monkeypatch.setattr(sys.modules[owner], "BACKENDS", table)


def test_table_knows_every_name_and_where_it_runs() -> None:
    assert {"onnxruntime", "onnxruntime-cuda", "openvino"} <= set(BACKENDS)
    assert device_of("onnxruntime") == device_of("openvino") == "cpu"
    assert device_of("onnxruntime-cuda") == "cuda"


def test_status_covers_every_backend() -> None:
    status = backend_status()
    assert tuple(status) == tuple(BACKENDS)
    assert status["onnxruntime"] is None
    assert all(reason is None or len(reason) > 10 for reason in status.values())


def test_unknown_backend_lists_the_known(bundle: Path) -> None:
    for allow_fallback in (False, True):
        with pytest.raises(BackendError, match=r"unknown backend 'tensorflow'; known: auto, .*onnxruntime"):
            Predictor.open(bundle, backend="tensorflow", allow_fallback=allow_fallback)


def test_auto_records_why_others_were_skipped(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "quick", "cuda", "there is no GPU here")
    predictor = Predictor.open(bundle)
    assert predictor.backend.name == "onnxruntime"
    assert predictor.skipped == {"quick": "there is no GPU here"}


def test_auto_groups_on_the_host_where_a_cpu_would_group(bundle: Path) -> None:
    predictor = Predictor.open(bundle, "onnxruntime")
    assert (predictor.backend.device, predictor.precision, predictor.post) == ("cpu", "float32", "host")
    assert predictor.skipped == {}


def test_lone_graphs_are_taken_as_they_are(bundle: Path, tmp_path: Path) -> None:
    for name, post in (("model.onnx", "graph"), ("network.onnx", "host")):
        lone = tmp_path / name
        lone.write_bytes((bundle / name).read_bytes())
        predictor = Predictor.open(lone, "onnxruntime")
        assert predictor.post == post
        assert len(predictor.predict(color_image())) == 2
        if post == "graph":
            assert "holds no float32 graph with post=host" in predictor.skipped["post=host"]


def test_both_placements_give_the_same_instances(bundle: Path) -> None:
    image = color_image(*SIZE)
    graph, host = (Predictor.open(bundle, "onnxruntime", post=post).predict(image) for post in ("graph", "host"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(graph.instance_ids, host.instance_ids)
    np.testing.assert_array_equal(graph.labels, host.labels)
    np.testing.assert_allclose(graph.scores, host.scores, atol=1e-5)


def test_precision_that_the_bundle_lacks_names_the_export(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"holds no int8 graph.*--precision int8"):
        Predictor.open(bundle, precision="int8")


def test_backend_asked_for_by_name_is_never_replaced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, failure in (("no such wheel", None), (None, "its library is broken")):
        pretend(monkeypatch, "quick", "cpu", reason, failure)
        with pytest.raises(BackendError, match=reason or failure):
            Predictor.open(bundle, backend="quick")


@pytest.mark.parametrize(("reason", "failure"), [("no such wheel", None), (None, "its library is broken")])
def test_fallback_that_is_allowed_is_told(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str | None,
    failure: str | None,
) -> None:
    pretend(monkeypatch, "quick", "cuda", reason, failure)
    with caplog.at_level(logging.WARNING):
        predictor = Predictor.open(bundle, backend="quick", allow_fallback=True)
    assert predictor.backend.name == "onnxruntime"
    assert predictor.skipped["quick"] == (reason or failure)
    assert "quick cannot be used, falling back" in caplog.text


def test_gpu_that_does_not_work_is_an_error_in_auto_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "quick", "cuda", None, "the driver is too old")
    with pytest.raises(BackendError, match=r"does not work: the driver is too old.*--allow-fallback"):
        Predictor.open(bundle)
    predictor = Predictor.open(bundle, allow_fallback=True)
    assert predictor.skipped == {"quick": "the driver is too old"}


def test_cpu_backend_that_does_not_work_leaves_the_next_one_on_the_same_cpu(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "quick", "cpu", None, "operator Foo is unknown")
    predictor = Predictor.open(bundle)
    assert predictor.backend.name == "onnxruntime"
    assert predictor.skipped == {"quick": "operator Foo is unknown"}


def test_no_backend_at_all_lists_every_reason(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "quick", "cpu", "no such wheel")
    table = sys.modules["cl4wsis_serve.selection"].BACKENDS
    monkeypatch.delitem(table, "onnxruntime")
    with pytest.raises(BackendError, match=r"no backend can run this model here\. quick: no such wheel"):
        Predictor.open(bundle)


def damage_golden(bundle: Path) -> None:
    """Move the golden instances, and make the manifest agree with the file."""
    path = bundle / "golden" / "0.npz"
    with np.load(path) as arrays:
        content = dict(arrays)
    content["instance_ids"] = np.roll(content["instance_ids"], 9, axis=1)
    np.savez_compressed(path, **content)
    manifest = (bundle / MANIFEST_FILE).read_text()
    old: str = json.loads(manifest)["files"]["golden/0.npz"]
    (bundle / MANIFEST_FILE).write_text(manifest.replace(old, file_sha256(path)))


@pytest.mark.parametrize("post", ["graph", "host"])
def test_self_test_runs_before_the_first_answer(bundle: Path, post: str) -> None:
    assert Predictor.open(bundle, "onnxruntime", post=post, self_test=True).post == post  # type: ignore[arg-type]
    damage_golden(bundle)
    with pytest.raises(BackendError, match="self-test of float32 on onnxruntime"):
        Predictor.open(bundle, "onnxruntime", post=post, self_test=True)  # type: ignore[arg-type]


def test_at_least_one_core_is_usable() -> None:
    assert usable_cores() >= 1


def test_a_graph_whose_weights_are_links_is_passed_over_with_the_way_out(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    truth, host = opened.manifest.variants
    host = host.model_copy(update={"weights_file": truth.file, "weights_sha256": truth.source_sha256})
    update_manifest(opened, {"variants": (truth, host)})
    assert Predictor.open(bundle, "onnxruntime").post == "host"
    store = tmp_path / "store"
    store.mkdir()
    (bundle / truth.file).rename(store / "blob")
    (bundle / truth.file).symlink_to(store / "blob")
    predictor = Predictor.open(bundle, "onnxruntime")
    assert predictor.post == "graph"
    assert "is a link to another folder" in predictor.skipped["post=host"]
    with pytest.raises(BackendError, match=r"cp -rL\), or choose --post graph"):
        Predictor.open(bundle, "onnxruntime", post="host")
