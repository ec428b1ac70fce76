"""Changing a manifest: the new one or the old one, never half of it, and nothing else touched."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import color_manifest, color_model, write_color_bundle

from cl4wsis.bundle import MANIFEST_FILE, open_bundle, update_manifest
from cl4wsis.checks import Limits, VariantCheck
from cl4wsis.errors import BundleError

CHECK = VariantCheck(
    precision="float32",
    post="graph",
    backend="onnxruntime",
    sha256="0" * 64,
    data="3 images",
    golden=None,
    agreement=None,
    ap50=None,
    ap50_reference=None,
    limits=Limits(matched=0.9),
    problems=("too slow",),
    versions={"cl4wsis": "1"},
    checked="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_color_bundle(tmp_path / "colors.cl4wsis")


def test_fields_change_and_the_rest_stays(bundle: Path) -> None:
    before = open_bundle(bundle)
    update_manifest(before, {"checks": (CHECK,), "limits": {"int8": Limits(matched=0.5)}})
    after = open_bundle(bundle)
    assert after.manifest.checks == (CHECK,)
    assert not CHECK.passed
    assert after.manifest.limits["int8"].matched == 0.5
    unchanged = after.manifest.model_copy(update={"checks": (), "limits": {}})
    assert unchanged == before.manifest


def test_what_changed_meanwhile_is_kept(bundle: Path) -> None:
    opened = open_bundle(bundle)
    update_manifest(open_bundle(bundle), {"created": "yesterday"})
    update_manifest(opened, {"checks": (CHECK,)})
    assert open_bundle(bundle).manifest.created == "yesterday"


def test_what_processes_add_at_once_is_kept(bundle: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom cl4wsis.bundle import open_bundle, update_manifest\n"
        "bundle = open_bundle(Path(sys.argv[1]))\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "for n in range(40):\n"
        "    update_manifest(bundle, lambda now: {'versions': {**now.versions, f'{sys.argv[2]}-{n}': '1'}})\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(bundle), name], **pipes) for name in "ab"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert open_bundle(bundle).manifest.versions == {f"{name}-{n}": "1" for name in "ab" for n in range(40)}


def test_a_read_only_bundle_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("cl4wsis.bundle.write_text_atomically", refuse)
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be written: Read-only file system"):
        update_manifest(open_bundle(bundle), {"created": "today"})


def test_an_impossible_value_changes_nothing(bundle: Path) -> None:
    before = (bundle / MANIFEST_FILE).read_bytes()
    with pytest.raises(BundleError, match="step"):
        update_manifest(open_bundle(bundle), {"step": "second"})
    assert (bundle / MANIFEST_FILE).read_bytes() == before


def test_a_failed_write_leaves_the_old_manifest(bundle: Path) -> None:
    before = (bundle / MANIFEST_FILE).read_bytes()
    (bundle / f".{MANIFEST_FILE}.tmp").mkdir()  # where the new one would be written
    with pytest.raises(BundleError, match="cannot be written"):
        update_manifest(open_bundle(bundle), {"created": "today"})
    assert (bundle / MANIFEST_FILE).read_bytes() == before


def test_a_lone_graph_has_no_manifest_to_change(tmp_path: Path) -> None:
    path = tmp_path / "colors.onnx"
    path.write_bytes(color_model(color_manifest()).SerializeToString())
    with pytest.raises(BundleError, match="is a graph by itself"):
        update_manifest(open_bundle(path), {"created": "today"})


def test_results_are_not_part_of_a_graph_s_metadata(tmp_path: Path) -> None:
    path = tmp_path / "colors.onnx"
    path.write_bytes(color_model(color_manifest(checks=(CHECK,))).SerializeToString())
    assert open_bundle(path).manifest.checks == ()
