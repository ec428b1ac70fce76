"""A bundle answers in an environment that holds the wheels of ``cl4wsis[cpu]`` and nothing else.

The environment is real but needs no network: a folder of links to just those distributions, among them what they
require in turn, which is all that the interpreter of the test finds beside the standard library.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from bundles import color_image, write_color_bundle
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cl4wsis.images import write_png

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from cl4wsis.cli.main import run
try:
    run()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def required_by(name: str, extra: str) -> set[str]:
    """Name the distributions that an extra of a distribution brings with it, directly and in turn."""
    found: set[str] = set()
    waiting = [(name, extra)]
    while waiting:
        distribution, asked = waiting.pop()
        for line in metadata.requires(distribution) or ():
            requirement = Requirement(line)
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": value}) for value in ("", asked)
            )
            key = canonicalize_name(requirement.name)
            if wanted and key not in found:
                found.add(key)
                waiting += [(requirement.name, value) for value in ("", *requirement.extras)]
    return found


def link_distributions(names: set[str], folder: Path) -> None:
    """Fill a folder with links to what the distributions have installed."""
    folder.mkdir()
    for name in names:
        files = metadata.distribution(name).files or []
        site = Path(str(metadata.distribution(name).locate_file("")))
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            target = folder / top
            if not target.exists():
                target.symlink_to(site / top)


@pytest.fixture(scope="module")
def lean_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = required_by("cl4wsis", "cpu")
    assert {"numpy", "onnxruntime", "pydantic", "opencv-python-headless"} <= names
    assert not {"torch", "onnx", "timm", "openvino"} & names
    folder = tmp_path_factory.mktemp("lean") / "site"
    link_distributions(names, folder)
    ours = [str(ROOT), str(ROOT / "serve")]
    return {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([*ours, str(folder)]), "COLUMNS": "200"}


def cl4wsis(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line without the interpreter's own site-packages."""
    command = [sys.executable, "-S", "-c", PROGRAM, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("post", ["auto", "graph"])
def test_predict_needs_the_wheels_of_the_cpu_extra_alone(
    lean_environment: dict[str, str], tmp_path: Path, post: str
) -> None:
    write_color_bundle(tmp_path / "colors.cl4wsis")
    write_png(tmp_path / "photo.png", color_image())
    answer = cl4wsis(
        lean_environment, tmp_path, "predict", "photo.png", "--bundle", "colors.cl4wsis", "--post", post, "--json"
    )
    assert answer.returncode == 0, answer.stderr
    summary = json.loads(answer.stdout)
    assert (summary["instances"], summary["backend"]) == (2, "onnxruntime")
    assert summary["post"] == ("host" if post == "auto" else post)
    assert "pip install 'cl4wsis[openvino]'" in summary["skipped"]["openvino"]
    loaded = json.loads(answer.stderr.splitlines()[-1])
    assert {"numpy", "onnxruntime", "cl4wsis_serve"} <= set(loaded)
    assert not {"torch", "onnx", "openvino", "cl4wsis_train", "cl4wsis_export"} & set(loaded)


@pytest.mark.slow
def test_what_is_not_in_the_environment_cannot_be_imported(lean_environment: dict[str, str], tmp_path: Path) -> None:
    names = ("torch", "onnx", "openvino", "pytest")
    code = f"from importlib.util import find_spec\nprint([name for name in {names} if find_spec(name)])"
    command = [sys.executable, "-S", "-c", code]
    answer = subprocess.run(
        command, cwd=tmp_path, env=lean_environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "[]"
