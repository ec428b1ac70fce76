"""Outputs that grow with the classes: each step adds one 1x1 convolution, earlier ones keep their channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StepHeads(nn.ModuleList):
    """One 1x1 convolution per step, their outputs concatenated in the order of the steps.

    Args:
        in_channels: channels of the input.
        channel_counts: output channels that each step adds.

    Source: MiB (Cermelli et al., CVPR 2020), classifier of class-incremental segmentation.
    """

    def __init__(self, in_channels: int, channel_counts: Sequence[int]) -> None:
        super().__init__(nn.Conv2d(in_channels, count, 1) for count in channel_counts)

    def init_constant(self, bias: float, weight: float | None = None) -> None:
        """Set every bias to a value, and every weight too where one is given."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, bias)
            elif weight is not None:
                nn.init.constant_(parameter, weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, sum of channel_counts, h, w) from (B, in_channels, h, w)."""
        return torch.cat([head(features) for head in self], dim=1)
