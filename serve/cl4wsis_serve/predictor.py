"""The Predictor: a bundle, a backend, and images of any size in between."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cl4wsis.bundle import Bundle, Manifest, Post, Precision, open_bundle
from cl4wsis.errors import BackendError, BundleError, Cl4wsisError, DataError
from cl4wsis.folders import folder_identity
from cl4wsis.geometry import FitTransform, restore_instances
from cl4wsis.grouping import group_maps
from cl4wsis.images import read_image
from cl4wsis.instances import Instances
from cl4wsis.preprocess import prepare_batch, prepare_image, stack_frames
from cl4wsis.steps import ClassInfo
from cl4wsis_serve.backends.base import MAP_NAMES, Backend, Outputs, check_maps, check_outputs
from cl4wsis_serve.selection import Selection, select_backend

Image = NDArray[np.uint8]


class Readable(Protocol):
    """A source that reads its own image, in another thread where images are streamed."""

    def read(self) -> Image:
        """Return (H, W, 3) uint8 RGB, or raise a DataError."""
        ...


Source = str | Path | Image | Readable
SourceT = TypeVar("SourceT", bound=Source)

_REPLACED_MEANWHILE = 5
"""How often a bundle may be replaced while it is opened."""
_READERS = 2
"""Threads that read and fit images while the graph runs."""

_Prepared = tuple[Image, FitTransform] | Cl4wsisError


class Predictor:
    """A model that is ready to answer. Threads may share it; they take turns.

    Args:
        manifest: classes, input rule and outputs of the graph.
        backend: runs the graph.
        skipped: what was passed over when the backend was chosen, with the reasons.
        precision: of the graph.
        post: where pixels are grouped: in the ``graph`` that the backend runs, or here on the ``host``.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        skipped: dict[str, str] | None = None,
        precision: Precision = "float32",
        post: Post = "graph",
    ) -> None:
        self.manifest = manifest
        self.backend = backend
        self.skipped = skipped or {}
        self.precision = precision
        self.post = post
        self._turn = Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        backend: str = "auto",
        precision: Precision | Literal["auto"] = "auto",
        post: Post | Literal["auto"] = "auto",
        threads: int | None = None,
        allow_fallback: bool = False,
        self_test: bool = False,
    ) -> "Predictor":
        """Open a bundle, or an ``.onnx`` file by itself.

        Runtimes may read weights from the files for as long as the model is used, so files must not be overwritten in
        place; an export replaces the whole folder.

        Args:
            path: of the bundle folder or the file.
            backend: a name from :data:`cl4wsis_serve.BACKENDS`, or ``auto`` for the first of them that works here.
            precision: of the network; ``auto`` is float32.
            post: where pixels are grouped; ``auto`` is the ``host`` for backends on the CPU and the ``graph`` for those
                on a GPU, where each is faster. Both give the same instances.
            threads: CPU threads within one operator; all usable cores when not given.
            allow_fallback: use another backend, with a warning, where the one asked for cannot run.
            self_test: compare the answers to the bundle's golden inputs with those stored in it first.

        Raises:
            BundleError: the bundle is missing, damaged, not one of ours, or holds no such graph.
            BackendError: the backend is unknown, cannot run here or fails the self-test; the message says why and what
                to do.
        """
        bundle, selection = _open_one(
            Path(path), lambda found: select_backend(found, backend, precision, post, threads, allow_fallback)
        )
        variant = selection.variant
        predictor = cls(bundle.manifest, selection.backend, selection.skipped, variant.precision, variant.post)
        if self_test:
            from cl4wsis_serve.selftest import run_self_test

            run_self_test(predictor, bundle)
        return predictor

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes of the model, in label order."""
        return self.manifest.classes

    @property
    def model_id(self) -> dict[str, str | int]:
        """What tells this model from any other: its name and step, its weights, and when it was exported."""
        manifest = self.manifest
        return {
            "name": manifest.name,
            "step": manifest.step,
            "weights_sha256": manifest.weights_sha256,
            "exported": manifest.created,
        }

    def predict(self, image: Source) -> Instances:
        """Find the instances of one image.

        Args:
            image: (H, W, 3) uint8 RGB, the path of an image file, or what reads itself.

        Returns:
            Instances in pixels of that image; each has at least one pixel there.

        Raises:
            DataError: the file cannot be read.
            BackendError: the runtime failed.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Source]) -> list[Instances]:
        """Find the instances of several images, of any sizes, in one run of the graph.

        Raises:
            DataError: a file cannot be read.
            BackendError: the runtime failed.
        """
        frames, transforms = prepare_batch([_load(image) for image in images], self.manifest.input)
        return self._run(frames, transforms)

    def stream(
        self, sources: Iterable[SourceT], batch_size: int = 1
    ) -> Iterator[tuple[SourceT, Instances | Cl4wsisError]]:
        """Predict any number of images in bounded memory; files are read by other threads while the graph runs.

        An array is fitted as soon as it is taken, so a camera may fill the same one again and again, and no source is
        taken beyond the batch that it completes: the answers come before the next picture has to exist. Where sources
        end with an exception, all that were given before it are answered first.

        Args:
            sources: paths, (H, W, 3) uint8 RGB images, or what reads itself.
            batch_size: images per run of the graph.

        Yields:
            Each source, in order, with its instances, or with the error if it cannot be read.

        Raises:
            ValueError: an array has another shape or type.
            BackendError: the runtime failed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, found {batch_size}")
        remaining = iter(sources)
        waiting: deque[tuple[SourceT, Future[_Prepared]]] = deque()
        failure: Exception | None = None
        reader = ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="cl4wsis-read")
        try:
            while True:
                if failure is None:
                    failure = self._take(remaining, waiting, batch_size, reader)
                if not waiting:
                    break
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                yield from self._answer([(source, future.result()) for source, future in batch])
        finally:
            reader.shutdown(wait=True, cancel_futures=True)
        if failure is not None:
            raise failure

    def _take(
        self,
        sources: Iterator[SourceT],
        waiting: deque[tuple[SourceT, Future[_Prepared]]],
        batch_size: int,
        reader: ThreadPoolExecutor,
    ) -> Exception | None:
        """Take sources for the next batch, and of files also those for the one after it.

        Returns:
            The error with which the sources end, if they do.
        """
        try:
            for source in sources:
                future = reader.submit(self._prepare, source)
                if is_array := isinstance(source, np.ndarray):
                    future.result()  # whoever gave the array may change it when asked for the next one
                waiting.append((source, future))
                if len(waiting) >= (batch_size if is_array else 2 * batch_size):
                    break
        except Exception as error:  # whatever the caller's iterator raises
            return error
        return None

    def _prepare(self, source: Source) -> _Prepared:
        try:
            return prepare_image(_load(source), self.manifest.input)
        except DataError as error:
            return error

    def _answer(self, batch: Sequence[tuple[SourceT, _Prepared]]) -> Iterator[tuple[SourceT, Instances | Cl4wsisError]]:
        readable = [prepared for _, prepared in batch if not isinstance(prepared, Cl4wsisError)]
        frames = [frame for frame, _ in readable]
        answers = iter(self._run(stack_frames(frames), [transform for _, transform in readable]) if frames else ())
        for source, prepared in batch:
            yield source, prepared if isinstance(prepared, Cl4wsisError) else next(answers)

    def _run(self, frames: Image, transforms: Sequence[FitTransform]) -> list[Instances]:
        with self._turn:  # outputs are valid until the backend runs again
            outputs = self.backend.run(frames)
            if self.post == "graph":
                check_outputs(outputs, len(frames), self.manifest.input.size, len(self.classes))
                rows = ({name: values[row] for name, values in outputs.items()} for row in range(len(frames)))
                found = [Instances.from_slots(row) for row in rows]
            else:
                check_maps(outputs, len(frames), len(self.classes))
                found = [self._group(outputs, row) for row in range(len(frames))]
        return [self._restore(instances, transform) for instances, transform in zip(found, transforms, strict=True)]

    def _restore(self, instances: Instances, transform: FitTransform) -> Instances:
        """Bring one image's instances back to its own pixels."""
        if self.post == "host" and transform.source_size == transform.frame_size:
            return instances.select(instances.boxes[:, 2] > 0)  # measured here a moment ago
        return restore_instances(instances, transform, self.manifest.grouping.min_area)

    def _group(self, outputs: Outputs, row: int) -> Instances:
        """Group one image's maps here."""
        logits, heatmap, offsets = (outputs[name][row] for name in MAP_NAMES)
        try:
            return group_maps(logits, heatmap, offsets, self.manifest.input.size, self.manifest.grouping)
        except ValueError as error:
            raise BackendError(f"the graph's maps cannot be grouped: {error}; export the step again") from error


def _open_one(path: Path, load: Callable[[Bundle], Selection]) -> tuple[Bundle, Selection]:
    """Open a bundle and load a graph of it; where an export replaces the folder meanwhile, the new one.

    Manifest and graph are found by their paths one after the other, and must not be of two bundles.
    """
    for is_last in (*[False] * _REPLACED_MEANWHILE, True):
        before = folder_identity(path)
        try:
            bundle = open_bundle(path)
            selection = load(bundle)
        except Cl4wsisError:
            if is_last or folder_identity(path) == before is not None:
                raise
            continue
        if folder_identity(path) == before:
            return bundle, selection
    raise BundleError(f"{path}: is being replaced again and again; open it once its export has ended")


def _load(source: Source) -> Image:
    if isinstance(source, np.ndarray):
        return source
    return read_image(source) if isinstance(source, str | PathLike) else source.read()
