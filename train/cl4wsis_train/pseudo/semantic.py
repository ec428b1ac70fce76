"""Semantic pseudo labels of phase 1, from the auxiliary decoder's activation maps and the image's tags.

Source: CL4WSIS (ICCV 2023), section 3.2, and WILSON (CVPR 2022), sections 3.2 and 3.3, on which it builds;
self-training with refined maps follows Araslanov and Roth (CVPR 2020).

Shapes: B batch, C classes with background, h w the grid of the encoder's last features. ``cam_logits`` are always those
of the decoder in evaluation mode, detached.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cl4wsis.tasks import ClassSplit
from cl4wsis_train.models.affinity import PixelAdaptiveRefinement

BACKGROUND_THRESHOLD = 0.7
FOREGROUND_THRESHOLD = 0.6
LOWEST_THRESHOLD = 0.2


def with_background(image_labels: Tensor) -> Tensor:
    """Put a column of ones for background in front of tags: (..., n) -> (..., n + 1)."""
    return F.pad(image_labels, (1, 0), value=1)


def mask_by_labels(probs: Tensor, image_labels: Tensor) -> Tensor:
    """Set the classes that an image's tags do not name to 0; background stays, and nothing is normalised again.

    Args:
        probs: (B, C, h, w).
        image_labels: (B, C - 1) 0/1, the visible tags. Without tags of old classes those become 0 as well.

    Returns:
        (B, C, h, w).
    """
    return probs * with_background(image_labels).to(probs.dtype)[:, :, None, None]


def smooth_labels(probs: Tensor, alpha: float) -> Tensor:
    """Mix probabilities with the hard label of the strongest class (of all, where several are equal).

    Args:
        probs: (B, C, h, w), usually masked by the tags.
        alpha: share of the hard label.

    Returns:
        (B, C, h, w), ``alpha * hard + (1 - alpha) * probs``.
    """
    hard = (probs == probs.amax(1, keepdim=True)).to(probs.dtype)
    return alpha * hard + (1 - alpha) * probs


def semantic_target(
    cam_probs: Tensor,
    old_probs: Tensor,
    image_labels: Tensor,
    alpha: float,
    old_classes_compete: bool = False,
    suppress_old: float = 0.0,
) -> Tensor:
    """Build the Segmenter's target: the old network for old classes, smoothed activation maps for new ones.

    Background is the smaller of the two opinions about it, ``min(P'_0, Q_0)``.

    Args:
        cam_probs: (B, C, h, w) softmax of the auxiliary decoder's logits, refined or not.
        old_probs: (B, o, h, w) sigmoid probabilities of the previous network, background first (P').
        image_labels: (B, C - 1) 0/1, the visible tags.
        alpha: share of the hard label in the new classes' target.
        old_classes_compete: let old classes win the hard label too; not in the publication.
        suppress_old: share s of ``P'_c * (1 - s * max_n Q_n)`` by which old classes yield where new ones are seen;
            0 in the publication.

    Returns:
        (B, C, h, w) in [0, 1], without gradient.
    """
    with torch.no_grad():
        num_old = old_probs.shape[1]
        if old_classes_compete:
            image_labels = torch.cat(
                (torch.ones_like(image_labels[:, : num_old - 1]), image_labels[:, num_old - 1 :]), 1
            )
        probs = mask_by_labels(cam_probs, image_labels)
        target = smooth_labels(probs, alpha)
        target[:, 0] = torch.minimum(target[:, 0], old_probs[:, 0].float())
        target[:, 1:num_old] = old_probs[:, 1:]
        if suppress_old:
            target[:, 1:num_old] *= 1 - suppress_old * target[:, num_old:].amax(dim=1, keepdim=True)
    return target


def average_over_proposals(probs: Tensor, proposals: Tensor, keep_rest: bool) -> Tensor:
    """Give all pixels of a mask proposal the mean probabilities of its pixels.

    Args:
        probs: (B, C, h, w), background first.
        proposals: (B, H, W) ids of class-agnostic proposals, 0 none; read at the centers of the (h, w) cells.
        keep_rest: whether pixels of no proposal keep their probabilities; otherwise they become background.

    Returns:
        (B, C, h, w).
    """
    with torch.no_grad():
        batch, channels, height, width = probs.shape
        ids = F.interpolate(proposals[:, None].float(), size=(height, width), mode="nearest-exact")  # exact below 2^24
        ids = ids.long().flatten(1)  # (B, h w)
        numbers = ids + torch.arange(batch, device=ids.device)[:, None] * (int(ids.max()) + 1)
        _, regions, areas = torch.unique(numbers, return_inverse=True, return_counts=True)  # (B, h w), (R,)
        pixels = probs.permute(0, 2, 3, 1).reshape(-1, channels)
        sums = pixels.new_zeros(len(areas), channels).index_add_(0, regions.flatten(), pixels)
        rest = pixels if keep_rest else F.one_hot(torch.zeros_like(regions.flatten()), channels).to(probs.dtype)
        averaged = torch.where(ids.flatten()[:, None] > 0, (sums / areas[:, None])[regions.flatten()], rest)
        return averaged.view(batch, height, width, channels).permute(0, 3, 1, 2)


def self_training_target(
    cam_logits: Tensor, images: Tensor, image_labels: Tensor, refinement: PixelAdaptiveRefinement
) -> Tensor:
    """Binarise the refined activation maps for training the auxiliary decoder on itself.

    The class probabilities are refined along image edges, masked by the tags and cut at
    ``max(f_c * max_p m_c, 0.2)`` with 0.7 for background and 0.6 for the classes. Pixels that pass for several classes
    are cleared.

    Args:
        cam_logits: (B, C, h, w) of the auxiliary decoder.
        images: (B, 3, H, W) RGB in [0, 1].
        image_labels: (B, C - 1) 0/1, the visible tags.
        refinement: the affinity refinement.

    Returns:
        (B, C, h, w) bool, at most one class per pixel.
    """
    with torch.no_grad():
        probs = torch.softmax(cam_logits.float(), dim=1)
        # Channels do not influence each other, and those that no image holds are masked afterwards: leave them out.
        held = with_background(image_labels.amax(0)).nonzero()[:, 0]
        masked = torch.zeros_like(probs)
        masked[:, held] = refinement(images, probs[:, held])
        masked = mask_by_labels(masked, image_labels)
        factors = torch.full((probs.shape[1],), FOREGROUND_THRESHOLD, device=probs.device)
        factors[0] = BACKGROUND_THRESHOLD
        thresholds = (factors[:, None, None] * masked.amax((2, 3), keepdim=True)).clamp(min=LOWEST_THRESHOLD)
        active = masked > thresholds
        return active & (active.sum(1, keepdim=True) == 1)


def random_dropout_mask(cam_logits: Tensor, image_labels: Tensor, split: ClassSplit) -> Tensor:
    """Find the pixels of new classes on which an old class is to be suppressed at random.

    Args:
        cam_logits: (B, C, h, w) of the auxiliary decoder.
        image_labels: (B, C - 1) 0/1, the visible tags.
        split: the step's classes.

    Returns:
        (B, h, w) bool: some tagged new class has a sigmoid probability above 0.5.
    """
    with torch.no_grad():
        probs = torch.sigmoid(cam_logits[:, split.semantic_new].float())
        tags = image_labels[:, split.center_new].to(probs.dtype)[:, :, None, None]
        return (probs * tags).amax(1) > 0.5
