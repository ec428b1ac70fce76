"""Biases that take back what rounded weights shift."""

import numpy as np
import onnx
import onnx_ir as ir

from cl4wsis_export.bias_correction import correct_biases
from cl4wsis_export.graph import serialize
from cl4wsis_export.verify import open_session

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
SCALES = np.full(4, 0.5, np.float32)  # so coarse that much is lost
FRAMES = RNG.integers(0, 128, (6, 8, 8, 3), dtype=np.uint8)


def graph(lines: str, arrays: dict[str, np.ndarray]) -> ir.Model:
    """Return a graph of one convolution, ``y``, named ``layer``, after the lines that make its inputs."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]> agraph (uint8[n, 8, 8, 3] images) => (float[n, 4, 8, 8] y) {{
            pixels = Cast <to = 1> (images)
            planes = Transpose <perm = [0, 3, 1, 2]> (pixels)
            {lines}
        }}"""
    )
    model.graph.node[-1].name = "layer"
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(model)


def rounded(with_bias: bool) -> ir.Model:
    """Return the graph in int8; pixels up to 127 lose nothing."""
    arrays = {
        "one": np.float32(1),
        "zero": np.int8(0),
        "integers": np.round(WEIGHT / SCALES[0]).astype(np.int8),
        "scales": SCALES,
        "zeros": np.zeros(4, np.int8),
        "bias": np.arange(4, dtype=np.float32),
    }
    return graph(
        f"""whole = QuantizeLinear (planes, one, zero)
            data = DequantizeLinear (whole, one, zero)
            weights = DequantizeLinear <axis = 0> (integers, scales, zeros)
            y = Conv <pads = [1, 1, 1, 1]> (data, weights{", bias" if with_bias else ""})""",
        arrays,
    )


def means(model: ir.Model) -> np.ndarray:
    (answer,) = open_session(serialize(model)).run(None, {"images": FRAMES})
    return np.asarray(answer).mean(axis=(0, 2, 3))


def test_means_are_those_of_the_exact_weights() -> None:
    for bias in (False, True):
        exact = graph(
            f"y = Conv <pads = [1, 1, 1, 1]> (planes, weight{', bias' if bias else ''})",
            {"weight": WEIGHT, "bias": np.arange(4, dtype=np.float32)},
        )
        quantized = rounded(bias)
        assert np.abs(means(quantized) - means(exact)).min() > 1
        correct_biases(exact, quantized, FRAMES)
        np.testing.assert_allclose(means(quantized), means(exact), rtol=1e-4, atol=1e-3)


def test_layers_that_are_not_int8_keep_their_biases() -> None:
    lines = "y = Conv <pads = [1, 1, 1, 1]> (planes, weight, bias)"
    arrays = {"weight": WEIGHT, "bias": np.arange(4, dtype=np.float32)}
    model = graph(lines, arrays)
    correct_biases(graph(lines, {**arrays, "weight": WEIGHT + 1}), model, FRAMES)
    assert serialize(model) == serialize(graph(lines, arrays))
