"""``cl4wsis predict`` with a real graph: files, failures, resuming, and what it says."""

import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from bundles import color_image, write_color_bundle
from typer.testing import CliRunner

from cl4wsis.cli.console import note_once
from cl4wsis.cli.main import app
from cl4wsis.cli.predict import newest_bundle
from cl4wsis.errors import BundleError
from cl4wsis.images import read_image, write_png
from cl4wsis_serve.writers import locked_results

RUNNER = CliRunner()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a bundle under runs/ and two photographs."""
    write_color_bundle(tmp_path / "runs" / "colors" / "colors.cl4wsis")
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    write_png(tmp_path / "photos" / "a.png", color_image(64, 96))
    write_png(tmp_path / "photos" / "sub" / "b.png", color_image(128, 192))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_write_ids_coco_and_overlays(folder: Path) -> None:
    answer = RUNNER.invoke(app, ["predict", "photos"])
    assert answer.exit_code == 0, answer.stderr
    written = {str(path.relative_to("masks")) for path in Path("masks").rglob("*") if path.is_file()}
    ids_files = {"ids/a.json", "ids/a.png", "ids/sub/b.json", "ids/sub/b.png"}
    assert written == {"coco.json", "overlay/a.jpg", "overlay/sub/b.jpg"} | ids_files
    ids = cv2.imread("masks/ids/sub/b.png", cv2.IMREAD_UNCHANGED)
    assert ids.shape == (128, 192)
    np.testing.assert_array_equal(np.unique(ids), [0, 1, 2])
    coco = json.loads(Path("masks/coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["a.png", "sub/b.png"]
    assert len(coco["annotations"]) == 4
    assert read_image("masks/overlay/a.jpg").shape == (320, 480, 3)
    assert "images: 2, instances: 4" in answer.stdout
    assert "grouping: " in answer.stderr


def test_json_summary_is_alone_on_stdout(folder: Path) -> None:
    answer = RUNNER.invoke(
        app, ["predict", "photos", "--json", "--save", "coco", "--min-score", "0.7", "--batch-size", "2"]
    )
    summary = json.loads(answer.stdout)
    assert summary["images"] == 2
    assert summary["instances_per_class"] == {"red": 2, "blue": 0}
    assert summary["failed"] == []
    assert sorted(path.name for path in Path("masks").iterdir()) == ["coco.json"]


@pytest.mark.parametrize("post", ["graph", "host"])
def test_choice_of_the_runtime_is_kept_and_told(folder: Path, post: str) -> None:
    answer = RUNNER.invoke(
        app, ["predict", "photos", "--backend", "onnxruntime", "--precision", "fp32", "--post", post, "--json"]
    )
    summary = json.loads(answer.stdout)
    assert (summary["backend"], summary["precision"], summary["post"]) == ("onnxruntime", "float32", post)
    assert (summary["skipped"], summary["instances"]) == ({}, 4)
    assert f"on onnxruntime, fp32, grouping: {post}" in answer.stderr


def test_what_auto_passed_over_is_told_with_the_reasons(folder: Path) -> None:
    note_once.cache_clear()  # another test of this process may have told it
    answer = RUNNER.invoke(app, ["predict", "photos", "--json"])
    skipped = json.loads(answer.stdout)["skipped"]
    assert all(reason for reason in skipped.values())
    assert all(name in answer.stderr for name in skipped)


def test_fallback_needs_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = ["predict", "photos", "--backend", "openvino", "--json"]
    answer = RUNNER.invoke(app, arguments)
    assert answer.exit_code == 1
    assert "pip install 'cl4wsis[openvino]'" in answer.stderr
    answer = RUNNER.invoke(app, [*arguments, "--allow-fallback"])
    assert answer.exit_code == 0, answer.stderr
    summary = json.loads(answer.stdout)
    assert summary["backend"] != "openvino"
    assert "pip install 'cl4wsis[openvino]'" in summary["skipped"]["openvino"]


def test_broken_image_is_reported_and_skipped(folder: Path) -> None:
    Path("photos/broken.jpg").write_bytes(b"not an image")
    answer = RUNNER.invoke(app, ["predict", "photos", "--json"])
    assert answer.exit_code == 1
    summary = json.loads(answer.stdout)
    assert (summary["images"], summary["instances"]) == (2, 4)
    assert [entry["source"] for entry in summary["failed"]] == ["photos/broken.jpg"]
    assert "photos/broken.jpg: is not an image" in answer.stderr
    assert "1 of 3 files could not be read" in answer.stderr


def test_resume_keeps_finished_files_and_a_rerun_overwrites(folder: Path) -> None:
    RUNNER.invoke(app, ["predict", "photos"])
    stamp = Path("masks/ids/a.png")
    os.utime(stamp, (1, 1))
    Path("masks/ids/sub/b.json").unlink()
    answer = RUNNER.invoke(app, ["predict", "photos", "--resume"])
    assert answer.exit_code == 0, answer.stderr
    assert stamp.stat().st_mtime == 1
    assert Path("masks/ids/sub/b.json").is_file()
    assert len(json.loads(Path("masks/coco.json").read_text())["annotations"]) == 4
    RUNNER.invoke(app, ["predict", "photos"])
    assert stamp.stat().st_mtime > 1


def test_resume_does_not_keep_what_another_threshold_made(folder: Path) -> None:
    RUNNER.invoke(app, ["predict", "photos"])
    answer = RUNNER.invoke(app, ["predict", "photos", "--resume", "--min-score", "0.7", "--json"])
    assert json.loads(answer.stdout)["instances"] == 2


def test_results_inside_the_source_are_not_predicted_again(folder: Path) -> None:
    RUNNER.invoke(app, ["predict", "photos", "--out", "photos/masks"])
    answer = RUNNER.invoke(app, ["predict", "photos", "--out", "photos/masks", "--json"])
    assert json.loads(answer.stdout)["images"] == 2


def test_results_of_other_images_are_told_to_stay(folder: Path) -> None:
    first = RUNNER.invoke(app, ["predict", "photos"])
    same = RUNNER.invoke(app, ["predict", "photos"])
    Path("photos/sub/b.png").rename("photos/c.png")
    resumed = RUNNER.invoke(app, ["predict", "photos", "--resume"])
    other = RUNNER.invoke(app, ["predict", "photos"])
    assert other.exit_code == 0, other.stderr
    assert "masks holds results of other images too (1), which stay; choose another --out" in other.stderr
    assert not any("which stay" in answer.stderr for answer in (first, same, resumed))
    assert Path("masks/ids/sub/b.png").is_file()
    assert [image["file_name"] for image in json.loads(Path("masks/coco.json").read_text())["images"]] == [
        "a.png",
        "c.png",
    ]


def test_one_run_at_a_time_writes_into_a_folder(folder: Path) -> None:
    with locked_results(Path("masks")):
        answer = RUNNER.invoke(app, ["predict", "photos"])
        elsewhere = RUNNER.invoke(app, ["predict", "photos", "--out", "others"])
    assert answer.exit_code == 1
    assert "error: masks: another process writes results there; wait for it, or choose another" in answer.stderr
    assert list(Path("masks").iterdir()) == []
    assert elsewhere.exit_code == 0
    assert RUNNER.invoke(app, ["predict", "photos"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give images"),
        (["runs/farm-step1.cl4wsis", "photos"], "give it with --bundle runs/farm-step1.cl4wsis"),
        (["photos", "--save", "pdf"], "expected some of ids, coco, overlay"),
        (["photos", "--save", ""], "expected some of ids, coco, overlay"),
        (["photos", "--save", "coco", "--resume"], "must contain 'ids'"),
        (["photos", "--batch-size", "0"], "--batch-size"),
        (["photos", "--precision", "fp8"], "--precision"),
        (["photos", "--post", "both"], "--post"),
    ],
)
def test_usage_errors(folder: Path, arguments: list[str], message: str) -> None:
    answer = RUNNER.invoke(app, ["predict", *arguments], env={"COLUMNS": "300"})
    assert answer.exit_code == 2
    assert message in " ".join(answer.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "error: gone: there is no such file or folder"),
        (["photos", "--backend", "tensorflow"], "error: unknown backend 'tensorflow'"),
        (["photos", "--bundle", "photos"], "error: photos: is no bundle"),
        (["photos", "--precision", "int8"], "holds no int8 graph with post=host"),
    ],
)
def test_failures_are_one_sentence(folder: Path, arguments: list[str], message: str) -> None:
    answer = RUNNER.invoke(app, ["predict", *arguments])
    assert answer.exit_code == 1
    assert message in answer.stderr
    assert not Path("masks").exists()


def test_self_test_lets_a_sound_model_pass_and_refuses_others(folder: Path) -> None:
    arguments = ["predict", "photos", "--backend", "onnxruntime", "--self-test", "--bundle"]
    answer = RUNNER.invoke(app, [*arguments, str(write_color_bundle(folder / "sound.cl4wsis", num_golden=2))])
    assert answer.exit_code == 0, answer.stderr
    answer = RUNNER.invoke(app, [*arguments, "runs/colors/colors.cl4wsis", "--out", "other"])
    assert answer.exit_code == 1
    assert "there are no golden inputs" in answer.stderr
    assert not Path("other").exists()


def test_newest_bundle_wins(folder: Path) -> None:
    """What counts is when a bundle was exported, not when something was stored in it."""
    newer = write_color_bundle(folder / "runs" / "other" / "newer.cl4wsis", created="2099-01-01T00:00:00+00:00")
    os.utime(newer / "manifest.json", (1, 1))
    assert newest_bundle(folder / "runs") == newer
    later_step = write_color_bundle(folder / "runs" / "x.cl4wsis", created="2099-01-01T00:00:00+00:00", step=7)
    (write_color_bundle(folder / "runs" / "y.cl4wsis") / "manifest.json").write_text("{")
    assert newest_bundle(folder / "runs") == later_step


def test_without_a_bundle_the_way_to_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="run 'cl4wsis export' first"):
        newest_bundle(tmp_path)
