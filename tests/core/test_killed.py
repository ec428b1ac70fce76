"""A process that is killed while it writes leaves nothing half-written, and the next one cleans up after it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="the bundle is made with the extra 'export'")

from bundles import write_color_bundle

from cl4wsis.bundle import Bundle, open_bundle, update_manifest
from cl4wsis.engines import CACHE_VARIABLE

TESTS = Path(__file__).parents[1]
DELAYS = [0.0, 0.02, 0.05, 0.1, 0.2]

WRITE_BUNDLES = """
import sys
from itertools import count
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bundles import color_manifest, color_model
from cl4wsis.bundle import write_bundle
manifest = color_manifest()
files = {"model.onnx": color_model(manifest).SerializeToString(), "labels.txt": b"red\\nblue\\n"}
print("ready", flush=True)
for index in count():
    many = {f"golden/{part}.bin": bytes([index % 256]) * 50_000 for part in range(20)}
    write_bundle(Path(sys.argv[1]), manifest.model_copy(update={"name": f"n{index}"}), {**files, **many})
"""

ADD_ENGINES = """
import sys
from itertools import count
from pathlib import Path
from cl4wsis.bundle import EngineInfo, open_bundle
from cl4wsis.engines import add_engine
path = Path(sys.argv[1])
print("ready", flush=True)
for index in count():
    bundle = open_bundle(path)
    info = EngineInfo(
        file="engines/none",
        runtime="tensorrt 11.4.0",
        compute_capabilities=("8.6",),
        max_batch=1 + index % 3,
        graph_sha256=bundle.manifest.files["model.onnx"],
    )
    add_engine(bundle, info, bytes([index % 256]) * 300_000)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def kill_after(code: str, arguments: list[str], delay: float) -> None:
    """Run a program, and kill it so long after it says that it is ready."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def test_a_killed_export_leaves_the_bundle_complete_or_absent(tmp_path: Path) -> None:
    destination = tmp_path / "out" / "x.cl4wsis"
    seen = set()
    for delay in (*DELAYS, 1.0):
        kill_after(WRITE_BUNDLES, [str(destination), str(TESTS)], delay)
        if destination.exists():
            seen.add(open_bundle(destination).manifest.name)
        hidden = [path.name for path in tmp_path.glob("out/*") if path != destination]
        assert all(name.startswith(".x.cl4wsis.") for name in hidden)
    assert seen
    write_color_bundle(destination)
    assert [path.name for path in destination.parent.iterdir()] == ["x.cl4wsis"]


def test_a_bundle_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    destination = write_color_bundle(tmp_path / "x.cl4wsis")
    destination.rename(tmp_path / ".x.cl4wsis.12ab34cd.old")  # where a process was killed between its two renames
    (tmp_path / ".x.cl4wsis.12ab34cd.tmp").mkdir()
    code = (
        "from pathlib import Path\nfrom bundles import color_manifest\nfrom cl4wsis.bundle import write_bundle\n"
        "write_bundle(Path(sys.argv[1]), color_manifest(), {'model.onnx': 'text, which cannot be written'})"
    )
    program = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{code}"
    failed = subprocess.run([sys.executable, "-c", program, str(destination)], capture_output=True, check=False)
    assert failed.returncode != 0
    assert open_bundle(destination).manifest.name == "colors-step1"
    assert leftovers(tmp_path) == []


def test_a_running_export_is_left_alone(tmp_path: Path) -> None:
    destination = tmp_path / "x.cl4wsis"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cl4wsis.folders import replaced_folder\n"
        "with replaced_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'manifest.json').write_text('{}')\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(destination)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        write_color_bundle(destination)
        assert len(leftovers(tmp_path)) > 0
        process.communicate("")
    assert process.returncode == 0
    assert leftovers(tmp_path) == []


def test_a_killed_build_leaves_a_bundle_that_opens(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    for delay in DELAYS:
        kill_after(ADD_ENGINES, [str(path)], delay)
        manifest = open_bundle(path).manifest
        assert len(manifest.engines) <= 3
    listed = {engine.file for engine in manifest.engines}
    stray = {f"engines/{file.name}" for file in (path / "engines").glob("[!.]*")} - listed
    assert len(stray) <= len(DELAYS)  # complete, but not listed: never looked at
    update_manifest(Bundle(path, manifest), {"name": "after"})
    assert open_bundle(path).manifest.name == "after"
