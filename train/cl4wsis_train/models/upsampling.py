"""Learned upsampling: class maps at stride 4 whose outlines follow those of the image.

Each pixel of the fine map mixes the 3x3 coarse cells around it with weights of its own. The weights follow from the
encoder's features and belong to no class, so masks of step 0 teach them once for all classes to come.

Source: the convex upsampling of RAFT (Teed and Deng, ECCV 2020), section 3.3, here with bilinear weights as prior.

Legend: B images, C channels, h x w coarse cells, s fine pixels per side of a cell.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl4wsis_train.models.decoder import PyramidDecoder

_NEIGHBOURS = 9
_LEAST_WEIGHT = 0.01  # prior of cells without bilinear weight: small, but within reach of learning


class LearnedUpsampling(nn.Module):
    """Enlarges class maps to the size of the finest features.

    Args:
        feature_channels: channels of the four encoder features, finest first.
        channels: of the decoder that turns these features into weights.
        scale: s, stride of the last features over that of the finest.
    """

    def __init__(self, feature_channels: Sequence[int], channels: int, scale: int) -> None:
        super().__init__()
        self.decoder = PyramidDecoder(feature_channels[-1], feature_channels, channels)
        self.weight_head = nn.Conv2d(channels, _NEIGHBOURS, 1)
        nn.init.zeros_(self.weight_head.weight)
        assert self.weight_head.bias is not None
        nn.init.zeros_(self.weight_head.bias)
        self._prior: Tensor
        self.register_buffer("_prior", _bilinear_weights(scale).clamp(min=_LEAST_WEIGHT).log(), persistent=False)

    def forward(self, maps: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Return (B, C, s * h, s * w) float32 from maps (B, C, h, w) and the four encoder features."""
        scores = self.weight_head(self.decoder(features[-1], features)).float()  # (B, 9, s * h, s * w)
        return mix_neighbours(maps.float(), scores, self._prior)


def mix_neighbours(maps: Tensor, scores: Tensor, prior: Tensor) -> Tensor:
    """Mix the 3x3 cells around the cell of each fine pixel, by the softmax of its scores plus a prior.

    Cells beyond the border repeat those at it.

    Args:
        maps: (B, C, h, w).
        scores: (B, 9, s * h, s * w), of the cells in rows from the upper left one.
        prior: (s, s, 9), added to the scores by the place of the pixel in its cell.

    Returns:
        (B, C, s * h, s * w).
    """
    channels, height, width = maps.shape[1:]
    scale = prior.shape[0]
    cells = scores.reshape(-1, _NEIGHBOURS, height, scale, width, scale)
    weights = (cells.permute(0, 2, 4, 3, 5, 1) + prior).softmax(dim=5)  # (B, h, w, s, s, 9)
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    around = torch.stack(
        [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)], dim=4
    )  # (B, C, h, w, 9)
    mixed = weights.flatten(3, 4) @ around.permute(0, 2, 3, 4, 1)  # (B, h, w, s * s, C)
    fine = mixed.reshape(-1, height, width, scale, scale, channels).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, s, w, s)
    return fine.reshape(-1, channels, height * scale, width * scale)


def _bilinear_weights(scale: int) -> Tensor:
    """Return (s, s, 9): the weights of half-pixel bilinear interpolation within a cell, by row and column."""
    place = (torch.arange(scale) + 0.5) / scale - 0.5  # from the center of the cell
    along = torch.stack([(-place).clamp(min=0), 1 - place.abs(), place.clamp(min=0)], dim=1)  # (s, 3)
    return torch.einsum("ya,xb->yxab", along, along).flatten(2)
