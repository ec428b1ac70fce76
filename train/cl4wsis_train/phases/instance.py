"""Phase 2: train the instance branch on centers and offsets made from regions and peaks.

Everything but the instance branch is frozen. New classes: regions of the class map that hold one peak become instances
with a center and offsets; the branch's own maps refine the rest. Old classes: the previous network's maps are
distilled, on pixels of old classes only.

Source: CL4WSIS (ICCV 2023), section 3.3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cl4wsis.recipe import Recipe
from cl4wsis_train.data.batch import Batch
from cl4wsis_train.data.targets import InstanceTargets
from cl4wsis_train.losses.distill import selective_center_loss, selective_offset_loss
from cl4wsis_train.losses.instance import center_loss, offset_loss
from cl4wsis_train.models.maps import upsample
from cl4wsis_train.phases.common import Losses, Phase, freeze, global_count
from cl4wsis_train.phases.semantic import SemanticPhase
from cl4wsis_train.pseudo.instance import SemanticMap, find_peaks, semantic_map_from_logits, synthesize_targets
from cl4wsis_train.pseudo.refine import merge_targets, refine_targets


class FrozenMaps(NamedTuple):
    """What the frozen networks say about a batch."""

    features: list[Tensor]
    """Encoder features, the input of the instance branch."""
    semantic: SemanticMap
    activation: Tensor
    """(B, n, h, w) peak maps of the new classes in [0, 1]."""
    old_center_heatmap: Tensor
    """(B, o - 1, H, W), upsampled, of the previous network."""
    old_offset_map: Tensor
    """(B, 2, H, W), upsampled, of the previous network."""


class InstancePhase(Phase):
    """The instance branch in training; encoder, semantic branch, localizer and peak generator frozen.

    Args:
        semantic_phase: phase 1 of the same step, trained.
        recipe: of the plan.
        all_seen_labels: tags of old classes are given, so absent old classes are ruled out in the class map.

    Attributes:
        statistics: of the last batch: peaks, regions of new classes and isolated regions per image, and the share of
            supervised pixels that owe their target to refinement.
    """

    def __init__(self, semantic_phase: SemanticPhase, recipe: Recipe, all_seen_labels: bool = False) -> None:
        super().__init__(semantic_phase.network)
        self.localizer = freeze(semantic_phase.localizer)
        self.peak_generator = freeze(semantic_phase.peak_generator) if semantic_phase.peak_generator else None
        self.old_network = freeze(semantic_phase.old_network)
        self.peak_input = semantic_phase.peak_input
        self.split = semantic_phase.split
        self.settings = recipe.instance
        self.all_seen_labels = all_seen_labels
        self.shares_encoder = not recipe.semantic.train_encoder
        self.length_scale = recipe.length_scale
        freeze(self.network)
        for parameter in self.network.instance_branch.parameters():
            parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> "InstancePhase":
        """Set the mode of the instance branch; everything else stays in evaluation mode."""
        super().train(False)
        self.training = mode
        self.network.instance_branch.train(mode)
        return self

    def forward(self, batch: Batch, epoch: int) -> Losses:
        """Return the weighted losses of a batch that has tags only.

        L = 0.5 * 200 * (old centers + new centers) + 0.5 * 0.01 * (old offsets + new offsets): the old ones on pixels
        of old classes, the new ones on instances made here, each divided by the number of its pixels in the batch.
        """
        size = (batch.images.shape[2], batch.images.shape[3])
        frozen = self._run_frozen(batch, size)
        center_heatmap, offset_map = self.network.forward_instance(frozen.features)
        center_heatmap, offset_map = upsample(center_heatmap, size), upsample(offset_map, size)
        target = self.make_targets(batch, frozen, center_heatmap.detach(), offset_map.detach())

        old_mask = frozen.semantic.old_pixels(self.split)
        if not self.settings.selective_distillation:
            old_mask = torch.ones_like(old_mask)
        num_old, num_new = global_count(old_mask), global_count(target.loss_weight)
        weights = self.settings.instance_loss
        center_weight = self.settings.loss_scale * weights.center_weight
        offset_weight = self.settings.loss_scale * weights.offset_weight / self.length_scale
        new_heatmap = center_heatmap[:, self.split.center_new]
        return {
            "center_old": center_weight
            * selective_center_loss(center_heatmap, frozen.old_center_heatmap, old_mask, num_old),
            "center_new": center_weight * center_loss(new_heatmap, target.center_target, target.loss_weight, num_new),
            "offset_old": offset_weight * selective_offset_loss(offset_map, frozen.old_offset_map, old_mask, num_old),
            "offset_new": offset_weight * offset_loss(offset_map, target.offset_target, target.loss_weight, num_new),
        }

    @torch.no_grad()
    def make_targets(
        self, batch: Batch, frozen: FrozenMaps, center_heatmap: Tensor, offset_map: Tensor
    ) -> InstanceTargets:
        """Make the targets of the new classes from peaks, and from the branch's own maps where peaks do not suffice.

        Args:
            batch: with tags.
            frozen: what the frozen networks say.
            center_heatmap: (B, C - 1, H, W), upsampled, detached.
            offset_map: (B, 2, H, W), upsampled, detached.
        """
        size = (batch.images.shape[2], batch.images.shape[3])
        peaks, refine = self.settings.peaks, self.settings.refine
        sigma = self.settings.instance_loss.center_sigma * self.length_scale
        found = find_peaks(frozen.activation, batch.image_labels, self.split, peaks, size, self.length_scale)
        synthesized = synthesize_targets(
            frozen.semantic.semantic_map, found, batch.image_labels, self.split, peaks, self.length_scale, sigma
        )
        self.statistics = {
            "peaks_per_image": synthesized.num_peaks.float().mean(),
            "regions_per_image": synthesized.num_regions.float().mean(),
            "isolated_per_image": synthesized.num_isolated.float().mean(),
        }
        if not refine.enabled:
            return synthesized.targets
        refined = refine_targets(
            center_heatmap,
            offset_map,
            frozen.semantic.new_class_probs,
            synthesized.regions,
            self.split,
            refine,
            self.length_scale,
            sigma,
        )
        merged = merge_targets(synthesized.targets, refined)
        isolated, all_pixels = ((t.loss_weight > 0).sum() for t in (synthesized.targets, merged))
        self.statistics["refined_pixel_share"] = (all_pixels - isolated) / all_pixels.clamp(min=1)
        return merged

    @torch.no_grad()
    def _run_frozen(self, batch: Batch, size: tuple[int, int]) -> FrozenMaps:
        """Run the frozen networks once: this step's on images and their mirror images, the old one on images."""
        images = self.network.normalize(batch.images)
        both = self.network.encoder(torch.cat([images, images.flip(3)]))
        logits, flipped_logits = self.network.forward_semantic(both).chunk(2)
        features = [level[: len(images)] for level in both]
        old_features = features if self.shares_encoder else self.old_network.encoder(images)
        old_center_heatmap, old_offset_map = self.old_network.forward_instance(old_features)
        return FrozenMaps(
            features=features,
            semantic=semantic_map_from_logits(
                logits, flipped_logits, batch.image_labels, self.split, size, self.all_seen_labels
            ),
            activation=self._activation(self.localizer(features[-1]).float(), batch.image_labels),
            old_center_heatmap=upsample(old_center_heatmap, size),
            old_offset_map=upsample(old_offset_map, size),
        )

    def _activation(self, cam_logits: Tensor, image_labels: Tensor) -> Tensor:
        """Return peak maps (B, n, h, w); without a peak generator, class probabilities over their maximum."""
        new_labels = image_labels[:, self.split.center_new]
        if self.peak_generator is not None:
            peak_maps = self.peak_generator(self.peak_input(cam_logits))
            activation: Tensor = self.peak_generator.activation(peak_maps, new_labels)
            return activation
        probs = cam_logits.softmax(dim=1)[:, self.split.semantic_new] * new_labels[:, :, None, None]
        return probs / (probs.amax(dim=(2, 3), keepdim=True) + 1e-5)
