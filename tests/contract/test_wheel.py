"""The wheel: four packages, the shipped plans, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "cl4wsis": "cl4wsis",
    "cl4wsis_train": "train/cl4wsis_train",
    "cl4wsis_export": "export/cl4wsis_export",
    "cl4wsis_serve": "serve/cl4wsis_serve",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend of pyproject.toml and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files_under(folder: Path) -> set[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_wheel_holds_four_packages_and_nothing_else(unpacked: Path) -> None:
    metadata = {path.name for path in unpacked.glob("*.dist-info")}
    assert len(metadata) == 1
    assert {path.name for path in unpacked.iterdir()} - metadata == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_complete(unpacked: Path, package: str) -> None:
    expected = files_under(ROOT / PACKAGES[package])
    if package == "cl4wsis":
        expected |= {f"configs/{name}" for name in files_under(ROOT / "configs")}
    assert files_under(unpacked / package) == expected
    assert {"py.typed", "__init__.py"} <= expected


def test_plans_are_shipped(unpacked: Path) -> None:
    plans = files_under(unpacked / "cl4wsis" / "configs")
    assert "shapes.toml" in plans
    assert all(name.endswith(".toml") for name in plans)


def test_license_and_command_are_shipped(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()
    assert "cl4wsis = cl4wsis.cli.main:run" in (metadata / "entry_points.txt").read_text()


def test_unpacked_wheel_finds_its_own_plans(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import cl4wsis, cl4wsis.config, cl4wsis.tasks, pathlib\n"
        "print(pathlib.Path(cl4wsis.__file__).resolve())\n"
        "print(cl4wsis.config.find_config('shapes').resolve())\n"
        "print(cl4wsis.tasks.load_plan('shapes').name)\n"
    )
    environment = {"PYTHONPATH": str(unpacked)}  # comes before the path of an editable install
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    package = (unpacked / "cl4wsis").resolve()
    assert answer.stdout.splitlines() == [
        str(package / "__init__.py"),
        str(package / "configs" / "shapes.toml"),
        "shapes",
    ]
