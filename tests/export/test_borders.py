"""Cutting the graph at the borders of its network: the parts give the same answers as the whole."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from cl4wsis.bundle import open_bundle
from cl4wsis.errors import BundleError
from cl4wsis_export.borders import grouping_tail, join, network_graph, share_weights
from cl4wsis_export.fused import MAP_NAMES
from cl4wsis_export.graph import serialize
from cl4wsis_export.verify import open_session
from cl4wsis_train.models.network import InstanceSegmenter

FRAMES = np.random.default_rng(5).integers(0, 256, (2, 64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def whole(bundle_path: Path) -> ir.Model:
    return ir.load(str(bundle_path / "model.onnx"))


def test_the_host_graph_gives_the_maps_of_the_network(bundle_path: Path, network: InstanceSegmenter) -> None:
    ort = pytest.importorskip("onnxruntime")
    bundle = open_bundle(bundle_path)
    session = ort.InferenceSession(str(bundle.path_of(bundle.variant(post="host"))))
    found = {value.name: tuple(value.shape) for value in session.get_outputs()}
    assert found == {info.name: info.shape for info in bundle.manifest.maps}
    assert found["center_heatmap"] == ("batch", 5, 16, 24)
    with torch.inference_mode():
        expected = network(network.normalize(torch.from_numpy(FRAMES).permute(0, 3, 1, 2)))
    for array, tensor in zip(session.run(list(MAP_NAMES), {"images": FRAMES}), expected, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


def test_the_host_graph_reads_its_weights_from_the_whole_graph(bundle_path: Path, whole: ir.Model) -> None:
    plain = serialize(network_graph(whole))
    bundle = open_bundle(bundle_path)
    host = bundle.variant(post="host")
    assert bundle.path_of(host).stat().st_size < len(plain) / 4
    assert host.weights_file == "model.onnx"
    loaded = ir.load(str(bundle.path_of(host)))
    for value in network_graph(whole).graph.initializers.values():
        if value.name in loaded.graph.initializers:
            tensor = loaded.graph.initializers[value.name].const_value
            assert tensor is not None
            assert value.const_value is not None
            np.testing.assert_array_equal(tensor.numpy(), value.const_value.numpy())


def test_openvino_reads_shared_weights(bundle_path: Path, whole: ir.Model) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    core = openvino.Core()
    compiled = core.compile_model(str(bundle_path / "network.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    expected = open_session(serialize(network_graph(whole))).run(list(MAP_NAMES), {"images": FRAMES})
    answers = compiled(FRAMES)
    for name, array in zip(MAP_NAMES, expected, strict=True):
        np.testing.assert_allclose(answers[name], array, rtol=1e-3, atol=1e-3 * float(np.abs(array).max()))


def test_weights_that_differ_are_not_shared(whole: ir.Model) -> None:
    network = network_graph(whole)
    content = serialize(whole)
    name = max(network.graph.initializers, key=lambda key: network.graph.initializers[key].const_value.nbytes)
    value = network.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() + 1, name=name)
    shared = share_weights(network, content, "model.onnx")
    kept = [v.name for v in shared.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
    assert name in kept
    assert len(kept) < len(shared.graph.initializers)


def test_cut_and_joined_again_it_answers_as_before(whole: ir.Model) -> None:
    joined = join(network_graph(whole), grouping_tail(whole))
    names = [value.name for value in whole.graph.outputs]
    expected = open_session(serialize(whole)).run(names, {"images": FRAMES})
    assert expected[3].any()
    for array, again in zip(expected, open_session(serialize(joined)).run(names, {"images": FRAMES}), strict=True):
        np.testing.assert_array_equal(array, again)


def test_a_graph_without_borders_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[4] x) => (float[4] y) { y = Relu(x) }'
    )
    with pytest.raises(BundleError, match="no value semantic_logits"):
        network_graph(model)
