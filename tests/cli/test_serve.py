"""``cl4wsis serve`` as a process: it listens, answers, refuses and stops as it should."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from bundles import color_image, write_color_bundle
from typer.testing import CliRunner

from cl4wsis.cli.main import app
from cl4wsis.images import encode_png

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_color_bundle(tmp_path / "colors.cl4wsis")


@contextmanager
def running_server(bundle: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "cl4wsis", "serve", str(bundle), "--port", "0", "--threads", "1", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            address = next((found for line in lines if (found := re.search(r"http://\S+", line))), None)
            assert address, server.poll()
            yield server, address[0]
        finally:
            server.kill()


def post(url: str, body: bytes) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_it_answers_and_stops_on_a_signal(bundle: Path) -> None:
    with running_server(bundle, "--max-pixels", "1", "--max-body", "1") as (server, address):
        status, answer = post(f"{address}/predict", encode_png(color_image()))
        assert status == 200
        assert [instance["name"] for instance in answer["instances"]] == ["red", "blue"]
        bomb = encode_png(np.zeros((2000, 2000), np.uint8))
        assert len(bomb) < 20_000
        status, answer = post(f"{address}/predict", bomb)
        assert status == 400
        assert "error" in answer
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in (server.stderr.read() if server.stderr else "")


@pytest.mark.parametrize(
    ("arguments", "pixels", "status"),
    [
        (["--max-pixels", "1"], "100000000", 400),  # what is given wins over the environment
        (["--max-pixels", "64"], "1000000", 200),
        ([], "1000000", 400),
        ([], None, 200),
    ],
)
def test_the_largest_image_is_the_one_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], pixels: str | None, status: int
) -> None:
    monkeypatch.delenv("OPENCV_IO_MAX_IMAGE_PIXELS", raising=False)
    if pixels is not None:
        monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", pixels)
    with running_server(bundle, *arguments) as (_, address):
        found, answer = post(f"{address}/predict", encode_png(np.zeros((1100, 1000), np.uint8)))
        assert found == status, answer


def test_a_taken_port_is_one_sentence(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = CliRunner().invoke(app, ["serve", str(bundle), "--port", str(taken.getsockname()[1])])
    assert answer.exit_code == 1
    assert "error: cannot listen on 127.0.0.1:" in answer.stderr
    assert "choose others with --host and --port" in answer.stderr


def test_a_model_that_fails_its_self_test_is_not_served(tmp_path: Path) -> None:
    bundle = write_color_bundle(tmp_path / "colors.cl4wsis")
    answer = CliRunner().invoke(app, ["serve", str(bundle), "--backend", "onnxruntime", "--self-test"])
    assert answer.exit_code == 1
    assert "self-test of float32 on onnxruntime: there are no golden inputs" in answer.stderr


def test_a_missing_bundle_is_one_sentence(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["serve", str(tmp_path / "gone.cl4wsis")])
    assert answer.exit_code == 1
    assert "does not exist" in answer.stderr
