"""``cl4wsis verify`` and ``cl4wsis benchmark`` as commands: output, exit codes, files."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import color_image, color_manifest, color_model, write_color_bundle
from typer.testing import CliRunner

from cl4wsis.bundle import open_bundle, update_manifest
from cl4wsis.checks import Limits
from cl4wsis.cli.main import app
from cl4wsis.errors import BundleError
from cl4wsis.images import write_png
from cl4wsis_serve import verify as ladder

RUNNER = CliRunner()
ONE_BACKEND = ["--backend", "onnxruntime", "--threads", "1"]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        write_png(tmp_path / "photos" / f"{number}.png", np.roll(color_image(64, 96), number, axis=0))
    return write_color_bundle(tmp_path / "runs" / "colors.cl4wsis", num_golden=1)


def test_verify_checks_the_newest_bundle_and_stores_the_result(bundle: Path) -> None:
    answer = RUNNER.invoke(app, ["verify", *ONE_BACKEND])
    assert answer.exit_code == 0, answer.stderr
    assert answer.stdout.count("passed") == 2
    assert "only the 1 golden inputs are compared" in answer.stderr
    stored = open_bundle(bundle).manifest.checks
    assert [(check.post, check.passed) for check in stored] == [("graph", True), ("host", True)]


def test_verify_with_a_folder_as_json_without_storing(bundle: Path) -> None:
    arguments = [str(bundle), "--images", "photos", "--limit", "2", "--post", "host", "--no-save", "--json"]
    answer = RUNNER.invoke(app, ["verify", *arguments, *ONE_BACKEND])
    assert answer.exit_code == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["passed"] is True
    (check,) = result["checks"]
    assert (check["post"], check["agreement"]["images"], check["agreement"]["instances"]) == ("host", 2, 4)
    assert open_bundle(bundle).manifest.checks == ()


def test_verify_fails_beyond_a_limit_and_says_which(bundle: Path) -> None:
    update_manifest(open_bundle(bundle), {"limits": {"float32": Limits(mask_iou=1.0, golden_pixels=0.0)}})
    model = onnx.load(bundle / "network.onnx")
    next(v for v in model.graph.initializer if v.name == "threshold").CopyFrom(
        onnx.numpy_helper.from_array(np.float32(250), "threshold")
    )
    path = bundle / "network.onnx"
    path.write_bytes(model.SerializeToString())
    from cl4wsis.steps import file_sha256

    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["network.onnx"] = file_sha256(path)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    answer = RUNNER.invoke(app, ["verify", str(bundle), *ONE_BACKEND])
    assert answer.exit_code == 1
    assert "FAILED" in answer.stdout
    assert "error: float32, post=host, onnxruntime: 100.00% of the foreground of the golden images" in answer.stderr
    assert [check.passed for check in open_bundle(bundle).manifest.checks] == [True, False]


def test_a_result_that_cannot_be_stored_is_printed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise BundleError("manifest.json: cannot be written: Read-only file system")

    monkeypatch.setattr(ladder, "store_checks", refuse)
    answer = RUNNER.invoke(app, ["verify", str(bundle), *ONE_BACKEND])
    assert answer.exit_code == 0
    assert "passed" in answer.stdout
    assert "the result is not stored: manifest.json: cannot be written" in answer.stderr


def test_a_lone_graph_is_verified_with_images_but_stores_nothing(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "colors.onnx"
    onnx.save(color_model(color_manifest()), path)
    answer = RUNNER.invoke(app, ["verify", str(path), *ONE_BACKEND])
    assert answer.exit_code == 1
    assert "has no golden inputs; give images with --images" in answer.stderr
    answer = RUNNER.invoke(app, ["verify", str(path), "--images", "photos", *ONE_BACKEND])
    assert answer.exit_code == 0, answer.stderr
    assert "stored" not in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["verify", "--precision", "fp4"], 2, "'fp4' is not one of 'fp32', 'fp16', 'int8'"),
        (["verify", "--post", "nowhere"], 2, "'nowhere' is not one of 'graph', 'host'"),
        (["verify", "--data", "shapes", "--images", "photos"], 2, "not both"),
        (["verify", "--data", "shapes"], 1, "give the plan it was trained on"),
        (["verify", "--backend", "abacus"], 1, "unknown backend 'abacus'"),
        (["verify", "--precision", "int8"], 1, "export the step again with --precision int8"),
        (["benchmark", "--batch", "1,zero"], 2, "expected positive numbers"),
        (["benchmark", "--out", "a.txt"], 2, "ends in .md or .json"),
        (["benchmark", "--out", "gone/a.md"], 2, "there is no folder gone"),
        (["benchmark", "--images", "gone"], 1, "there is no such file or folder"),
    ],
)
def test_mistakes_are_one_sentence(bundle: Path, arguments: list[str], code: int, message: str) -> None:
    answer = RUNNER.invoke(app, arguments, env={"COLUMNS": "300"})
    assert answer.exit_code == code
    assert message in " ".join(answer.stderr.split())


def test_benchmark_prints_a_table_and_writes_files(bundle: Path) -> None:
    arguments = ["--batch", "1,2", "--repeats", "2", "--images", "photos", "--out", "b.md", "--out", "b.json"]
    answer = RUNNER.invoke(app, ["benchmark", str(bundle), *arguments, *ONE_BACKEND])
    assert answer.exit_code == 0, answer.stderr
    report = json.loads(Path("b.json").read_text())
    assert [(row["batch"], row["post"]) for row in report["rows"]] == [
        (1, "graph"),
        (1, "host"),
        (2, "graph"),
        (2, "host"),
    ]
    assert report["images"] == "3 images of photos"
    assert Path("b.md").read_text().startswith("# colors-step1\n")
    assert answer.stdout.count("onnxruntime") >= 4
