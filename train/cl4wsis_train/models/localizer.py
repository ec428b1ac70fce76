"""The auxiliary decoder of weakly supervised steps, which finds where the classes of the image tags are.

The localizer turns backbone features into class activation logits; normalised global weighted pooling turns those into
one logit per class that image tags can supervise; the peak generator sharpens the activations of new classes.

Legend: B images, C channels with background, n new classes, h w feature maps, m softmax probabilities.

Source: CL4WSIS (ICCV 2023); pooling and focal penalty after Araslanov and Roth, "Single-stage
semantic segmentation from image labels" (CVPR 2020).
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAKY_SLOPE = 0.01
FOCAL_EXPONENT = 3
FOCAL_OFFSET = 0.01


def normalized_global_weighted_pooling(logits: Tensor, focal: bool = True) -> Tensor:
    """Pool class activation logits to one logit per class and image (nGWP).

    With m the softmax over channels and m̄ its spatial mean::

        y_c = Σ_p Z_c,p m_c,p / (1 + Σ_p m_c,p)  +  (1 - m̄_c)³ log(0.01 + m̄_c)

    The second term, the focal penalty, pulls down classes that cover next to nothing. The result is float32 or wider.

    Args:
        logits: (B, C, h, w); the softmax runs over all C channels.
        focal: add the focal penalty.

    Returns:
        (B, C).

    Raises:
        ValueError: ``logits`` is not a batch of maps.

    Source: Araslanov and Roth (CVPR 2020), normalised global weighted pooling; +1 in the denominator as in CL4WSIS.
    """
    if logits.ndim != 4:
        raise ValueError(f"logits must be (B, C, h, w), got shape {tuple(logits.shape)}")
    values = logits.flatten(2)  # (B, C, h * w)
    values = values if values.dtype == torch.float64 else values.float()
    probs = values.softmax(dim=1)
    pooled = (values * probs).sum(dim=2) / (1 + probs.sum(dim=2))  # (B, C)
    if not focal:
        return pooled
    share = probs.mean(dim=2)
    return pooled + (1 - share) ** FOCAL_EXPONENT * torch.log(FOCAL_OFFSET + share)


class Localizer(nn.Module):
    """The auxiliary decoder: two 3x3 convolutions with normalisation and leaky ReLU, then one logit per channel.

    Made anew for every weakly supervised step. Batch normalisation with leaky ReLU stands where the publication uses
    in-place activated batch normalisation; the last layer has neither, as published.

    Args:
        in_channels: channels of the last encoder features.
        channels: channels of the hidden layers.
        num_classes: foreground classes known after this step; background is added.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
                norm1=nn.BatchNorm2d(channels),
                act1=nn.LeakyReLU(LEAKY_SLOPE),
                conv2=nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(channels),
                act2=nn.LeakyReLU(LEAKY_SLOPE),
                classifier=nn.Conv2d(channels, num_classes + 1, 1),
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return class activation logits.

        Args:
            features: (B, in_channels, h, w), the last encoder features. Gradients reach them.

        Returns:
            ``cam_logits`` (B, C, h, w); channel 0 is background.
        """
        cam_logits: Tensor = self.layers(features)
        return cam_logits


class PeakAttention(nn.Module):
    """The strongest activations of the new classes and nothing else; it has no weights.

    Values below ``threshold_ratio`` times the maximum of their image and class are set to 0. The input is left as it
    is.

    Args:
        threshold_ratio: share of the maximum that an activation must reach (gamma).

    Source: BESTIE (CVPR 2022), peak attention module.
    """

    def __init__(self, threshold_ratio: float = 0.7) -> None:
        super().__init__()
        self.threshold_ratio = threshold_ratio

    def forward(self, new_logits: Tensor) -> Tensor:
        """Return peak maps.

        Args:
            new_logits: (B, n, h, w), the new-class channels of the localizer's logits.

        Returns:
            (B, n, h, w), at least 0.
        """
        positive = F.relu(new_logits)
        threshold = self.threshold_ratio * positive.amax(dim=(2, 3), keepdim=True)  # (B, n, 1, 1)
        return positive * (positive >= threshold)

    def pooled_logits(self, peak_maps: Tensor) -> Tensor:
        """Pool peak maps (B, n, h, w) to the (B, n) logits that tags supervise; softmax over new classes alone."""
        return normalized_global_weighted_pooling(peak_maps, focal=False)

    def activation(self, peak_maps: Tensor, image_labels: Tensor) -> Tensor:
        """Scale the peak maps of an image's classes to [0, 1].

        Args:
            peak_maps: (B, n, h, w), what :meth:`forward` returned.
            image_labels: (B, n) 0/1, tags of the new classes.

        Returns:
            (B, n, h, w): ReLU of the maps over their maximum per image and class; 0 where the class is not tagged.
        """
        positive = F.relu(peak_maps) * image_labels[:, :, None, None]
        return positive / (positive.amax(dim=(2, 3), keepdim=True) + 1e-5)


class PeakGenerator(PeakAttention):
    """One 1x1 convolution over the strongest activations, so that its output stands out at the cores of objects.

    Args:
        num_new_classes: number n of classes that this step adds.
        threshold_ratio: share of the maximum that an activation must reach (gamma).

    Source: CL4WSIS (ICCV 2023), peak generator.
    """

    def __init__(self, num_new_classes: int, threshold_ratio: float = 0.7) -> None:
        super().__init__(threshold_ratio)
        self.conv = nn.Conv2d(num_new_classes, num_new_classes, 1)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / num_new_classes))
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, new_logits: Tensor) -> Tensor:
        """Return the raw peak maps Q (B, n, h, w), before any activation function, of new-class logits."""
        peak_maps: Tensor = self.conv(super().forward(new_logits))
        return peak_maps
