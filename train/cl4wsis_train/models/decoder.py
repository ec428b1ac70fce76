"""The decoder: from coarse features up to stride 4, with finer encoder features joined on the way.

Source: Panoptic-DeepLab (CVPR 2020), section 3.1. Upsampling is half-pixel bilinear (``align_corners=False``) as
everywhere in this package, where the published code aligns corners.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SKIP_CHANNELS = (64, 32, 16)  # of encoder features at strides 16, 8 and 4


class SeparableConvolution(nn.Sequential):
    """A depthwise 5x5 and a pointwise convolution, each with batch normalisation and ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, in_channels, 5, padding=2, groups=in_channels, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class DecoderStage(nn.Module):
    """One step up: upsample to the size of finer features, join their projection, and fuse.

    Args:
        in_channels: channels of the map that comes from below.
        low_level_channels: channels of the encoder features that join.
        skip_channels: channels to which these are projected.
        out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, low_level_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(low_level_channels, skip_channels, 1, bias=False),
            nn.BatchNorm2d(skip_channels),
            nn.ReLU(inplace=True),
        )
        self.fuse = SeparableConvolution(in_channels + skip_channels, out_channels)

    def forward(self, features: Tensor, low_level: Tensor) -> Tensor:
        """Return (B, out_channels, h, w) at the size of ``low_level`` (B, low_level_channels, h, w)."""
        if features.shape[2:] != low_level.shape[2:]:
            features = F.interpolate(features, size=low_level.shape[2:], mode="bilinear", align_corners=False)
        fused: Tensor = self.fuse(torch.cat([features, self.project(low_level)], dim=1))
        return fused


class PyramidDecoder(nn.Module):
    """Three stages from the last encoder stride up to stride 4.

    Args:
        in_channels: channels of the coarse features.
        feature_channels: channels of the four encoder features, finest first.
        channels: channels of every stage's output.
    """

    def __init__(self, in_channels: int, feature_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        # Narrow decoders keep the published proportion of skip to decoder channels (1/2, 1/4, 1/8 of 128).
        skips = [min(skip, max(1, channels // 2 ** (k + 1))) for k, skip in enumerate(_SKIP_CHANNELS)]
        inputs = [in_channels, channels, channels]
        low_levels = list(reversed(feature_channels[:3]))
        self.stages = nn.ModuleList(
            DecoderStage(size, low_level, skip, channels)
            for size, low_level, skip in zip(inputs, low_levels, skips, strict=True)
        )

    def forward(self, coarse: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return (B, channels, H/4, W/4).

        Args:
            coarse: (B, in_channels, h, w) at the last encoder stride.
            features: the four encoder features, finest first; the last is not used here.
        """
        x = coarse
        for stage, low_level in zip(self.stages, reversed(features[:3]), strict=True):
            x = stage(x, low_level)
        return x
