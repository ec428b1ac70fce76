"""Losses of the instance branch: center heatmaps and offsets, weighted per pixel.

Both divide a weighted sum over the batch by the number of pixels that weigh anything. In training with several
processes that number must be the mean over the processes (:func:`count_pixels`, summed over processes and divided by
their number): then averaging gradients gives those of one process with the whole batch.

Shapes: B batch, K heatmap channels, H W the resolution of the targets.
"""

import torch
from torch import Tensor

from cl4wsis_train.losses.inputs import check_shape, full_precision


def count_pixels(loss_weight: Tensor) -> Tensor:
    """Count the pixels with a positive weight in a batch.

    Args:
        loss_weight: (B, 1, H, W), of any type.

    Returns:
        Scalar float32, ready to be averaged over processes.
    """
    return (loss_weight > 0).sum().float()


def center_loss(
    center_heatmap: Tensor, center_target: Tensor, loss_weight: Tensor, count: Tensor | None = None
) -> Tensor:
    """Weighted squared error of center heatmaps: sum w (Ctr - Ctr*)^2 / #{w > 0}.

    Args:
        center_heatmap: (B, K, H, W), raw network output; pass a channel slice to supervise some classes.
        center_target: (B, K, H, W).
        loss_weight: (B, 1, H, W), at least 0; shared by the channels.
        count: scalar normaliser instead of this batch's #{w > 0}.

    Returns:
        Scalar; summed over channels, 0 if no pixel weighs anything.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: Panoptic-DeepLab (CVPR 2020); weights as in BESTIE (CVPR 2022).
    """
    error = _difference("center", center_heatmap, center_target)
    return _normalized_sum(error.square(), loss_weight, count)


def offset_loss(offset_map: Tensor, offset_target: Tensor, loss_weight: Tensor, count: Tensor | None = None) -> Tensor:
    """Weighted absolute error of offsets: sum w |Off - Off*| / #{w > 0}.

    Args:
        offset_map: (B, 2, H, W), (dy, dx) in px.
        offset_target: (B, 2, H, W), the same.
        loss_weight: (B, 1, H, W), at least 0.
        count: scalar normaliser instead of this batch's #{w > 0}.

    Returns:
        Scalar, px; summed over both coordinates, 0 if no pixel weighs anything.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: Panoptic-DeepLab (CVPR 2020); weights as in BESTIE (CVPR 2022).
    """
    error = _difference("offset", offset_map, offset_target)
    return _normalized_sum(error.abs(), loss_weight, count)


def _difference(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    check_shape(f"{name} target", target, tuple(prediction.shape))
    prediction = full_precision(prediction)
    return prediction - target.detach().to(prediction.dtype)


def _normalized_sum(error: Tensor, loss_weight: Tensor, count: Tensor | None) -> Tensor:
    batch, _, height, width = error.shape
    check_shape("loss_weight", loss_weight, (batch, 1, height, width))
    total = (error.sum(dim=1, keepdim=True) * loss_weight.detach().to(error.dtype)).sum()
    pixels = count_pixels(loss_weight) if count is None else count
    return total / torch.where(pixels > 0, pixels, torch.ones_like(pixels)).to(total.dtype)
