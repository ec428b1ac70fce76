"""``cl4wsis data check``: tables, JSON and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

from layouts import Split, write_voc

TRAIN: Split = {
    "a": [("cat", (0, 0, 20, 20))],
    "b": [("cat", (0, 0, 20, 20)), ("dog", (30, 0, 50, 20))],
}
VAL: Split = {"v": [("cat", (0, 0, 20, 20)), ("dog", (30, 0, 50, 20))]}


def cl4wsis(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cl4wsis", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def write_plan(root: Path) -> str:
    write_voc(root / "voc", {"train": TRAIN, "val": VAL})
    plan = root / "pets.toml"
    plan.write_text(
        f"""
        name = "pets"
        steps = [["cat"], ["dog"]]
        [data]
        kind = "voc"
        root = "{root / "voc"}"
        train.split = "train"
        val.split = "val"
        """
    )
    return str(plan)


def test_whole_data_is_counted_and_ends_well(tmp_path: Path) -> None:
    answer = cl4wsis("data", "check", write_plan(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert "plan pets, overlap" in answer.stdout
    rows = [line.split() for line in answer.stdout.splitlines()]
    assert ["0", "masks", "2", "2", "0", "1", "0"] in rows
    assert ["1", "tags", "1", "2", "1", "0", "0"] in rows
    assert ["0", "cat", "2", "2", "1", "1"] in rows
    assert ["1", "dog", "1", "-", "1", "1"] in rows
    assert "nothing is broken" in answer.stdout


def test_broken_data_is_listed_and_ends_with_1(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    (tmp_path / "voc" / "JPEGImages" / "b.jpg").unlink()
    answer = cl4wsis("data", "check", plan)
    assert answer.returncode == 1
    assert "broken: 2 (unreadable image 2)" in answer.stdout
    assert "JPEGImages/b.jpg: cannot be read" in answer.stdout
    assert "Traceback" not in answer.stderr


def test_json_holds_counts_and_findings(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    answer = cl4wsis("data", "check", plan, "--json", "--set", "selection=disjoint")
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["selection"] == "disjoint"
    assert report["is_broken"] is False
    assert [step["images"] for step in report["steps"]] == [1, 1]
    (tmp_path / "voc" / "JPEGImages" / "v.jpg").write_bytes(b"")
    answer = cl4wsis("data", "check", plan, "--json")
    assert answer.returncode == 1
    assert [finding["where"] for finding in json.loads(answer.stdout)["findings"]] == ["evaluation"]


def test_missing_plan_is_an_error() -> None:
    answer = cl4wsis("data", "check", "nowhere")
    assert answer.returncode == 1
    assert "no plan 'nowhere'" in answer.stderr
