"""Losses of the semantic branch and of the image tags.

Shapes: B batch, C classes with background, n supervised classes, h w feature map. Inputs may be half precision; the
arithmetic is float32 at least, and every loss is one scalar.
"""

import torch.nn.functional as F
from torch import Tensor

from cl4wsis_train.losses.inputs import check_shape, full_precision


def semantic_bce_loss(
    logits: Tensor, target: Tensor, void: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of every class against background and all others: mean_pixels sum_c BCE(S_c, G_c).

    One term serves as segmentation loss (hard or smoothed targets) and as distillation (the previous network's
    probabilities as targets of the old channels).

    Args:
        logits: (B, C, h, w), raw.
        target: (B, C, h, w), probabilities in [0, 1]; no gradient flows into them.
        void: (B, h, w) bool, pixels that count neither in the sum nor in the mean; all count when not given.
        count: pixels to divide by where some are void: with several processes the mean of their numbers. Those of
            this batch when not given.

    Returns:
        Scalar; summed over classes, mean over images and pixels; 0 if every pixel is void.

    Raises:
        ValueError: the shapes differ.

    Source: WILSON (CVPR 2022) and CL4WSIS (ICCV 2023).
    """
    check_shape("target", target, tuple(logits.shape))
    logits = full_precision(logits)
    losses = F.binary_cross_entropy_with_logits(logits, target.detach().to(logits.dtype), reduction="none").sum(dim=1)
    if void is None:
        return losses.mean()
    check_shape("void", void, tuple(losses.shape))
    count = (~void).sum() if count is None else count
    return losses.masked_fill(void, 0).sum() / count.clamp(min=1)


def classification_loss(pooled: Tensor, image_labels: Tensor) -> Tensor:
    """Binary cross-entropy of pooled class scores against image tags.

    Args:
        pooled: (B, n), raw scores of the supervised classes.
        image_labels: (B, n), 0/1 tags of the same classes.

    Returns:
        Scalar; mean over images and classes.

    Raises:
        ValueError: the shapes differ.

    Source: CL4WSIS (ICCV 2023); the aggregator is that of 1-stage-wseg (CVPR 2020).
    """
    check_shape("image_labels", image_labels, tuple(pooled.shape))
    pooled = full_precision(pooled)
    return F.binary_cross_entropy_with_logits(pooled, image_labels.to(pooled.dtype))


def self_training_loss(logits: Tensor, hard_target: Tensor, image_labels: Tensor) -> Tensor:
    """Class-balanced cross-entropy of a localizer against its own hardened, refined maps.

    With N_c pixels of class c in an image and N_t pixels of any class, a pixel of class c weighs
    (N_t - N_c) / (1 + N_t). Pixels without a class weigh nothing but count in the mean. An image in which background or
    a tagged class has no pixel contributes 0: its target cannot be right.

    Args:
        logits: (B, C, h, w), raw; the softmax runs over all C channels.
        hard_target: (B, C, h, w), 0/1, at most one class per pixel.
        image_labels: (B, C - 1), 0/1 tags; no background column.

    Returns:
        Scalar; mean over all h * w pixels, then over all images.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: 1-stage-wseg (CVPR 2020), as used by WILSON (CVPR 2022).
    """
    check_shape("hard_target", hard_target, tuple(logits.shape))
    check_shape("image_labels", image_labels, (logits.shape[0], logits.shape[1] - 1))
    logits = full_precision(logits)
    target = hard_target.detach().to(logits.dtype)
    class_pixels = target.sum(dim=(2, 3))  # (B, C)
    all_pixels = class_pixels.sum(dim=1, keepdim=True)  # (B, 1)
    class_weight = (all_pixels - class_pixels) / (1 + all_pixels)  # (B, C)
    pixel_weight = (target * class_weight[:, :, None, None]).sum(dim=1)  # (B, h, w)
    present = class_pixels > 0
    complete = present[:, 0] & (present[:, 1:] | (image_labels <= 0)).all(dim=1)  # (B,)
    pixel_loss = F.cross_entropy(logits, target.argmax(dim=1), reduction="none")  # (B, h, w)
    return ((pixel_weight * pixel_loss).mean(dim=(1, 2)) * complete).mean()
