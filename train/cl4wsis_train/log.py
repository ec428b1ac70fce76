"""What training tells while it runs: ``metrics.jsonl``, TensorBoard, and one line of progress with the time left."""

import json
import math
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cl4wsis.errors import RunError
from cl4wsis.steps import write_text_atomically
from cl4wsis_train.processes import mean_over_processes

METRICS_FILE = "metrics.jsonl"
_TENSORBOARD_FOLDER = "tensorboard"


class TrainingLog:
    """Writes the losses of a step, averaged over all processes; only the first process writes.

    Losses are summed on their device and read back only every ``log_every`` iterations.

    Args:
        folder: step folder that receives ``metrics.jsonl`` and the TensorBoard events.
        log_every: iterations between two lines.
        enabled: whether this process writes.
        done: phase and iteration after which an interrupted training goes on; lines after it are dropped, all of them
            when not given.
    """

    def __init__(self, folder: Path, log_every: int, enabled: bool, done: tuple[str, int] | None) -> None:
        self.folder, self.log_every, self.enabled = folder, log_every, enabled
        if enabled:
            _cut_back(folder / METRICS_FILE, done)

    def __enter__(self) -> Self:
        if self.enabled:
            self._file = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
            self._writer = self._open_tensorboard()
            self._progress = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=30),
                TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[loss]}"),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self._progress.stop()
            self._writer.close()
            self._file.close()

    def start_phase(self, name: str, total: int, done: int) -> None:
        """Announce a phase.

        Args:
            name: of the phase.
            total: iterations in all.
            done: iterations done before an interruption.
        """
        self._phase, self._count, self._time = name, 0, time.monotonic()
        self._sums: dict[str, dict[str, Tensor]] = {"losses": {}, "statistics": {}}
        if self.enabled:
            self._task: TaskID = self._progress.add_task(name, total=total, completed=done, loss="")

    def update(
        self, iteration: int, epoch: int, losses: dict[str, Tensor], statistics: dict[str, Tensor], lr: float
    ) -> None:
        """Take the losses and statistics of one iteration; write their means every ``log_every`` iterations."""
        if self.enabled:
            self._progress.update(self._task, completed=iteration)
        for kind, values in (("losses", losses), ("statistics", statistics)):
            sums = self._sums[kind]
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach()
        self._count += 1
        self._last = iteration, epoch, lr
        if self._count == self.log_every:
            self.flush()

    def flush(self) -> None:
        """Write the means of the iterations since the last line.

        Raises:
            RunError: a loss is not finite, so that going on would teach nothing.
        """
        if not self._count:
            return
        iteration, epoch, lr = self._last
        means = {kind: self._means(sums) for kind, sums in self._sums.items()}
        broken = [name for name, value in means["losses"].items() if not math.isfinite(value)]
        if broken:
            raise RunError(
                f"phase {self._phase}: loss '{broken[0]}' is not finite after {iteration} iterations; delete "
                f"{self.folder} and start again with lower learning rates (recipe.{self._phase}.optimizer)"
            )
        now = time.monotonic()
        if self.enabled:
            self._write_line(iteration, epoch, lr, means, now)
        self._sums, self._count, self._time = {"losses": {}, "statistics": {}}, 0, now

    def _write_line(
        self, iteration: int, epoch: int, lr: float, means: dict[str, dict[str, float]], now: float
    ) -> None:
        line: dict[str, Any] = {
            "phase": self._phase,
            "iteration": iteration,
            "epoch": epoch,
            **{kind: values for kind, values in means.items() if values},
            "lr": lr,
            "seconds_per_iteration": (now - self._time) / self._count,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        _add_scalars(self._writer, line)
        self._progress.update(self._task, loss=f"loss {sum(means['losses'].values()):.3f}")

    def _open_tensorboard(self) -> SummaryWriter:
        """Write the events of the lines that are kept anew: those of an interrupted training hold more."""
        folder = self.folder / _TENSORBOARD_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        writer = SummaryWriter(str(folder))
        for line in (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines():
            _add_scalars(writer, json.loads(line))
        return writer

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Read all sums back in one transfer."""
        if not sums:
            return {}
        values = mean_over_processes(torch.stack(list(sums.values())).float() / self._count).tolist()
        return dict(zip(sums, values, strict=True))


def _add_scalars(writer: SummaryWriter, line: dict[str, Any]) -> None:
    """Show a line of ``metrics.jsonl`` in TensorBoard."""
    for kind in ("losses", "statistics"):
        for name, value in line.get(kind, {}).items():
            writer.add_scalar(f"{line['phase']}/{name}", value, line["iteration"])


def _cut_back(path: Path, done: tuple[str, int] | None) -> None:
    """Keep the lines up to the iteration after which training goes on; later ones are about to be written again."""
    if done is None or not path.exists():
        path.unlink(missing_ok=True)
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:  # the process ended in the middle of a line
            break
        if entry["phase"] == done[0] and entry["iteration"] > done[1]:
            break
        kept.append(line)
        if (entry["phase"], entry["iteration"]) == done:
            break
    write_text_atomically(path, "".join(kept))
