"""Losses that shape the class activation maps of the localizer: consistency under flips and turns, random dropout.

Shapes: B batch, C classes with background, h w feature map.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl4wsis_train.losses.inputs import check_shape, full_precision


def flac_loss(
    logits: Tensor,
    flipped: Tensor,
    rotated: Tensor,
    quarter_turns: int,
    num_old_classes: int,
    average: Literal["logits", "probabilities"] = "logits",
) -> Tensor:
    """Feature-level augmentation consistency: one class-agnostic activation A, whichever way the features are turned.

    T = max(A, A_flip, A_rot), taken in the frame of the image and detached;
    loss = 1/3 (mse(A, T) + mse(A_flip, T) + mse(A_rot, T)).

    Args:
        logits: (B, C, h, w), raw logits of the features as they are.
        flipped: (B, C, h, w), logits of the features mirrored left to right, still mirrored.
        rotated: logits of the features after ``torch.rot90(x, quarter_turns, (2, 3))``, still turned: (B, C, h, w),
            h and w exchanged after an odd number of turns.
        quarter_turns: number of counter-clockwise quarter turns.
        num_old_classes: old foreground classes; channels beyond ``num_old_classes + 1`` are new.
        average: ``logits``: A is the sigmoid of the mean logit of the new classes, as published in code;
            ``probabilities``: A is the mean probability of all foreground classes, as the paper words it.

    Returns:
        Scalar; means over images and pixels.

    Raises:
        ValueError: the shapes do not fit, no class is new, or ``average`` is unknown.

    Source: CL4WSIS (ICCV 2023), feature-level augmentation consistency.
    """
    if logits.shape[1] <= num_old_classes + 1:
        raise ValueError(f"logits have {logits.shape[1]} channels, none beyond background and {num_old_classes} old")
    upright = torch.rot90(rotated, -quarter_turns, (2, 3))
    check_shape("flipped", flipped, tuple(logits.shape))
    check_shape("rotated (turned back)", upright, tuple(logits.shape))
    branches = [_activation(branch, num_old_classes, average) for branch in (logits, flipped.flip(3), upright)]
    target = torch.stack([branch.detach() for branch in branches]).amax(dim=0)  # (B, h, w)
    return torch.stack([F.mse_loss(branch, target) for branch in branches]).mean()


def _activation(logits: Tensor, num_old_classes: int, average: str) -> Tensor:
    logits = full_precision(logits)
    if average == "logits":
        return logits[:, num_old_classes + 1 :].mean(dim=1).sigmoid()  # (B, h, w)
    if average == "probabilities":
        return logits[:, 1:].sigmoid().mean(dim=1)  # (B, h, w)
    raise ValueError(f"average must be 'logits' or 'probabilities', found {average!r}")


def random_dropout_loss(
    logits: Tensor, pixel_mask: Tensor, random_classes: Tensor, count: Tensor | None = None
) -> Tensor:
    """Ask confident new-class pixels for one random old class each: mean_{p in P} -log sigmoid(Z_{r(p), p}).

    This keeps the old channels of the localizer from being extinguished wherever a new class shows.

    Args:
        logits: (B, C, h, w), raw.
        pixel_mask: (B, h, w) bool, the pixels P.
        random_classes: (B, h, w) int64, the semantic channel r drawn for each pixel; read inside ``pixel_mask`` only.
        count: scalar normaliser instead of this batch's number of pixels in P, to make it global over processes.

    Returns:
        Scalar; mean over the pixels of P in the batch, 0 if there are none.

    Raises:
        ValueError: the shapes do not fit each other.

    Source: CL4WSIS (ICCV 2023), random dropout.
    """
    batch, _, height, width = logits.shape
    check_shape("pixel_mask", pixel_mask, (batch, height, width))
    check_shape("random_classes", random_classes, (batch, height, width))
    channels = random_classes.where(pixel_mask, torch.zeros_like(random_classes))
    drawn = full_precision(logits).gather(1, channels[:, None])[:, 0]  # (B, h, w)
    pixel_loss = F.softplus(-drawn) * pixel_mask
    pixels = pixel_mask.sum().float() if count is None else count
    return pixel_loss.sum() / torch.where(pixels > 0, pixels, torch.ones_like(pixels)).to(pixel_loss.dtype)
