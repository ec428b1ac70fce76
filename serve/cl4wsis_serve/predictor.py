"""The Predictor: a bundle, a backend, and images of any size in between."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cl4wsis.bundle import Bundle, Manifest, open_bundle
from cl4wsis.errors import BackendError, Cl4wsisError, DataError
from cl4wsis.geometry import FitTransform, restore_instances
from cl4wsis.images import read_image
from cl4wsis.instances import Instances
from cl4wsis.preprocess import prepare_batch, prepare_image
from cl4wsis.steps import ClassInfo
from cl4wsis_serve.backends.base import Backend, Outputs, check_outputs

Image = NDArray[np.uint8]
Source = str | Path | Image
SourceT = TypeVar("SourceT", bound=Source)

BACKENDS = ("onnxruntime-cuda", "onnxruntime")
"""Backends in the order in which ``auto`` tries them."""

_READERS = 2
"""Threads that read and fit images while the graph runs."""

_Prepared = tuple[Image, FitTransform] | Cl4wsisError


class Predictor:
    """A model that is ready to answer.

    Args:
        manifest: classes, input rule and outputs of the graph.
        backend: runs the graph.
        skipped: backends that ``auto`` passed over, with the reasons.
    """

    def __init__(self, manifest: Manifest, backend: Backend, skipped: dict[str, str] | None = None) -> None:
        self.manifest = manifest
        self.backend = backend
        self.skipped = skipped or {}

    @classmethod
    def open(cls, path: str | Path, backend: str = "auto", threads: int | None = None) -> "Predictor":
        """Open a bundle, or an ``.onnx`` file by itself.

        Args:
            path: of the bundle folder or the file.
            backend: one of :data:`BACKENDS`, or ``auto`` for the first that works here.
            threads: CPU threads within one operator; all usable cores when not given.

        Raises:
            BundleError: the bundle is missing, damaged or not one of ours.
            BackendError: the backend is unknown, or cannot run here; the message says why and what to do.
        """
        bundle = open_bundle(Path(path))
        opened, skipped = _open_backend(bundle, backend, threads)
        return cls(bundle.manifest, opened, skipped)

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
            image: (H, W, 3) uint8 RGB, or the path of an image file.

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

        Args:
            sources: paths or (H, W, 3) uint8 RGB images.
            batch_size: images per run of the graph.

        Yields:
            Each source, in order, with its instances, or with the error if it cannot be read.

        Raises:
            BackendError: the runtime failed.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, found {batch_size}")
        remaining = iter(sources)
        waiting: deque[tuple[SourceT, Future[_Prepared]]] = deque()
        reader = ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="cl4wsis-read")
        try:
            while True:
                for source in islice(remaining, 2 * batch_size - len(waiting)):
                    waiting.append((source, reader.submit(self._prepare, source)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                yield from self._answer([(source, future.result()) for source, future in batch])
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, source: Source) -> _Prepared:
        try:
            return prepare_image(_load(source), self.manifest.input)
        except DataError as error:
            return error

    def _answer(self, batch: Sequence[tuple[SourceT, _Prepared]]) -> Iterator[tuple[SourceT, Instances | Cl4wsisError]]:
        readable = [prepared for _, prepared in batch if not isinstance(prepared, Cl4wsisError)]
        frames = [frame for frame, _ in readable]
        answers = iter(self._run(np.stack(frames), [transform for _, transform in readable]) if frames else ())
        for source, prepared in batch:
            yield source, prepared if isinstance(prepared, Cl4wsisError) else next(answers)

    def _run(self, frames: Image, transforms: Sequence[FitTransform]) -> list[Instances]:
        outputs = self.backend.run(frames)
        check_outputs(outputs, len(frames), self.manifest.input.size, len(self.classes))
        return [_instances_of(outputs, row, transform) for row, transform in enumerate(transforms)]


def backend_status() -> dict[str, str | None]:
    """Say for every backend why it cannot be used on this machine; nothing where it can."""
    from cl4wsis_serve.backends.onnxruntime import why_unavailable

    return {"onnxruntime-cuda": why_unavailable("cuda"), "onnxruntime": why_unavailable("cpu")}


def _open_backend(bundle: Bundle, name: str, threads: int | None) -> tuple[Backend, dict[str, str]]:
    if name != "auto":
        return _load_backend(bundle, name, threads), {}
    skipped: dict[str, str] = {}
    for candidate in BACKENDS:
        try:
            return _load_backend(bundle, candidate, threads), skipped
        except BackendError as error:
            skipped[candidate] = str(error)
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in skipped.items())
    raise BackendError(f"no backend can run this model here. {reasons}")


def _load_backend(bundle: Bundle, name: str, threads: int | None) -> Backend:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    from cl4wsis_serve.backends.onnxruntime import OnnxRuntimeBackend

    device: Any = "cuda" if name == "onnxruntime-cuda" else "cpu"
    return OnnxRuntimeBackend(bundle.model, bundle.manifest, device, threads)


def _load(source: Source) -> Image:
    return source if isinstance(source, np.ndarray) else read_image(source)


def _instances_of(outputs: Outputs, row: int, transform: FitTransform) -> Instances:
    """Take one image's slots, unused ones included, and bring back what has pixels in the source image."""
    slots = Instances(
        instance_ids=outputs["instance_ids"][row].astype(np.int32),
        labels=outputs["labels"][row].astype(np.int32),
        scores=outputs["scores"][row].astype(np.float32),
        boxes=outputs["boxes"][row].astype(np.float32),
    )
    return restore_instances(slots, transform)
