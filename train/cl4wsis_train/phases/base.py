"""Supervised training on masks: step 0, and the baselines (CL4WSIS, ICCV 2023, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cl4wsis.recipe import Recipe
from cl4wsis_train.data.batch import Batch
from cl4wsis_train.data.targets import encode_instance_targets, semantic_target_from_ids
from cl4wsis_train.losses.instance import center_loss, offset_loss
from cl4wsis_train.losses.semantic import semantic_bce_loss
from cl4wsis_train.models.discriminant import NO_CLASS
from cl4wsis_train.models.maps import upsample
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.phases.common import Losses, Phase, global_count
from cl4wsis_train.processes import num_processes

_HALF = 0.5


class BasePhase(Phase):
    """The Segmenter with the supervised losses.

    Args:
        network: the Segmenter; all of it is trained.
        recipe: of the plan.
    """

    def __init__(self, network: InstanceSegmenter, recipe: Recipe) -> None:
        super().__init__(network)
        self.settings = recipe.base
        self.center_sigma = recipe.base.instance_loss.center_sigma * recipe.length_scale
        self.offset_weight = recipe.base.instance_loss.offset_weight / recipe.length_scale

    def forward(self, batch: Batch, epoch: int) -> Losses:
        """Return the weighted losses ``semantic``, ``center`` and ``offset`` of a batch with masks.

        L = BCE summed over classes + 200 * center + 0.01 * offset, all at crop resolution; centers and offsets count on
        object pixels only. Void pixels count nowhere.
        """
        if batch.instance_ids is None or batch.labels is None:
            raise ValueError("the base phase needs batches with instance_ids and labels")
        output = self.network(self.network.normalize(batch.images))
        size = batch.images.shape[-2:]
        num_classes = output.center_heatmap.shape[1]
        with torch.no_grad():
            semantic_target = semantic_target_from_ids(batch.instance_ids, batch.labels, num_classes)
            target = encode_instance_targets(batch.instance_ids, batch.labels, num_classes, self.center_sigma)
            count = global_count(target.loss_weight)
            void = batch.void
            if void is None and num_processes() > 1:  # another process may have some, and all must count together
                void = torch.zeros_like(batch.instance_ids, dtype=torch.bool)
            num_known = None if void is None else global_count(~void)
        center = center_loss(upsample(output.center_heatmap, size), target.center_target, target.loss_weight, count)
        offset = offset_loss(upsample(output.offset_map, size), target.offset_target, target.loss_weight, count)
        semantic = semantic_bce_loss(upsample(output.semantic_logits, size), semantic_target, void, num_known)
        return {
            "semantic": semantic,
            "center": self.settings.instance_loss.center_weight * center,
            "offset": self.offset_weight * offset,
        }

    def labelled_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the discriminant learns from a batch: for each cell, the class that has more than half of it.

        Returns:
            features (B, d, h, w), the encoder's last, and class or ``NO_CLASS`` (B, h, w).
        """
        assert batch.instance_ids is not None
        assert batch.labels is not None
        features = self.network.encoder(self.network.normalize(batch.images))[-1]
        pixels = semantic_target_from_ids(batch.instance_ids, batch.labels, self.network.num_classes)
        shares, classes = F.adaptive_avg_pool2d(pixels[:, 1:].float(), features.shape[2:]).max(1)
        return features, classes.masked_fill(shares <= _HALF, NO_CLASS)
