"""Joint augmentation of an image and its id map.

Random resized crop and horizontal flip, as published (CL4WSIS, ICCV 2023): the crop's area is a share of the image area
uniform in a range that may exceed 1, its aspect ratio is log-uniform in [3/4, 4/3]; after ten tries that do not fit,
the largest centered crop of an allowed aspect is taken. Colors are left alone.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_FLIP_PROBABILITY = 0.5


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
        """Augment one image.

        Args:
            image: (H, W, 3) uint8.
            instance_ids: (H, W) int32, or None.
            seed: equal seeds give equal results.

        Returns:
            image (3, crop_size, crop_size) uint8 and, if given, instance_ids (crop_size, crop_size) int32.
        """
        inputs = [tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1))]
        if instance_ids is not None:
            inputs.append(tv_tensors.Mask(torch.from_numpy(instance_ids)))
        # torchvision draws from the global generator, which must neither decide here nor be moved on.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs = [output.as_subclass(Tensor).contiguous() for output in self._transform(inputs)]
        return outputs[0], outputs[1] if instance_ids is not None else None
