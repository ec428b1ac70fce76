"""Core, runtime and command line work in an environment without torch or any other optional part.

Each check runs in a process of its own, in which a finder at the head of ``sys.meta_path`` refuses the blocked modules
just as if they were not installed.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

TRAINING = ("torch", "torchvision", "timm", "lightning_fabric", "safetensors", "tensorboard", "cl4wsis_train")
OPTIONAL = (
    *TRAINING,
    *("onnx", "onnx_ir", "onnxscript", "cl4wsis_export"),
    *("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "fastapi", "uvicorn", "ray"),
)

COMMANDS = (
    *("train-step", "evaluate", "export", "predict", "inspect", "doctor", "demo"),
    *("serve", "verify", "benchmark"),
)

BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

IMPORT_ALL = """
import importlib, json, pkgutil, sys, traceback
package = importlib.import_module({package!r})
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
names = [name for name in names if not name.endswith("__main__")]
failures = {{}}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError:
        failures[name] = traceback.format_exc().splitlines()[-1]
print(json.dumps([names, failures]))
"""


def python(code: str, blocked: Iterable[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which some packages cannot be imported."""
    program = BLOCKER.format(blocked=tuple(blocked)) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def cl4wsis(*arguments: str, blocked: Iterable[str] = OPTIONAL) -> subprocess.CompletedProcess[str]:
    """Run the command line as the installed script does."""
    return python(f"sys.argv = {['cl4wsis', *arguments]!r}\nfrom cl4wsis.cli.main import run\nrun()", blocked)


def test_the_blocker_blocks() -> None:
    answer = python("import torch", blocked=["torch"])
    assert answer.returncode == 1
    assert "ModuleNotFoundError: No module named 'torch'" in answer.stderr
    assert python("import torch.nn", blocked=["torch"]).returncode == 1
    assert python("import json", blocked=["torch"]).returncode == 0


@pytest.mark.parametrize(
    ("package", "blocked"),
    [("cl4wsis", (*OPTIONAL, "cl4wsis_serve")), ("cl4wsis_serve", OPTIONAL)],
    ids=["core", "runtime"],
)
def test_every_submodule_imports_without_any_optional_part(package: str, blocked: tuple[str, ...]) -> None:
    answer = python(IMPORT_ALL.format(package=package), blocked)
    assert answer.returncode == 0, answer.stderr
    names, failures = json.loads(answer.stdout.splitlines()[-1])
    assert len(names) > 3
    assert failures == {}


@pytest.mark.parametrize("package", ["cl4wsis", "cl4wsis_serve", "cl4wsis.cli.main"])
def test_importing_loads_no_torch_even_where_it_is_installed(package: str) -> None:
    answer = python(f"import {package}\nprint([name for name in {TRAINING!r} if name in sys.modules])")
    assert answer.stdout.splitlines() == ["[]"], answer.stderr


def test_help_works_without_torch_and_lists_the_commands() -> None:
    answer = cl4wsis("--help")
    assert answer.returncode == 0, answer.stderr
    for command in COMMANDS:
        assert command in answer.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_works_without_torch(command: str) -> None:
    answer = cl4wsis(command, "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"cl4wsis {command}" in answer.stdout


def test_doctor_works_without_any_optional_part() -> None:
    answer = cl4wsis("doctor")
    assert answer.returncode in (0, 1), answer.stderr
    assert "Traceback" not in answer.stderr
    assert "torch" in answer.stdout


def test_training_without_torch_says_what_to_install(tmp_path: Path) -> None:
    answer = cl4wsis("train-step", "--config", "shapes", "--run", str(tmp_path / "run"))
    assert answer.returncode == 1
    assert "pip install 'cl4wsis[train]'" in answer.stderr
    assert "Traceback" not in answer.stderr
