"""Distillation losses: what the previous step's frozen network knew about the old classes.

Shapes: B batch, C classes with background, o old classes with background, h w feature map, H W training crop.
"""

import torch.nn.functional as F
from torch import Tensor

from cl4wsis_train.losses.inputs import check_shape, full_precision
from cl4wsis_train.losses.instance import center_loss, offset_loss


def localizer_distillation_loss(cam_logits: Tensor, old_probs: Tensor) -> Tensor:
    """Binary cross-entropy of the localizer's old channels against the previous network's probabilities.

    Args:
        cam_logits: (B, C, h, w), raw; the first o channels are supervised, background included.
        old_probs: (B, o, h, w), in [0, 1]; no gradient flows into them.

    Returns:
        Scalar; mean over images, old channels and pixels.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: WILSON (CVPR 2022), localization prior.
    """
    batch, num_channels, height, width = cam_logits.shape
    num_old_channels = _num_old_channels("old_probs", old_probs, num_channels)
    check_shape("old_probs", old_probs, (batch, num_old_channels, height, width))
    old_logits = full_precision(cam_logits[:, :num_old_channels])
    return F.binary_cross_entropy_with_logits(old_logits, old_probs.detach().to(old_logits.dtype))


def encoder_distillation_loss(features: Tensor, old_features: Tensor) -> Tensor:
    """Mean squared difference of the last encoder features: mean (F - F')^2.

    Args:
        features: (B, D, h, w), of the network in training.
        old_features: (B, D, h, w), of the previous network; no gradient flows into them.

    Returns:
        Scalar; mean over all elements.

    Raises:
        ValueError: the shapes differ.

    Source: WILSON (CVPR 2022).
    """
    check_shape("old_features", old_features, tuple(features.shape))
    features = full_precision(features)
    return F.mse_loss(features, old_features.detach().to(features.dtype))


def selective_center_loss(
    center_heatmap: Tensor, old_center_heatmap: Tensor, old_mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Squared error of the old center channels on pixels of old classes: sum w_old (Ctr_old - Ctr'_old)^2 / M.

    Args:
        center_heatmap: (B, C - 1, H, W), raw; the first o - 1 channels, those of the old classes, are compared.
        old_center_heatmap: (B, o - 1, H, W), raw output of the previous network on the same crop.
        old_mask: (B, 1, H, W), 0/1 or bool, w_old; all ones distils everywhere.
        count: scalar normaliser instead of M = sum w_old of this batch, to make it global over processes.

    Returns:
        Scalar; summed over channels, 0 if no pixel is old.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: CL4WSIS (ICCV 2023), semantic-aware selective distillation.
    """
    num_old_channels = _num_old_channels("old_center_heatmap", old_center_heatmap, center_heatmap.shape[1])
    return center_loss(center_heatmap[:, :num_old_channels], old_center_heatmap, old_mask, count)


def selective_offset_loss(
    offset_map: Tensor, old_offset_map: Tensor, old_mask: Tensor, count: Tensor | None = None
) -> Tensor:
    """Absolute error of offsets on pixels of old classes: sum w_old |Off - Off'| / M.

    Args:
        offset_map: (B, 2, H, W), (dy, dx) in px.
        old_offset_map: (B, 2, H, W), of the previous network on the same crop.
        old_mask: (B, 1, H, W), 0/1 or bool, w_old; all ones distils everywhere.
        count: scalar normaliser instead of M = sum w_old of this batch, to make it global over processes.

    Returns:
        Scalar, px; summed over both coordinates, 0 if no pixel is old.

    Raises:
        ValueError: the shapes differ.

    Source: CL4WSIS (ICCV 2023), semantic-aware selective distillation.
    """
    return offset_loss(offset_map, old_offset_map, old_mask, count)


def _num_old_channels(name: str, old_map: Tensor, num_channels: int) -> int:
    num_old_channels = old_map.shape[1]
    if num_old_channels > num_channels:
        raise ValueError(f"{name} has {num_old_channels} channels, more than the {num_channels} of the network")
    return num_old_channels
