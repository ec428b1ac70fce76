"""Atrous spatial pyramids: the same features seen through several dilations and through their global mean.

Source: DeepLabv3 (Chen et al., 2017), section 3.3. The semantic pyramid is the variant of in-place activated batch
normalisation (Rota Bulò et al., CVPR 2018), with plain batch normalisation and leaky ReLU in its place; the instance
pyramid is that of Panoptic-DeepLab (CVPR 2020). Published code takes a windowed mean instead of the global one at test
time; here it is the global mean in training and inference alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl4wsis_train.models.dilated import DilatedConv2d
from cl4wsis_train.processes import num_processes

LEAKY_SLOPE = 0.01


class SemanticPyramid(nn.Module):
    """Pyramid of the semantic branch: the pooled path is added before the last normalisation, not concatenated.

    Args:
        in_channels: channels of the last encoder features.
        channels: channels of every path and of the output.
        dilations: dilations of the 3x3 paths, in feature cells.
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.paths = _pyramid_convolutions(in_channels, channels, dilations)
        self.paths_norm = nn.BatchNorm2d(channels * len(self.paths))
        self.paths_project = nn.Conv2d(channels * len(self.paths), channels, 1, bias=False)
        self.pool_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.pool_norm = nn.BatchNorm2d(channels)
        self.pool_project = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        gain = nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, channels, h, w) from the last encoder features (B, in_channels, h, w)."""
        paths = torch.cat([path(features) for path in self.paths], dim=1)
        paths = self.paths_project(F.leaky_relu(self.paths_norm(paths), LEAKY_SLOPE))
        pooled = self.pool_conv(features.mean(dim=(2, 3), keepdim=True))  # (B, channels, 1, 1)
        pooled = self.pool_project(F.leaky_relu(self._normalize_pooled(pooled), LEAKY_SLOPE))
        return F.leaky_relu(self.norm(paths + pooled), LEAKY_SLOPE)

    def _normalize_pooled(self, pooled: Tensor) -> Tensor:
        """Normalise pooled features; a single training image has no variance, so it takes the running statistics."""
        norm = self.pool_norm
        if not self.training or pooled.shape[0] * num_processes() > 1:
            normalized: Tensor = norm(pooled)
            return normalized
        return F.batch_norm(pooled, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class InstancePyramid(nn.Module):
    """Pyramid of the instance branch, with batch normalisation, ReLU and dropout.

    Args:
        in_channels: channels of the last encoder features.
        channels: channels of every path and of the output.
        dilations: dilations of the 3x3 paths, in feature cells.
        dropout: share of output values that training sets to zero.
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int], dropout: float = 0.5) -> None:
        super().__init__()
        self.paths = _pyramid_convolutions(in_channels, channels, dilations)
        self.path_norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in self.paths)
        self.pool_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.project = nn.Conv2d(channels * len(self.paths), channels, 1, bias=False)
        self.pool_project = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, channels, h, w) from the last encoder features (B, in_channels, h, w)."""
        maps = [F.relu(norm(path(features))) for path, norm in zip(self.paths, self.path_norms, strict=True)]
        pooled = F.relu(self.pool_conv(features.mean(dim=(2, 3), keepdim=True)))  # (B, channels, 1, 1)
        # A sum of projections equals the projection of a concatenation, and spares spreading the pooled values out.
        fused = self.project(torch.cat(maps, dim=1)) + self.pool_project(pooled)
        output: Tensor = self.dropout(F.relu(self.norm(fused)))
        return output


def _pyramid_convolutions(in_channels: int, channels: int, dilations: Sequence[int]) -> nn.ModuleList:
    """Make one 1x1 convolution and a dilated 3x3 convolution per dilation, without bias."""
    pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
    dilated = [DilatedConv2d(in_channels, channels, dilation) for dilation in dilations]
    return nn.ModuleList([pointwise, *dilated])
