"""Operations and bytes of small graphs, counted by hand; and the benchmark for GPUs as far as it goes without one."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cost import count_cost
from typed import CHANNELS, SIZE, TYPES, typed_model

from cl4wsis.engines import CACHE_VARIABLE

PIXELS = SIZE[0] * SIZE[1]
FLOPS = {"conv0": 2 * PIXELS * CHANNELS * 3 * 9, "conv1": 2 * PIXELS * CHANNELS * CHANNELS * 9}
HEAD = 2 * PIXELS * CHANNELS * CHANNELS
BYTES = {"float32": 4, "float16": 2, "int8": 1}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_are_counted(tmp_path: Path, precision: str, batch: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(typed_model(precision).SerializeToString())
    cost = count_cost(path, batch)
    expected = {precision: batch * sum(FLOPS.values())}
    expected["float32"] = expected.get("float32", 0) + batch * HEAD
    assert cost.flops == expected
    assert Counter(layer.precision for layer in cost.layers) == TYPES[precision]
    first, second, head = cost.layers
    size = BYTES[precision]
    assert first.moved_bytes == size * (batch * PIXELS * (3 + CHANNELS) + CHANNELS * 3 * 9)
    result = 4 if precision == "int8" else size  # the head reads what no quantiser has made small
    assert second.moved_bytes == batch * PIXELS * CHANNELS * (size + result) + size * CHANNELS * CHANNELS * 9
    assert head.moved_bytes == 4 * (2 * batch * PIXELS * CHANNELS + CHANNELS * CHANNELS)


def test_the_roofline_takes_the_slower_bound_of_each_layer(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(typed_model("float32").SerializeToString())
    cost = count_cost(path, 1)
    endless = 1e30
    assert cost.roofline_seconds({"float32": 1e9}, endless) == pytest.approx(sum(cost.flops.values()) / 1e9)
    assert cost.roofline_seconds({"float32": endless}, 1e9) == pytest.approx(cost.layer_bytes / 1e9)


@pytest.mark.slow
@pytest.mark.trt
def test_the_benchmark_for_gpus_counts_and_builds_without_one(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    script = Path(__file__).parents[1] / "bench" / "gpu.py"
    command = [sys.executable, str(script), str(bundle_path), "--dry-run", "--out", str(tmp_path / "gpu.json")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert answer.returncode == 0, answer.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    counted = result["Counted from the graphs"]
    assert [row["batch"] for row in counted] == [1, 4, 8]
    assert counted[2]["GFLOP"] == pytest.approx(8 * counted[0]["GFLOP"])
    assert counted[0]["grouping MB, unfused"] > 0
    [engine] = result["Engines"]
    assert engine["layers"].keys() == {"float32"}
    assert "onnxruntime-cuda, float32, batch 8" in answer.stdout


@pytest.mark.slow
def test_the_benchmark_for_gpus_measures_what_it_is_given(bundle_path: Path, tmp_path: Path) -> None:
    """Its measurement is tried with a backend that every machine has."""
    script = Path(__file__).parents[1] / "bench" / "gpu.py"
    peaks = ["--peak-fp32", "1", "--peak-fp16", "1", "--peak-int8", "1", "--peak-bandwidth", "100"]
    chosen = ["--backends", "onnxruntime", "--batches", "1", "2", "--rounds", "3", "--warm-up", "1"]
    command = [sys.executable, str(script), str(bundle_path), *chosen, *peaks, "--out", str(tmp_path / "gpu.json")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert answer.returncode == 0, answer.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["Measured"]
    assert [(row["backend"], row["batch"]) for row in rows] == [("onnxruntime", 1), ("onnxruntime", 2)]
    for row in rows:
        assert row["network ms"] > row["roofline ms"] > 0
        assert row["times roofline"] == pytest.approx(row["network ms"] / row["roofline ms"])
        assert row["grouping share"] < 1
