"""What training tells while it runs: ``metrics.jsonl``, TensorBoard, and one line of progress with the time left."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
_TENSORBOARD_FOLDER = "tensorboard"


class TrainingLog:
    """Writes the losses of a step; does nothing in processes other than the first.

    Losses are summed on their device and read back only every ``log_every`` iterations.

    Args:
        folder: step folder that receives ``metrics.jsonl`` and the TensorBoard events.
        enabled: whether this process writes.
        resume: go on with the existing file instead of starting anew.
    """

    def __init__(self, folder: Path, enabled: bool, resume: bool) -> None:
        self.folder, self.enabled = folder, enabled
        if enabled and not resume:
            (folder / METRICS_FILE).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        if self.enabled:
            self._file = (self.folder / METRICS_FILE).open("a", encoding="utf-8")
            self._writer = SummaryWriter(str(self.folder / _TENSORBOARD_FOLDER))
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
        self._phase, self._sums, self._count = name, {}, 0
        self._sums: dict[str, Tensor] = {}
        self._time = time.monotonic()
        if self.enabled:
            self._task: TaskID = self._progress.add_task(name, total=total, completed=done, loss="")

    def update(self, iteration: int, epoch: int, losses: dict[str, Tensor], lr: float, log_every: int) -> None:
        """Take the losses of one iteration; write their means every ``log_every`` iterations."""
        if not self.enabled:
            return
        self._progress.update(self._task, completed=iteration)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1
        if self._count == log_every:
            self._write(iteration, epoch, lr)

    def end_phase(self) -> None:
        """Forget the iterations since the last line."""
        self._sums, self._count = {}, 0

    def _write(self, iteration: int, epoch: int, lr: float) -> None:
        names = list(self._sums)
        values = (torch.stack([self._sums[name] for name in names]).float() / self._count).tolist()
        losses = dict(zip(names, values, strict=True))
        now = time.monotonic()
        line = {
            "phase": self._phase,
            "iteration": iteration,
            "epoch": epoch,
            "losses": losses,
            "lr": lr,
            "seconds_per_iteration": (now - self._time) / self._count,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in losses.items():
            self._writer.add_scalar(f"{self._phase}/{name}", value, iteration)
        self._progress.update(self._task, loss=f"loss {sum(values):.3f}")
        self._sums, self._count, self._time = {}, 0, now
