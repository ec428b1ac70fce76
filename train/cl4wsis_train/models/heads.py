"""Outputs that grow with the classes: each step adds one 1x1 convolution, earlier ones keep their channels.

All of them are computed as one convolution, so that a network of many steps costs no more than one of a single step.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StepHeads(nn.ModuleList):
    """One 1x1 convolution per step, their outputs side by side in the order of the steps.

    Args:
        in_channels: channels of the input.
        channel_counts: output channels that each step adds.

    Source: MiB (Cermelli et al., CVPR 2020), classifier of class-incremental segmentation.
    """

    def __init__(self, in_channels: int, channel_counts: Sequence[int]) -> None:
        super().__init__(nn.Conv2d(in_channels, count, 1) for count in channel_counts)

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The convolutions, in the order of the steps."""
        return cast("list[nn.Conv2d]", list(self))

    def init_constant(self, bias: float, weight: float | None = None) -> None:
        """Set every bias to a value, and every weight too where one is given."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, bias)
            elif weight is not None:
                nn.init.constant_(parameter, weight)

    @torch.no_grad()
    def init_from_background(self) -> None:
        """Let the last convolution share with background, channel 0 of the first, what the old network gave to it.

        The n new channels and background get background's weights and its bias less log(n + 1), so that after a softmax
        their sum is background's old probability, and old classes keep theirs.

        Source: MiB (CVPR 2020), section 3.2, classifier initialisation.
        """
        first, last = self.convolutions[0], self.convolutions[-1]
        assert first.bias is not None
        assert last.bias is not None
        bias = first.bias[0] - math.log(last.out_channels + 1)
        last.weight[:], last.bias[:] = first.weight[0].clone(), bias
        first.bias[0] = bias

    @torch.no_grad()
    def init_from_mean(self, first: int) -> None:
        """Set every channel of the last convolution to the mean of the earlier ones.

        Args:
            first: channel from which on earlier channels are classes; 1 leaves out background.
        """
        *earlier, last = self.convolutions
        for name, values in last.named_parameters():
            values[:] = torch.cat([head.get_parameter(name) for head in earlier])[first:].mean(dim=0)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, sum of channel_counts, h, w) from (B, in_channels, h, w)."""
        weight, bias = (torch.cat([head.get_parameter(name) for head in self]) for name in ("weight", "bias"))
        return F.conv2d(features, weight, bias)
