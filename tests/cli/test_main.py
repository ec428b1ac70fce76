"""The command line as a whole: cheap to start, plain errors, and no torch where none is needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from bundles import color_image, write_color_bundle
from typer.testing import CliRunner

from cl4wsis import __version__
from cl4wsis.cli import inspect as inspect_command
from cl4wsis.cli.main import app
from cl4wsis.images import write_png

RUNNER = CliRunner()
HEAVY = ("torch", "cv2", "numpy", "onnxruntime", "pydantic", "pycocotools")

_BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm", "onnx", "lightning_fabric"}:
            raise ModuleNotFoundError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocker())
from cl4wsis.cli.main import run
sys.argv = ["cl4wsis", *sys.argv[1:]]
run()
"""


def run_without_torch(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", _BLOCKED, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom cl4wsis.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\nassert not loaded, loaded"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert "predict" in answer.stdout


def test_version() -> None:
    answer = RUNNER.invoke(app, ["--version"])
    assert (answer.exit_code, answer.stdout) == (0, f"cl4wsis {__version__}\n")


def test_module_and_script_are_the_same() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "cl4wsis", "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.stdout == f"cl4wsis {__version__}\n"


def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_and_option_has_help(name: str) -> None:
    command = commands()[name]
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []


def test_same_option_has_the_same_spelling_everywhere() -> None:
    spelled: dict[str, set[str]] = {}
    for command in commands().values():
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("-"):
                    spelled.setdefault(option, set()).add(str(parameter.name))
    assert {option: names for option, names in spelled.items() if len(names) > 1} == {}


def test_our_errors_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    answer = RUNNER.invoke(app, ["inspect", str(tmp_path / "gone.cl4wsis")])
    assert answer.exit_code == 1
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: ")
    assert "gone.cl4wsis" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_place_that_cannot_be_written_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def write(*args: object) -> None:
        (tmp_path / "file" / "below").write_text("")

    monkeypatch.setattr(inspect_command, "_inspect_plan", write)
    answer = RUNNER.invoke(app, ["inspect", "shapes"])
    assert answer.exit_code == 1
    assert answer.stderr.startswith(f"error: {tmp_path / 'file' / 'below'}: Not a directory; check")


def test_unknown_option_is_exit_code_2() -> None:
    answer = RUNNER.invoke(app, ["doctor", "--jsn"])
    assert answer.exit_code == 2
    assert "--jsn" in answer.stderr


def test_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_command, "_inspect_plan", interrupt)
    answer = RUNNER.invoke(app, ["inspect", "shapes"])
    assert answer.exit_code == 130
    assert "interrupted" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_runtime_commands_work_without_torch(tmp_path: Path) -> None:
    write_color_bundle(tmp_path / "runs" / "colors" / "colors.cl4wsis")
    write_png(tmp_path / "a.png", color_image())
    predicted = run_without_torch("predict", "a.png", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert "images: 1, instances: 2" in predicted.stdout
    for arguments in (["inspect", "shapes"], ["inspect", "runs/colors/colors.cl4wsis"], ["doctor"], ["--help"]):
        answer = run_without_torch(*arguments, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout
