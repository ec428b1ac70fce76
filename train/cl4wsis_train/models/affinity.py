"""Pixel-adaptive mask refinement: class probabilities spread along neighbours of similar color.

Source: Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020), section 3.3, with the
constants of their implementation, which WILSON and CL4WSIS use as well.

Shapes: B batch, C classes, h w the grid of the probabilities, Q = 8 * number of dilations neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD_EPSILON = 1e-8
STD_WEIGHT = 0.1


class PixelAdaptiveRefinement(nn.Module):
    """Replace every pixel's probabilities by the affinity-weighted mean of its neighbours', repeatedly.

    The neighbours are the eight pixels around p at each dilation, borders replicated; p itself is not among them. Their
    weights are a softmax over all of them of ``mean over RGB of -|I_p - I_q| / (1e-8 + 0.1 s_p)``, where ``s_p`` is the
    unbiased standard deviation of the color over the 3x3 samples, p included, of each dilation.

    Args:
        dilations: distances of the neighbours, in pixels of the grid.
        num_iterations: how often the mean is taken.
    """

    def __init__(self, dilations: Sequence[int] = (1, 2, 4, 8, 12), num_iterations: int = 10) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        self.num_iterations = num_iterations

    def forward(self, images: Tensor, probs: Tensor) -> Tensor:
        """Refine class maps.

        Each channel is refined by itself, so a subset of channels may be given.

        Args:
            images: (B, 3, H, W) RGB in [0, 1]; resized to the grid of ``probs`` (bilinear, corners aligned).
            probs: (B, C, h, w).

        Returns:
            (B, C, h, w) float32.
        """
        images, probs = images.float(), probs.float()
        if images.shape[-2:] != probs.shape[-2:]:
            images = F.interpolate(images, size=probs.shape[-2:], mode="bilinear", align_corners=True)
        weights = self.affinity(images).unsqueeze(2)  # (B, Q, 1, h, w)
        for _ in range(self.num_iterations):
            refined = torch.zeros_like(probs)
            for weight, neighbour in zip(weights.unbind(1), self._neighbours(probs), strict=True):
                refined.addcmul_(weight, neighbour)
            probs = refined
        return probs

    def affinity(self, images: Tensor) -> Tensor:
        """Return the weights of the neighbours, (B, Q, h, w), from images on the same grid, (B, 3, h, w)."""
        # Differences to the center have the deviation of the colors themselves and spare a pass for the mean.
        differences = torch.stack([neighbour - images for neighbour in self._neighbours(images)], dim=1)
        num_samples = 9 * len(self.dilations)
        scatter = differences.square().sum(1) - differences.sum(1).square() / num_samples
        deviation = (scatter.clamp(min=0) / (num_samples - 1)).sqrt()  # (B, 3, h, w)
        distances = differences.abs_() / (STD_EPSILON + STD_WEIGHT * deviation).unsqueeze(1)  # (B, Q, 3, h, w)
        return torch.softmax(-distances.mean(2), dim=1)

    def _neighbours(self, maps: Tensor) -> list[Tensor]:
        """Return maps (B, D, h, w) as seen from each neighbour in turn, a view per neighbour."""
        height, width = maps.shape[-2:]
        margin = max(self.dilations)
        padded = F.pad(maps, (margin,) * 4, mode="replicate")
        return [
            padded[..., margin + dy : margin + dy + height, margin + dx : margin + dx + width]
            for dilation in self.dilations
            for dy in (-dilation, 0, dilation)
            for dx in (-dilation, 0, dilation)
            if dy or dx
        ]
