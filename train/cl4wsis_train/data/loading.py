"""Loaders of training batches.

Everything random is drawn in the main process: the sampler gives each image of an epoch its own seed, so that batches
do not depend on the number of worker processes. Small data sets are decoded once and held in memory, by each worker
too. Workers come from a fork server and not from a fork of the training process: a fork copies locks that threads of
OpenCV, OpenMP or ONNX Runtime may hold at that moment, and then waits for them for ever.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from cl4wsis.cores import usable_cores
from cl4wsis.datasets import VOID_ID, MaskedPicture, Picture
from cl4wsis.proposals import read_proposals
from cl4wsis.tasks import Plan
from cl4wsis_train.data.batch import Batch, Sample, collate
from cl4wsis_train.data.splits import (
    PhaseName,
    StepView,
    build_step_view,
    select_masked_pictures,
    select_weak_pictures,
)
from cl4wsis_train.data.transforms import Augmentation, Fitting, JointTransform
from cl4wsis_train.processes import num_processes

_CACHE_BYTES = 512 * 2**20
_NUM_PROBES = 16  # images whose mean size tells whether the whole set fits into the cache

Draw = tuple[int, int]  # (index of the image, seed of its augmentation)


@dataclass(frozen=True, eq=False)
class DecodedPicture:
    """An image as it enters the augmentation.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        image_labels: (num_classes,) float32 0/1.
        instance_ids: (H, W) int32 with ``VOID_ID`` where nobody knows, or None without masks.
        labels: (N,) int64, or None without masks.
        proposals: (H, W) int32, or None without mask proposals; an image never has both masks and proposals.
    """

    image: NDArray[np.uint8]
    image_labels: NDArray[np.float32]
    instance_ids: NDArray[np.int32] | None = None
    labels: NDArray[np.int64] | None = None
    proposals: NDArray[np.int32] | None = None

    @property
    def size_bytes(self) -> int:
        """Memory taken by the pixels."""
        maps = (self.instance_ids, self.proposals)
        return self.image.nbytes + sum(pixels.nbytes for pixels in maps if pixels is not None)


class TaggedPictures(Sequence[DecodedPicture]):
    """Decodes images, their tags and, where there are any, their mask proposals; true masks are never read.

    Args:
        pictures: images of the step.
        view: says which tags are visible.
        proposals: folder of mask proposals, or None.
    """

    def __init__(self, pictures: Sequence[Picture], view: StepView, proposals: Path | None = None) -> None:
        self._pictures = pictures
        self._view = view
        self._proposals = proposals

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> DecodedPicture:  # type: ignore[override]
        picture = self._pictures[index]
        image, labels = picture.read(), self._view.image_labels(picture.tags)
        if self._proposals is None:
            return DecodedPicture(image, labels)
        height, width = image.shape[:2]
        return DecodedPicture(
            image, labels, proposals=read_proposals(self._proposals, picture.name, height, width).id_map()
        )


class MaskedPictures(Sequence[DecodedPicture]):
    """Decodes images, their tags and the visible instances.

    Args:
        pictures: images of the step.
        view: says which tags and masks are visible.
    """

    def __init__(self, pictures: Sequence[MaskedPicture], view: StepView) -> None:
        self._pictures = pictures
        self._view = view

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> DecodedPicture:  # type: ignore[override]
        picture, view = self._pictures[index], self._view
        instance_ids, mask_labels = picture.rasterize(view.mask_names)
        class_labels = np.array([view.class_names.index(name) for name in view.mask_names], dtype=np.int64)
        return DecodedPicture(picture.read(), view.image_labels(picture.tags), instance_ids, class_labels[mask_labels])


class StepDataset(Dataset[Sample]):
    """Transformed training images of one step; an item is asked for with its seed.

    Args:
        pictures: what to transform.
        transform: an augmentation, or the deployed preprocessing.
    """

    def __init__(self, pictures: Sequence[DecodedPicture], transform: JointTransform) -> None:
        self._pictures = pictures
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, draw: Draw) -> Sample:
        index, seed = draw
        picture = self._pictures[index]
        image_labels = torch.from_numpy(picture.image_labels)
        if picture.instance_ids is None or picture.labels is None:
            image, proposals = self._transform(picture.image, picture.proposals, seed)
            return Sample(image, image_labels, proposals=proposals)
        image, instance_ids = self._transform(picture.image, picture.instance_ids, seed)
        assert instance_ids is not None
        void = instance_ids == VOID_ID
        return Sample(
            image=image,
            image_labels=image_labels,
            instance_ids=instance_ids.clamp_(min=0),
            labels=torch.from_numpy(picture.labels),
            void=void if bool(void.any()) else None,
        )


class SeededSampler(Sampler[Draw]):
    """Shuffles images and gives each its own seed.

    Args:
        num_images: size of the data set.
        min_draws: draws of a pass at least; smaller data sets are gone through more than once.
        multiple: a pass is cut to a multiple of this many draws; what the cut leaves out fills no batch anyway.
        generator: its seed starts a series of passes, each unlike the last; giving it another seed starts another
            series. Only the seed is looked at: how many numbers a loader draws from it depends on its workers.
    """

    def __init__(self, num_images: int, min_draws: int, generator: torch.Generator, multiple: int = 1) -> None:
        self._num_images = num_images
        self._num_draws = max(num_images, min_draws) // multiple * multiple
        self._generator = generator
        self._seed, self._num_passes = generator.initial_seed(), 0

    def __len__(self) -> int:
        return self._num_draws

    def __iter__(self) -> Iterator[Draw]:
        if self._seed != self._generator.initial_seed():
            self._seed, self._num_passes = self._generator.initial_seed(), 0
        rng = np.random.default_rng([self._seed % 2**64, self._num_passes])
        self._num_passes += 1
        num_rounds = -(-self._num_draws // self._num_images)
        indices = np.concatenate([rng.permutation(self._num_images) for _ in range(num_rounds)])[: self._num_draws]
        seeds = rng.integers(2**62, size=self._num_draws)
        return zip(indices.tolist(), seeds.tolist(), strict=True)


def build_training_loader(plan: Plan, step: int, phase: PhaseName, batch_size: int, seed: int) -> "DataLoader[Batch]":
    """Build the loader of a phase.

    A pass goes once through the step's images in random order; what does not fill a batch is left out, but a set
    smaller than one batch (of all processes together) is repeated until it fills one. Passes follow from the seed,
    whatever the number of workers; giving ``loader.generator`` another seed starts another series of passes.

    Args:
        plan: gives data, recipe and classes.
        step: step number.
        phase: ``base`` reads masks; ``semantic`` and ``instance`` open tags alone, and mask proposals if there are any.
        batch_size: images per batch in this process.
        seed: decides order and augmentation.

    Raises:
        DataError: annotations cannot be read, or no image belongs to the step.
        ValueError: the phase does not exist in this step.
    """
    recipe = plan.recipe
    pictures = _decode_if_small(_select_pictures(plan, step, phase))
    dataset = StepDataset(pictures, Augmentation(recipe.crop_size, recipe.crop_area))
    generator = torch.Generator().manual_seed(seed)
    global_batch_size = batch_size * num_processes()
    sampler = SeededSampler(len(pictures), global_batch_size, generator, global_batch_size)
    return _build_loader(dataset, batch_size, sampler, recipe.num_workers, generator)


def build_fitted_loader(
    plan: Plan, step: int, phase: PhaseName, batch_size: int, padding: Sequence[int]
) -> "DataLoader[Batch]":
    """Build a loader that goes once through all images of a phase, preprocessed as deployed, in the order of the data.

    Every process gets all images.

    Args:
        plan: gives data, recipe and classes.
        step: step number.
        phase: as in :func:`build_training_loader`.
        batch_size: images per batch; the last batch may be smaller.
        padding: 3 values (RGB) of the pixels that no image covers.

    Raises:
        DataError: annotations cannot be read, or no image belongs to the step.
        ValueError: the phase does not exist in this step.
    """
    pictures = _select_pictures(plan, step, phase)
    dataset = StepDataset(pictures, Fitting(plan.recipe.input_size, padding))
    draws = [(index, 0) for index in range(len(pictures))]
    return _build_loader(dataset, batch_size, draws, plan.recipe.num_workers)


def _select_pictures(plan: Plan, step: int, phase: PhaseName) -> Sequence[DecodedPicture]:
    """Select the images of a phase, to be decoded when asked for."""
    view = build_step_view(plan, step, phase)
    if view.mask_names:
        return MaskedPictures(select_masked_pictures(plan, step, view), view)
    return TaggedPictures(select_weak_pictures(plan, step, view), view, plan.data.proposal_folder)


def _build_loader(
    dataset: StepDataset,
    batch_size: int,
    sampler: Sampler[Draw] | Sequence[Draw],
    num_workers: int,
    generator: torch.Generator | None = None,
) -> "DataLoader[Batch]":
    """Build a loader; one with a generator is gone through many times, in full batches."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        drop_last=generator is not None,
        generator=generator,
        persistent_workers=generator is not None and num_workers > 0,
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=_use_one_thread if num_workers else None,
    )
    return cast("DataLoader[Batch]", loader)


def _worker_context() -> BaseContext:
    """Start workers from a clean process that has imported this module once; where there is none, from scratch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _use_one_thread(worker: int) -> None:
    """Leave the cores to the other workers; torch does so by itself."""
    cv2.setNumThreads(1)


def _decode_if_small(pictures: Sequence[DecodedPicture]) -> Sequence[DecodedPicture]:
    """Decode a set that fits into the cache, on all cores; leave a larger one as it is."""
    probes = [pictures[i] for i in np.linspace(0, len(pictures) - 1, _NUM_PROBES).astype(int).tolist()]
    mean_bytes = sum(picture.size_bytes for picture in probes) / len(probes)
    if mean_bytes * len(pictures) > _CACHE_BYTES:
        return pictures
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(pictures.__getitem__, range(len(pictures))))
