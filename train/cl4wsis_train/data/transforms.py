"""Joint augmentation of an image and its id map, and what stands in its place where images are seen as deployed.

Random resized crop and horizontal flip, as published (CL4WSIS, ICCV 2023): the crop's area is a share of the image area
uniform in a range that may exceed 1, its aspect ratio is log-uniform in [3/4, 4/3]; after ten tries that do not fit,
the largest centered crop of an allowed aspect is taken. Colors are left alone.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from cl4wsis.geometry import fit_image

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_FLIP_PROBABILITY = 0.5


class JointTransform(Protocol):
    """Turns an image and its id map into tensors of one size."""

    def __call__(
        self, image: NDArray[np.uint8], instance_ids: NDArray[np.int32] | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Transform one image.

        Args:
            image: (h, w, 3) uint8.
            instance_ids: (h, w) int32, or None.
            seed: equal seeds give equal results.

        Returns:
            image (3, H, W) uint8 and, if given, instance_ids (H, W) int32.
        """
        ...


class JointResizedCrop(v2.RandomResizedCrop):  # type: ignore[misc]
    """Random resized crop whose masks keep to the pixel centers of the image.

    torchvision's nearest neighbour takes the corner of an output pixel, which puts masks half a pixel beside the
    bilinearly resized image; here it takes the center.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop and resize one input; see ``torchvision.transforms.v2.Transform``."""
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        ids = inpt.as_subclass(Tensor).unsqueeze(0)  # (1, H, W)
        nearest = InterpolationMode.NEAREST_EXACT
        resized = v2.functional.resized_crop_image(ids, **params, size=self.size, interpolation=nearest)
        return tv_tensors.Mask(resized.squeeze(0))


class Augmentation:
    """Crop, resize and flip, decided by a seed.

    Args:
        crop_size: side of the result, px.
        crop_area: range of the crop's share of the image area.
    """

    def __init__(self, crop_size: int, crop_area: tuple[float, float]) -> None:
        self._transform = v2.Compose(
            [
                JointResizedCrop(
                    (crop_size, crop_size),
                    scale=crop_area,
                    ratio=_ASPECT_RATIOS,
                    interpolation=InterpolationMode.BILINEAR,
                    antialias=True,
                ),
                v2.RandomHorizontalFlip(_FLIP_PROBABILITY),
            ]
        )

    def __call__(
        self, image: NDArray[np.uint8], instance_ids: NDArray[np.int32] | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Augment one image; see :class:`JointTransform`."""
        inputs = [tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))]
        if instance_ids is not None:
            inputs.append(tv_tensors.Mask(torch.from_numpy(instance_ids)))
        # torchvision draws from the global generator, which must neither decide here nor be moved on.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs = [output.as_subclass(Tensor).contiguous() for output in self._transform(inputs)]
        return outputs[0], outputs[1] if instance_ids is not None else None


class Fitting:
    """The preprocessing that is deployed: the image fitted into the network input and padded.

    Args:
        input_size: (height, width) of the network input, px.
        padding: 3 values of the pixels that no image covers.
    """

    def __init__(self, input_size: tuple[int, int], padding: Sequence[int]) -> None:
        self._input_size, self._padding = input_size, padding

    def __call__(
        self, image: NDArray[np.uint8], instance_ids: NDArray[np.int32] | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Fit one image, the same with every seed; see :class:`JointTransform`."""
        frame, transform = fit_image(image, self._input_size, self._padding)
        ids = None if instance_ids is None else torch.from_numpy(transform.fit_ids(instance_ids))
        return torch.from_numpy(frame).permute(2, 0, 1).contiguous(), ids
