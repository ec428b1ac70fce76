"""An export that is killed at several moments: the destination is absent or complete, and the next export cleans up.

The graph is taken from an earlier export, since tracing takes most of the time and writes nothing; all else is real.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cl4wsis.bundle import open_bundle
from cl4wsis.errors import BundleError

EXPORT = """
import sys
from pathlib import Path
sys.path[:0] = [str(Path(sys.argv[2]) / "export"), sys.argv[2]]
import conftest
from cl4wsis_export import export_network, pack

plain = lambda fixture: getattr(fixture, "_fixture_function", None) or fixture.__wrapped__
info = plain(conftest.step_info)()
network = plain(conftest.network)(info)
model = pack.ir.load(sys.argv[3])
pack.build_graph = lambda segmenter, opset: model
print("started", flush=True)
export_network(network, info, Path(sys.argv[1]), plain(conftest.export_spec)())
"""
TESTS = Path(__file__).parents[1]
LONGEST = 100  # seconds of one export on a busy machine


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_half_written(bundle_path: Path, tmp_path: Path) -> None:
    destination = tmp_path / "x.cl4wsis"
    command = [sys.executable, "-c", EXPORT, str(destination), str(TESTS), str(bundle_path / "model.onnx")]

    def is_writing() -> bool:
        return any(tmp_path.glob(".*.tmp"))

    def has_graph() -> bool:
        return any(tmp_path.glob(".*.tmp/model.onnx"))

    moments = {
        "in the middle of the work": lambda: True,
        "as it begins to write": is_writing,
        "as it writes": has_graph,
    }
    for moment, has_come in moments.items():
        process = start(command)
        wait_for(process, has_come)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, moment
        assert is_absent_or_complete(destination), moment
    process = start(command)
    process.communicate(timeout=LONGEST)
    assert process.returncode == 0
    assert open_bundle(destination).manifest.verification is not None
    assert [path.name for path in tmp_path.iterdir()] == ["x.cl4wsis"]


def start(command: list[str]) -> "subprocess.Popen[str]":
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def wait_for(process: "subprocess.Popen[str]", has_come: object) -> None:
    assert callable(has_come)
    end = time.monotonic() + LONGEST
    while not has_come():
        assert process.poll() is None, "the export ended before the moment came"
        assert time.monotonic() < end
        time.sleep(0.001)


def is_absent_or_complete(destination: Path) -> bool:
    if not destination.exists():
        return True
    try:
        open_bundle(destination)
    except BundleError:
        return False
    return True
