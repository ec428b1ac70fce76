"""Loss curves of ten iterations per phase, to tell a refactoring from a change.

``python tests/curves.py`` records them anew in ``tests/golden/curves.json``; do so only in a commit that says why the
losses changed.
"""

import json
import tempfile
from pathlib import Path

from tiny import GENTLE, no_dropout, read_losses, tiny_plan

from cl4wsis_train.trainer import build_fabric, train_step

RECORDED = Path(__file__).with_name("golden") / "curves.json"

Curves = dict[str, list[dict[str, float]]]


def train_curves(run: Path) -> Curves:
    """Train two steps on one CPU process and return the losses of every iteration by phase."""
    epochs = [f"recipe.{phase}.epochs=5" for phase in ("base", "semantic", "instance")]
    plan = tiny_plan(*GENTLE, *epochs)
    fabric = build_fabric(plan, "cpu", 1)
    with no_dropout():
        folders = [train_step(plan, step, run, fabric=fabric, evaluate=False) for step in (0, 1)]
    return read_losses(folders[0]) | read_losses(folders[1])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        curves = train_curves(Path(folder))
    rounded = {
        phase: [{name: float(f"{value:.6g}") for name, value in losses.items()} for losses in curve]
        for phase, curve in curves.items()
    }
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
