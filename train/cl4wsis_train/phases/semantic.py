"""Phase 1: learn where the new classes are from image tags, while the old network guards the old classes.

CL4WSIS (ICCV 2023), section 3.2, with the parts it inherits from WILSON (CVPR 2022): an auxiliary decoder, the
localizer, turns encoder features into activation maps; tags supervise it through pooling and through the peak
generator. After some warm-up epochs its maps, mixed with the old network's probabilities, become the target of the
Segmenter's semantic branch.

Legend: Z activation logits of the localizer, P' old probabilities, G semantic target, o old channels with background.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cl4wsis.recipe import Recipe
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.data.batch import Batch
from cl4wsis_train.losses.cam import flac_loss, random_dropout_loss
from cl4wsis_train.losses.distill import encoder_distillation_loss, localizer_distillation_loss
from cl4wsis_train.losses.semantic import classification_loss, self_training_loss, semantic_bce_loss
from cl4wsis_train.models.affinity import PixelAdaptiveRefinement
from cl4wsis_train.models.discriminant import NO_CLASS
from cl4wsis_train.models.localizer import (
    Localizer,
    PeakAttention,
    PeakGenerator,
    normalized_global_weighted_pooling,
)
from cl4wsis_train.models.maps import upsample
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.phases.common import Losses, Phase, freeze, global_count
from cl4wsis_train.processes import draw_for_images
from cl4wsis_train.pseudo.semantic import (
    average_over_proposals,
    random_dropout_mask,
    self_training_target,
    semantic_target,
    with_background,
)

_FINE_STRIDE = 4  # of the refined target, as of the instance branch

_MOST_MARGINS = 1 << 24
"""Pixels on which a quantile is measured: 128 MB."""


class SemanticPhase(Phase):
    """Encoder, semantic branch, localizer and peak generator in training, against a frozen old network.

    Args:
        network: the Segmenter, started from the previous step's weights; its instance branch takes no part.
        old_network: the previous step's Segmenter.
        recipe: of the plan.
        split: classes of the step.
        all_seen_labels: tags of old classes are given and used as well (the publication's ASLA setting).
    """

    def __init__(
        self,
        network: InstanceSegmenter,
        old_network: InstanceSegmenter,
        recipe: Recipe,
        split: ClassSplit,
        all_seen_labels: bool = False,
    ) -> None:
        super().__init__(network)
        self.all_seen_labels = all_seen_labels
        self.localizer = Localizer(network.encoder.channels[-1], recipe.network.localizer_channels, split.num_classes)
        self.peak_generator = _build_peak_module(recipe, split)
        self.old_network = freeze(old_network)
        self.refinement = PixelAdaptiveRefinement()
        self.settings = recipe.semantic
        self.split = split
        freeze(network.instance_branch)
        if network.upsampling is not None:
            freeze(network.upsampling)
        if not self.settings.train_encoder:
            freeze(network.encoder)

    def train(self, mode: bool = True) -> "SemanticPhase":
        """Set the mode of the trained parts; the old network stays in evaluation mode."""
        super().train(mode)
        self.old_network.eval()
        self.network.instance_branch.eval()
        if self.network.upsampling is not None:
            self.network.upsampling.eval()
        if not self.settings.train_encoder:
            self.network.encoder.eval()
        return self

    def forward(self, batch: Batch, epoch: int) -> Losses:
        """Return the weighted losses of a batch that has tags only."""
        features, old_features = self._run_encoders(batch)
        last = features[-1]
        with torch.no_grad():
            old_cells = self.old_network.semantic_branch(old_features).float()  # (B, o, h, w)

        quarter_turns = int(torch.randint(1, 4, ()))
        cam_logits, flipped, rotated = self._cam_logits(last, quarter_turns)
        losses = self._tag_losses(cam_logits, batch.image_labels)
        if self.settings.localizer_distillation:
            guide = self._without_absent_classes(old_cells.sigmoid(), batch.image_labels)
            loss = localizer_distillation_loss(cam_logits, guide)
            losses["localizer_distillation"] = self.settings.localizer_distillation * loss
        if self.settings.encoder_distillation and self.settings.train_encoder:
            loss = encoder_distillation_loss(last, old_features[-1])
            losses["encoder_distillation"] = self.settings.encoder_distillation * loss
        if flipped is not None and rotated is not None:
            losses["flac"] = flac_loss(
                cam_logits, flipped, rotated, quarter_turns, self.split.num_old_classes, self.settings.flac_average
            )
        if epoch >= self.settings.optimizer.warmup_epochs:
            eval_logits = self._eval_cam_logits(last)
            semantic_logits, old_logits = self._enlarged(features, old_features, old_cells)
            losses["semantic"] = self._semantic_loss(batch, eval_logits, semantic_logits, old_logits)
            losses |= self._self_supervised_losses(batch, cam_logits, eval_logits)
        return losses

    @torch.no_grad()
    def lower_new_classes(self, batches: Iterable[Batch], share: float) -> float:
        """Lower the logits of the new classes by as much as costs them a share of their own pixels.

        No image of this phase shows what new classes must not claim, the objects of old classes. Their logits grow
        until they win on their own pixels, and further; the quantile of the margin by which they win there says how
        much of it can be spared. It is taken off the biases of the newest classifier.

        Args:
            batches: training images with their tags.
            share: of the pixels on which a tagged new class has the largest logit.

        Returns:
            What was taken off; 0 where no new class wins a pixel.
        """
        self.network.eval()
        new = self.split.semantic_new
        margins: list[Tensor] = []
        stride, count = 1, 0
        for batch in batches:
            images = self.network.normalize(batch.images)
            logits = self.network.forward_semantic(self.network.encoder(images)).float()  # (B, C, h, w)
            tagged = with_background(batch.image_labels)[:, :, None, None] > 0
            own = logits.masked_fill(~tagged, -torch.inf)[:, new].amax(1)
            others = torch.cat(
                [logits[:, self.split.semantic_old], logits[:, new].masked_fill(tagged[:, new], -torch.inf)], 1
            )
            margin = own - others.amax(1)  # (B, h, w)
            margins.append(margin[margin > 0][::stride].cpu())
            count += len(margins[-1])
            if count > _MOST_MARGINS:  # every other one tells the quantile as well
                margins, stride = [torch.cat(margins)[::2]], 2 * stride
                count = len(margins[0])
        found = torch.cat(margins).double().numpy()
        drop = float(np.quantile(found, share)) if len(found) else 0.0
        self.network.semantic_branch.classifier.convolutions[-1].get_parameter("bias").sub_(drop)
        return drop

    def labelled_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the discriminant learns from a batch: cells in which the semantic branch sees a tagged new class.

        Returns:
            features (B, d, h, w), the encoder's last, and class or ``NO_CLASS`` (B, h, w).
        """
        features = self.network.encoder(self.network.normalize(batch.images))
        logits = self.network.semantic_branch(features).float()  # (B, C, h, w)
        untagged = with_background(batch.image_labels) == 0
        untagged[:, self.split.semantic_old] = False
        classes = logits.masked_fill(untagged[:, :, None, None], -torch.inf).argmax(1) - 1
        return features[-1], classes.masked_fill(classes < self.split.num_old_classes, NO_CLASS)

    def _run_encoders(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features of this network and of the old one; a frozen encoder is one for both."""
        images = self.network.normalize(batch.images)
        with torch.no_grad():
            old_features = self.old_network.encoder(images)
        features = self.network.encoder(images) if self.settings.train_encoder else old_features
        return features, old_features

    def _enlarged(self, features: list[Tensor], old_features: list[Tensor], old_cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of this network and of the old one; on shared features one upsampling serves both."""
        if self.network.upsampling is None or features is not old_features:
            with torch.no_grad():
                old_logits = self.old_network.enlarge_classes(old_cells, old_features)
            return self.network.forward_semantic(features), old_logits
        cells: Tensor = self.network.semantic_branch(features)
        both = self.network.enlarge_classes(torch.cat([cells.float(), old_cells], dim=1), features)
        return both[:, : cells.shape[1]], both[:, cells.shape[1] :].detach()

    def _cam_logits(self, features: Tensor, quarter_turns: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the localizer on features and, for FLAC, on their mirror image and rotation in one batch."""
        if not self.settings.flac:
            return self.localizer(features).float(), None, None
        views = (features, features.flip(3), torch.rot90(features, quarter_turns, (2, 3)))
        original, flipped, rotated = self.localizer(torch.cat(views)).float().chunk(3)
        return original, flipped, rotated

    def _eval_cam_logits(self, features: Tensor) -> Tensor:
        """Run the localizer with stored statistics and without gradient, as pseudo labels are made."""
        self.localizer.eval()
        with torch.no_grad():
            logits: Tensor = self.localizer(features.detach()).float()
        self.localizer.train(self.training)
        return logits

    def _clipped(self, cam_logits: Tensor) -> Tensor:
        """Clip new-class logits at 0 for the losses that see them so in the published code."""
        if not (self.settings.clip_new_logits and self.peak_generator is not None):
            return cam_logits
        old, new = cam_logits[:, self.split.semantic_old], cam_logits[:, self.split.semantic_new]
        return torch.cat([old, new.relu()], dim=1)

    def peak_input(self, cam_logits: Tensor) -> Tensor:
        """Return what the peak generator sees of activation logits (B, C, h, w): (B, n, h, w)."""
        new = self.split.semantic_new
        if self.settings.peak_input == "logits":
            return cam_logits[:, new]
        log_probs = cam_logits.log_softmax(dim=1)[:, new]
        return log_probs - torch.log1p(-log_probs.exp().clamp(max=1 - 1e-6))

    def _without_absent_classes(self, old_probs: Tensor, image_labels: Tensor) -> Tensor:
        """Silence old classes that an image does not hold, when its tags tell so."""
        if not self.all_seen_labels:
            return old_probs
        present = with_background(image_labels[:, self.split.center_old])
        return old_probs * present[:, :, None, None]

    def _tag_losses(self, cam_logits: Tensor, image_labels: Tensor) -> Losses:
        """Supervise the localizer and the peak generator with the tags."""
        split = self.split
        pooled = normalized_global_weighted_pooling(self._clipped(cam_logits))[:, 1:]  # (B, C-1)
        tagged = slice(None) if self.all_seen_labels else split.center_new
        losses = {"classification": classification_loss(pooled[:, tagged], image_labels[:, tagged])}
        if self.peak_generator is not None:
            peak_maps = self.peak_generator(self.peak_input(cam_logits))
            pooled_peaks = self.peak_generator.pooled_logits(peak_maps)
            losses["peak"] = classification_loss(pooled_peaks, image_labels[:, split.center_new])
        return losses

    def _semantic_loss(self, batch: Batch, eval_logits: Tensor, semantic_logits: Tensor, old_logits: Tensor) -> Tensor:
        """Train the semantic branch with the old network's opinion and what the localizer has learned so far."""
        settings = self.settings
        size = semantic_logits.shape[2:]
        if settings.refine_target:
            size = torch.Size(side // _FINE_STRIDE for side in batch.images.shape[2:])
        cam_probs = upsample(eval_logits.softmax(dim=1), size)
        if settings.refine_target:
            cam_probs = self.refinement(batch.images.float() / 255, cam_probs)
        semantic_logits, old_logits = upsample(semantic_logits, size), upsample(old_logits, size)
        if batch.proposals is not None and settings.proposals != "ignore":
            cam_probs = average_over_proposals(cam_probs, batch.proposals, keep_rest=settings.proposals == "refine")
        old_probs = old_logits.sigmoid()
        if settings.clean_old_targets:
            old_probs = self._without_absent_classes(old_probs, batch.image_labels)
        target = semantic_target(
            cam_probs,
            old_probs,
            batch.image_labels,
            settings.label_smoothing,
            settings.old_classes_compete,
            settings.suppress_old,
        )
        return semantic_bce_loss(semantic_logits, target)

    def _self_supervised_losses(self, batch: Batch, cam_logits: Tensor, eval_logits: Tensor) -> Losses:
        """Train the localizer on itself, and against leaning on old classes."""
        settings, split, labels = self.settings, self.split, batch.image_labels
        losses: Losses = {}
        if settings.self_training:
            hard = self_training_target(eval_logits, batch.images.float() / 255, labels, self.refinement)
            losses["self_training"] = self_training_loss(self._clipped(cam_logits), hard, labels)
        if settings.random_dropout:
            mask = random_dropout_mask(eval_logits, labels, split)
            first = 0 if settings.random_dropout_background else 1
            classes = draw_for_images(first, split.num_old_classes + 1, mask.shape, mask.device)
            if self.all_seen_labels:
                mask = mask & _is_present(classes, labels)
            losses["random_dropout"] = random_dropout_loss(cam_logits, mask, classes, global_count(mask))
        return losses


def _build_peak_module(recipe: Recipe, split: ClassSplit) -> PeakAttention | None:
    """Build what turns activations into peaks, if anything does."""
    if not recipe.semantic.peak_generator:
        return None
    return PeakAttention() if recipe.semantic.peak_module == "attention" else PeakGenerator(split.num_new_classes)


def _is_present(classes: Tensor, image_labels: Tensor) -> Tensor:
    """Tell for each pixel's channel number (B, h, w) whether its image holds that class; background always is."""
    present = with_background(image_labels) > 0
    return present.gather(1, classes.flatten(1)).view_as(classes)
