"""``cl4wsis doctor``: findings on this machine, and the collisions it must notice."""

import importlib.metadata
import json
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from cl4wsis.cli import doctor as doctor_command
from cl4wsis.cli.main import app
from cl4wsis_serve import BACKENDS

RUNNER = CliRunner()


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *present: str, absent: tuple[str, ...] = ()) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name in present else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_findings_cover_packages_parts_and_backends() -> None:
    answer = RUNNER.invoke(app, ["doctor", "--json"])
    findings = json.loads(answer.stdout)
    assert findings["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert tuple(findings["backends"]) == tuple(BACKENDS)
    assert findings["backends"]["onnxruntime"] == {"device": "cpu", "reason": None}
    assert {found["device"] for found in findings["backends"].values()} == {"cpu", "cuda"}
    assert "CPUExecutionProvider" in findings["onnxruntime_providers"]
    assert findings["parts"]["cpu"] is None


def test_tables_name_the_same() -> None:
    answer = RUNNER.invoke(app, ["doctor"])
    for part in ("opencv-python-headless", *BACKENDS, "train-step"):
        assert part in answer.stdout


@pytest.mark.parametrize(
    "pair",
    [
        ("onnxruntime", "onnxruntime-gpu"),
        ("onnxruntime", "onnxruntime-openvino"),
        ("opencv-python", "opencv-python-headless"),
        ("opencv-python-headless", "opencv-contrib-python"),
    ],
    ids=" ".join,
)
def test_wheels_that_overwrite_each_other_are_a_problem(monkeypatch: pytest.MonkeyPatch, pair: tuple[str, str]) -> None:
    pretend_installed(monkeypatch, *pair)
    answer = RUNNER.invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 1
    problems = json.loads(answer.stdout)["problems"]
    assert len(problems) == 1
    assert f"{pair[0]} and {pair[1]} are both installed" in problems[0]
    assert "pip uninstall" in answer.stderr


def test_all_colliding_wheels_are_named_in_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "onnxruntime", "onnxruntime-gpu", "ort-nightly")
    (problem,) = json.loads(RUNNER.invoke(app, ["doctor", "--json"]).stdout)["problems"]
    assert "onnxruntime, onnxruntime-gpu and ort-nightly are all installed" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu ort-nightly &&" in problem


def test_missing_runtime_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    findings = json.loads(RUNNER.invoke(app, ["doctor", "--json"]).stdout)
    assert findings["onnxruntime_providers"] == []
    assert "pip install 'cl4wsis[cpu]'" in findings["backends"]["onnxruntime"]["reason"]


def test_gpus_are_those_the_driver_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    listing = subprocess.CompletedProcess([], 0, stdout="NVIDIA A100, 555.1\nNVIDIA A100, 555.1\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: listing)
    assert doctor_command.gpu_names() == ["NVIDIA A100, 555.1", "NVIDIA A100, 555.1"]


def test_driver_that_fails_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", fail)
    assert doctor_command.gpu_names() == []
