"""What the phases share: their common base, upsampling, and counts over all processes."""

from collections.abc import Sequence
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.processes import mean_over_processes

ModuleT = TypeVar("ModuleT", bound=nn.Module)

Losses = dict[str, Tensor]
"""Weighted losses by name; their sum is what is minimised."""


class Phase(nn.Module):
    """A training phase: called with a batch and the number of the epoch, it returns weighted losses.

    Args:
        network: the Segmenter that the phase trains, wholly or in part.

    Attributes:
        statistics: of the last batch, scalars worth logging that are no losses.
    """

    def __init__(self, network: InstanceSegmenter) -> None:
        super().__init__()
        self.network = network
        self.statistics: dict[str, Tensor] = {}


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly (half-pixel convention) in float32.

    Args:
        maps: (B, C, h, w).
        size: (H, W).

    Returns:
        (B, C, H, W) float32.
    """
    if tuple(maps.shape[2:]) == tuple(size):
        return maps.float()
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)


def global_count(loss_weight: Tensor) -> Tensor:
    """Count the pixels that carry weight, averaged over all processes.

    Every process divides its sum by this number; the average of their gradients is then the gradient of one process
    that sees the whole batch.

    Args:
        loss_weight: any shape; pixels above 0 count.

    Returns:
        Scalar float32.
    """
    return mean_over_processes((loss_weight > 0).sum().float())


def freeze(module: ModuleT) -> ModuleT:
    """Switch a module to evaluation mode and take its parameters out of training."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()
