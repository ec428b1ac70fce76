"""Measure what a bundle costs on this machine: every graph on every backend, stage by stage, in one run.

Each graph on each backend lives in a process of its own, so that memory is told apart. The processes take turns, image
batch by image batch, and never work at the same time: what else goes on in the machine hits all of them alike.

Stages of one batch, all in milliseconds of wall-clock time:

- ``decode``: image files to arrays. ``pre``: arrays to the network input.
- ``network``: the graph. With ``post=graph`` the grouping is part of it, with ``post=host`` it is not.
- ``post``: from what the graph gave to instances in pixels of the source. ``encode``: id maps to PNG.
- ``total``: all of them, and what lies between.
"""

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl4wsis import __version__
from cl4wsis.bundle import Bundle
from cl4wsis.config import Settings
from cl4wsis.cores import usable_cores
from cl4wsis.errors import BackendError, Cl4wsisError
from cl4wsis.images import encode_png, read_image
from cl4wsis_serve.backends.base import Backend, Device, Outputs
from cl4wsis_serve.predictor import Predictor
from cl4wsis_serve.verify import Choice, Skipped

STAGES = ("decode", "pre", "network", "post", "encode", "total")
_WARM_UP_ROUNDS = 3
_PATIENCE_SECONDS = 3600.0  # an engine may be built when a backend is opened
_DISTRIBUTIONS = ("numpy", "opencv-python-headless", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")

Progress = Callable[[int, int], None]
"""Called with the number of rounds done and of all."""


class Quantiles(Settings):
    """Times of one stage over all rounds, ms per batch."""

    p50: float
    p95: float


class BenchmarkRow(Settings):
    """One graph on one backend with one batch size."""

    precision: str
    post: str
    backend: str
    batch: int
    stages: dict[str, Quantiles]
    """By :data:`STAGES`."""
    images_per_second: float
    """Images over the mean of ``total``, one batch after the other."""
    peak_memory_mib: float
    """Largest resident memory of the process up to here, Python and libraries included; batch sizes run in order."""
    open_seconds: float
    """From the bundle's path to a model that is ready."""


class Hardware(Settings):
    """Where it was measured."""

    cpu: str
    cores: int
    """Cores this process may use."""
    memory_gib: float | None
    gpus: tuple[str, ...]
    platform: str


class BenchmarkReport(Settings):
    """What was measured in one run."""

    bundle: str
    name: str
    input_size: tuple[int, int]
    """(height, width), px."""
    images: str
    """The images, in words."""
    rounds: int
    threads: int
    """CPU threads of each backend."""
    hardware: Hardware
    versions: dict[str, str]
    created: str
    """Time, ISO 8601, UTC."""
    rows: tuple[BenchmarkRow, ...]
    skipped: dict[str, str]
    """What was not measured, and why."""


@dataclass(frozen=True)
class _Ready:
    """First word of a process: it has opened its model."""

    open_seconds: float


@dataclass(frozen=True)
class _Measured:
    """Answer of a process to a batch size."""

    milliseconds: tuple[float, ...]  # in the order of STAGES
    peak_memory_mib: float


@dataclass(frozen=True)
class _Failed:
    """A process that cannot go on."""

    reason: str


class _Worker:
    """The process of one graph on one backend, as its parent sees it."""

    def __init__(self, choice: Choice, process: BaseProcess, connection: Connection) -> None:
        self.choice = choice
        self.open_seconds = 0.0
        self.peak_memory_mib: dict[int, float] = {}
        self.samples: dict[int, list[tuple[float, ...]]] = {}
        self._process = process
        self._connection = connection

    def wait_until_ready(self) -> None:
        """Wait for the model to be opened.

        Raises:
            BackendError: it cannot be.
        """
        self.open_seconds = self._receive(_Ready).open_seconds

    def measure(self, batch: int, keep: bool) -> None:
        """Run one batch; the memory of the first time counts, as later ones follow larger batches.

        Raises:
            BackendError: the process failed or is gone.
        """
        with suppress(OSError):  # what it said last, or how it ended, is told below
            self._connection.send(batch)
        measured = self._receive(_Measured)
        self.peak_memory_mib.setdefault(batch, measured.peak_memory_mib)
        if keep:
            self.samples.setdefault(batch, []).append(measured.milliseconds)

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, kind: Any) -> Any:
        try:
            answer = self._connection.recv() if self._connection.poll(_PATIENCE_SECONDS) else _Failed("gave no answer")
        except (EOFError, OSError):
            self._process.join(10)
            answer = _Failed(
                f"its process ended with exit code {self._process.exitcode} (-9 is often a lack of memory)"
            )
        if not isinstance(answer, kind):
            raise BackendError(answer.reason if isinstance(answer, _Failed) else f"unexpected answer {answer!r}")
        return answer


class _TimedBackend:
    """Notes when the graph begins and ends, for the stages around it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.started = self.ended = 0.0
        self.seconds = 0.0

    @property
    def name(self) -> str:
        """That of the backend."""
        return self._backend.name

    @property
    def device(self) -> Device:
        """That of the backend."""
        return self._backend.device

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        """Run the graph; a batch may take several runs."""
        begin = time.perf_counter()
        if not self.seconds:
            self.started = begin
        outputs = self._backend.run(images)
        self.ended = time.perf_counter()
        self.seconds += self.ended - begin
        return outputs


# --- the parent ---


def benchmark_bundle(
    bundle: Bundle,
    images: Sequence[Path],
    description: str,
    choices: Sequence[Choice],
    batches: Sequence[int] = (1, 4, 8),
    rounds: int = 20,
    threads: int | None = None,
    gpus: Sequence[str] = (),
    skipped: Sequence[Skipped] = (),
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Measure a bundle.

    Args:
        bundle: to be measured.
        images: image files; batches are taken from them in turn.
        description: what the images are, in words.
        choices: graphs and backends, see :func:`cl4wsis_serve.verify.choose`.
        batches: images per batch.
        rounds: batches of each size that count; a few more come first and do not.
        threads: CPU threads of each backend; all usable cores when not given.
        gpus: names of GPUs, for the report.
        skipped: what is not measured at all, for the report.
        progress: told how far it is.

    Raises:
        BackendError: nothing could be measured.
    """
    sizes = sorted(set(batches))
    left_out = dict(skipped)
    with _workers(bundle, images, choices, threads, left_out) as workers:
        for number in range(_WARM_UP_ROUNDS + rounds):
            _take_turns(workers, number, sizes, left_out)
            if progress is not None:
                progress(number + 1, _WARM_UP_ROUNDS + rounds)
    rows = [_row(worker, batch) for worker in workers for batch in sizes]
    if not rows:
        reasons = "; ".join(f"{what}: {reason}" for what, reason in left_out.items())
        raise BackendError(f"{bundle.path}: nothing could be measured here. {reasons}")
    return BenchmarkReport(
        bundle=str(bundle.path),
        name=bundle.manifest.name,
        input_size=bundle.manifest.input.size,
        images=description,
        rounds=rounds,
        threads=threads or usable_cores(),
        hardware=describe_hardware(gpus),
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=tuple(sorted(rows, key=lambda row: (row.batch, row.backend, row.precision, row.post))),
        skipped=left_out,
    )


@contextmanager
def _workers(
    bundle: Bundle, images: Sequence[Path], choices: Sequence[Choice], threads: int | None, left_out: dict[str, str]
) -> Iterator[list[_Worker]]:
    """Give one process per choice that has opened its model; one after the other, as opening is timed."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the memory of its parent
    ready: list[_Worker] = []
    try:
        for choice in choices:
            ours, theirs = context.Pipe()
            arguments = (theirs, str(bundle.path), choice, [str(path) for path in images], threads)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            worker = _Worker(choice, process, ours)
            if _try(worker, worker.wait_until_ready, left_out):
                ready.append(worker)
            else:
                worker.stop()
        yield ready
    finally:
        for worker in ready:
            worker.stop()


def _take_turns(workers: list[_Worker], number: int, batches: Sequence[int], left_out: dict[str, str]) -> None:
    """Let every process run one batch of each size; whoever fails is taken off the list."""
    for batch in batches:
        first = number % len(workers) if workers else 0
        for worker in (*workers[first:], *workers[:first]):  # nobody always follows the same neighbour
            if not _try(worker, partial(worker.measure, batch, number >= _WARM_UP_ROUNDS), left_out):
                workers.remove(worker)
                worker.stop()


def _try(worker: _Worker, action: Callable[[], None], left_out: dict[str, str]) -> bool:
    try:
        action()
    except BackendError as error:
        left_out[str(worker.choice)] = str(error)
        return False
    return True


def _row(worker: _Worker, batch: int) -> BenchmarkRow:
    times = np.array(worker.samples[batch])  # (rounds, stages)
    p50, p95 = np.percentile(times, (50, 95), axis=0)
    return BenchmarkRow(
        precision=worker.choice.precision,
        post=worker.choice.post,
        backend=worker.choice.backend,
        batch=batch,
        stages={
            stage: Quantiles(p50=float(low), p95=float(high)) for stage, low, high in zip(STAGES, p50, p95, strict=True)
        },
        images_per_second=float(1000 * batch / times[:, -1].mean()),
        peak_memory_mib=worker.peak_memory_mib[batch],
        open_seconds=worker.open_seconds,
    )


# --- the processes ---


def _work(connection: Connection, path: str, choice: Choice, images: Sequence[str], threads: int | None) -> None:
    """Open a model, and answer every batch size that is asked for until the other side hangs up."""
    try:
        start = time.perf_counter()
        predictor = Predictor.open(path, choice.backend, precision=choice.precision, post=choice.post, threads=threads)
        connection.send(_Ready(time.perf_counter() - start))
        position = 0
        while True:
            batch = connection.recv()
            files = [images[(position + offset) % len(images)] for offset in range(batch)]
            position += batch
            connection.send(_Measured(time_stages(predictor, files), _peak_memory_mib()))
    except (EOFError, KeyboardInterrupt):
        return
    except Cl4wsisError as error:
        connection.send(_Failed(str(error)))


def time_stages(predictor: Predictor, files: Sequence[str]) -> tuple[float, ...]:
    """Take one batch of image files from end to end.

    Args:
        predictor: an open model.
        files: paths; as many as the batch is large.

    Returns:
        Milliseconds of each of :data:`STAGES`.
    """
    backend = predictor.backend
    timed = _TimedBackend(backend)
    predictor.backend = timed
    try:
        start = time.perf_counter()
        images = [read_image(file) for file in files]
        decoded = time.perf_counter()
        answers = predictor.predict_batch(images)
        predicted = time.perf_counter()
        for answer in answers:
            encode_png(answer.instance_ids.astype(np.uint8))
        end = time.perf_counter()
    finally:
        predictor.backend = backend
    around = predicted - decoded - timed.seconds  # fitting before the first run, and all but the runs after it
    pre = timed.started - decoded
    seconds = (decoded - start, pre, timed.seconds, around - pre, end - predicted, end - start)
    return tuple(1000 * value for value in seconds)


def _peak_memory_mib() -> float:
    """Return the largest resident memory of this process so far.

    Linux counts a process's own from its start in ``VmHWM``, whereas ``ru_maxrss`` begins with that of the parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


# --- the report ---


def markdown_from_report(report: BenchmarkReport) -> str:
    """Write the report as Markdown: a table per batch size, p50 with p95 in brackets."""
    height, width = report.input_size
    machine = report.hardware
    memory = f", {machine.memory_gib:.0f} GiB" if machine.memory_gib is not None else ""
    lines = [
        f"# {report.name}",
        "",
        f"Input {width}x{height} px, {report.images}, {report.rounds} batches of each size, {report.threads} threads. "
        "All rows were measured in one run, in turns.",
        "",
        f"- CPU: {machine.cpu}, {machine.cores} cores{memory}, {machine.platform}",
        f"- GPU: {'; '.join(machine.gpus) or 'none'}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        f"- Measured: {report.created}",
        "",
        "Times are ms per batch: p50 (p95). With `post` = graph the grouping is part of `network`.",
    ]
    for batch in sorted({row.batch for row in report.rows}):
        lines += ["", f"## Batch {batch}", "", *_markdown_table([row for row in report.rows if row.batch == batch])]
    if report.skipped:
        lines += ["", "## Not measured", "", *(f"- {what}: {reason}" for what, reason in report.skipped.items())]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[BenchmarkRow]) -> list[str]:
    columns = ["backend", "precision", "post", *STAGES, "images/s", "peak MiB", "open s"]
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * 3 + ['---:'] * (len(columns) - 3))} |"]
    for row in rows:
        times = [f"{row.stages[stage].p50:.1f} ({row.stages[stage].p95:.1f})" for stage in STAGES]
        figures = [f"{row.images_per_second:.1f}", f"{row.peak_memory_mib:.0f}", f"{row.open_seconds:.2f}"]
        lines.append(f"| {' | '.join([row.backend, row.precision, row.post, *times, *figures])} |")
    return lines


def describe_hardware(gpus: Sequence[str] = ()) -> Hardware:
    """Name CPU, cores and memory of this machine."""
    return Hardware(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_gib=_memory_gib(),
        gpus=tuple(gpus),
        platform=platform.platform(terse=True),
    )


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return None


def _versions() -> dict[str, str]:
    found = {"cl4wsis": __version__, "python": platform.python_version()}
    for distribution in _DISTRIBUTIONS:
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found
