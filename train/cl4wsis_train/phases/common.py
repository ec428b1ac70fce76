"""What the phases share: their common base, and counts over all processes."""

from typing import TypeVar

from torch import Tensor, nn

from cl4wsis_train.losses.instance import count_pixels
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


def global_count(loss_weight: Tensor) -> Tensor:
    """Count the pixels that carry weight, averaged over all processes.

    Every process divides its sum by this number; the average of their gradients is then the gradient of one process
    that sees the whole batch.

    Args:
        loss_weight: any shape; pixels above 0 count.

    Returns:
        Scalar float32.
    """
    return mean_over_processes(count_pixels(loss_weight))


def freeze(module: ModuleT) -> ModuleT:
    """Switch a module to evaluation mode and take its parameters out of training."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()
