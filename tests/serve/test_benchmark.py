"""The benchmark's structure: what is measured, in which turns, and how it is written. No test looks at the clock."""

import json
import os
from pathlib import Path

import pytest
from bundles import color_image, write_color_bundle

from cl4wsis.bundle import open_bundle
from cl4wsis.errors import BackendError
from cl4wsis.images import write_png
from cl4wsis_serve import Predictor
from cl4wsis_serve.benchmark import (
    STAGES,
    BenchmarkReport,
    benchmark_bundle,
    describe_hardware,
    markdown_from_report,
    time_stages,
)
from cl4wsis_serve.verify import Choice, Skipped

GRAPH = Choice("float32", "graph", "onnxruntime")
HOST = Choice("float32", "host", "onnxruntime")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_color_bundle(tmp_path / "colors.cl4wsis", num_golden=2)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, image in enumerate(paths):
        write_png(image, color_image(64 + number, 96))
    return paths


@pytest.mark.parametrize("post", ["graph", "host"])
def test_stages_add_up_to_the_total(path: Path, images: list[Path], post: str) -> None:
    predictor = Predictor.open(path, "onnxruntime", post=post, threads=1)
    backend = predictor.backend
    times = dict(zip(STAGES, time_stages(predictor, [str(image) for image in images]), strict=True))
    assert all(value >= 0 for value in times.values())
    assert sum(times[stage] for stage in STAGES[:-1]) == pytest.approx(times["total"])
    assert times["network"] > 0
    assert predictor.backend is backend


def test_a_run_measures_every_choice_and_batch_size(path: Path, images: list[Path]) -> None:
    calls: list[tuple[int, int]] = []
    missing = Choice("int8", "graph", "onnxruntime")
    report = benchmark_bundle(
        open_bundle(path),
        images,
        "2 images",
        [GRAPH, HOST, missing],
        batches=(2, 1, 2),
        rounds=2,
        threads=1,
        skipped=[Skipped("abacus", "too slow")],
        progress=lambda done, total: calls.append((done, total)),
    )
    assert [(row.batch, row.post) for row in report.rows] == [(1, "graph"), (1, "host"), (2, "graph"), (2, "host")]
    for row in report.rows:
        assert tuple(row.stages) == STAGES
        assert all(0 <= times.p50 <= times.p95 for times in row.stages.values())
        assert row.images_per_second > 0
        assert row.peak_memory_mib > 20
        assert row.open_seconds > 0
    small, large = (next(row for row in report.rows if row.post == "host" and row.batch == batch) for batch in (1, 2))
    assert small.peak_memory_mib <= large.peak_memory_mib
    assert calls[-1] == (5, 5)
    assert report.skipped["abacus"] == "too slow"
    assert "holds no int8 graph" in report.skipped[str(missing)]
    assert report.rounds == 2
    assert report.threads == 1
    text = markdown_from_report(report)
    assert text.count("\n## Batch") == 2
    table = [line for line in text.splitlines() if line.startswith("| onnxruntime")]
    assert len(table) == 4
    assert all(line.count("|") == 13 for line in table)
    assert "- abacus: too slow" in text
    assert BenchmarkReport.model_validate(json.loads(report.model_dump_json())) == report


def test_a_process_that_dies_is_told(path: Path, images: list[Path]) -> None:
    images[1].write_bytes(b"no image")
    with pytest.raises(BackendError, match=r"nothing could be measured here.*b\.png: is not an image"):
        benchmark_bundle(open_bundle(path), images, "2 images", [GRAPH], batches=(2,), rounds=1, threads=1)


def test_hardware_is_named() -> None:
    machine = describe_hardware(["NVIDIA T4"])
    assert machine.cpu
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.gpus == ("NVIDIA T4",)
    assert machine.platform
