"""The Segmenter: images to semantic logits, one center heatmap per class, and offsets to centers.

Legend: B images, C channels with background, H W network input, h w feature maps.

Source: CL4WSIS (ICCV 2023): a DeepLabv3 semantic branch and a Panoptic-DeepLab instance branch on shared features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl4wsis.errors import RunError
from cl4wsis.recipe import NetworkSettings
from cl4wsis_train.models.aspp import InstancePyramid, SemanticPyramid
from cl4wsis_train.models.decoder import PyramidDecoder, SeparableConvolution
from cl4wsis_train.models.discriminant import LinearDiscriminant
from cl4wsis_train.models.encoder import build_encoder
from cl4wsis_train.models.heads import StepHeads
from cl4wsis_train.models.maps import apply_image_prior, share_centers
from cl4wsis_train.models.upsampling import LearnedUpsampling

_OFFSET_CHANNELS = 32
_CLASS_PRIOR = 0.05  # share of pixels that a class is taken to have before anything is learned
_STATISTICS = "discriminant."  # what their names begin with
_LARGEST_DILATION = 32  # of the published pyramid at stride 8: 12, 24, 32


class SegmenterOutput(NamedTuple):
    """What the Segmenter returns for a batch."""

    semantic_logits: Tensor
    """(B, C, h, w) at the encoder's last stride, or at stride 4, raw; channel 0 is background."""
    center_heatmap: Tensor
    """(B, C - 1, H / 4, W / 4), raw: trained towards [0, 1] without a sigmoid."""
    offset_map: Tensor
    """(B, 2, H / 4, W / 4): (dy, dx), center minus pixel, in input pixels."""


class SemanticBranch(nn.Module):
    """Semantic pyramid and the classifier that grows with the steps.

    Args:
        settings: channels, dilations and output stride.
        in_channels: channels of the last encoder features.
        class_counts: foreground classes that each step adds; the first step's convolution also holds background.
    """

    def __init__(self, settings: NetworkSettings, in_channels: int, class_counts: Sequence[int]) -> None:
        super().__init__()
        dilations = settings.semantic_dilations
        if settings.output_stride == 8:
            dilations = (2 * dilations[0], 2 * dilations[1], min(2 * dilations[2], _LARGEST_DILATION))
        self.pyramid = SemanticPyramid(in_channels, settings.semantic_channels, dilations)
        self.classifier = StepHeads(settings.semantic_channels, [class_counts[0] + 1, *class_counts[1:]])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return ``semantic_logits`` (B, C, h, w) from the four encoder features."""
        logits: Tensor = self.classifier(self.pyramid(features[-1]))
        return logits


class InstanceBranch(nn.Module):
    """Instance pyramid, decoder, class-wise center head and class-free offset head.

    Args:
        settings: channels and dilations.
        feature_channels: channels of the four encoder features, finest first.
        class_counts: foreground classes that each step adds.
    """

    def __init__(self, settings: NetworkSettings, feature_channels: Sequence[int], class_counts: Sequence[int]) -> None:
        super().__init__()
        pyramid, channels = settings.instance_channels, settings.decoder_channels
        self.pyramid = InstancePyramid(feature_channels[-1], pyramid, settings.instance_dilations)
        self.decoder = PyramidDecoder(pyramid, feature_channels, channels)
        self.center_conv = SeparableConvolution(channels, channels)
        self.center_head = StepHeads(channels, class_counts)
        self.offset_conv = SeparableConvolution(channels, min(_OFFSET_CHANNELS, channels))
        self.offset_head = nn.Conv2d(min(_OFFSET_CHANNELS, channels), 2, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``center_heatmap`` (B, C - 1, H/4, W/4) and ``offset_map`` (B, 2, H/4, W/4) from encoder features."""
        x = self.decoder(self.pyramid(features[-1]), features)
        return self.center_head(self.center_conv(x)), self._offsets(self.offset_conv(x))

    def _offsets(self, x: Tensor) -> Tensor:
        """Apply the offset head in float32: half precision would round offsets of 64 px to half a pixel or worse."""
        offset_map: Tensor
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                offset_map = self.offset_head(x.float())
        else:
            offset_map = self.offset_head(x)
        return offset_map


class InstanceSegmenter(nn.Module):
    """Instance segmentation network whose outputs grow with the steps.

    Args:
        settings: encoder, its initial weights, and sizes. Use weights ``none`` where trained weights are loaded next.
        class_counts: foreground classes that each step adds, step 0 first.

    Raises:
        ConfigError: the encoder or its weights cannot be had.
        ValueError: ``class_counts`` is empty or holds a number below 1.
    """

    def __init__(self, settings: NetworkSettings, class_counts: Sequence[int]) -> None:
        super().__init__()
        if not class_counts or min(class_counts) < 1:
            raise ValueError(f"class_counts must hold one positive number per step, got {list(class_counts)}")
        self.settings = settings
        self.encoder = build_encoder(settings.encoder, settings.output_stride, settings.weights)
        self.semantic_branch = SemanticBranch(settings, self.encoder.channels[-1], class_counts)
        self.instance_branch = InstanceBranch(settings, self.encoder.channels, class_counts)
        self.upsampling: LearnedUpsampling | None = None
        if settings.learned_upsampling:
            scale = self.encoder.strides[-1] // self.encoder.strides[0]
            self.upsampling = LearnedUpsampling(self.encoder.channels, settings.decoder_channels, scale)
        self.discriminant = _build_discriminant(settings, self.encoder.channels[-1], class_counts)
        self._class_counts = tuple(class_counts)
        if settings.head_init == "prior":
            self._init_heads()
        self._mean: Tensor
        self._std: Tensor
        # Not saved with the weights: they follow from the encoder's name.
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Foreground classes that each step added."""
        return self._class_counts

    @property
    def num_classes(self) -> int:
        """Foreground classes of all steps."""
        return sum(self._class_counts)

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the input channels (RGB), 0..255."""
        return self.encoder.mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the input channels (RGB), 0..255."""
        return self.encoder.std

    def normalize(self, images: Tensor) -> Tensor:
        """Turn RGB images (B, 3, H, W) with values 0..255 (uint8 or float) into the float32 input of the network.

        The result lies channels-last in memory, and so do all maps computed from it: the depthwise convolutions of the
        decoder are several times faster that way on CPUs, and half-precision convolutions on GPUs.
        """
        normalized = (images.float() - self._mean) / self._std
        return normalized.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> SegmenterOutput:
        """Return all three maps; outside of training, with classes and centers corrected as the settings say.

        Args:
            images: (B, 3, H, W), normalised; H and W are multiples of 32 as the recipe demands.
        """
        features = self.encoder(images)
        semantic_logits: Tensor = self.semantic_branch(features)
        if not self.training:
            semantic_logits = self._correct_classes(features, semantic_logits)
        semantic_logits = self.enlarge_classes(semantic_logits, features)
        center_heatmap, offset_map = self.forward_instance(features)
        if not self.training and self.settings.shared_centers:
            center_heatmap = share_centers(semantic_logits, center_heatmap)
        return SegmenterOutput(semantic_logits, center_heatmap, offset_map)

    def forward_semantic(self, features: Sequence[Tensor]) -> Tensor:
        """Return ``semantic_logits`` (B, C, h, w) from the four encoder features."""
        return self.enlarge_classes(self.semantic_branch(features), features)

    def enlarge_classes(self, semantic_logits: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Bring what the semantic branch says to the grid of the finest features, where learned upsampling is on."""
        if self.upsampling is None:
            return semantic_logits
        enlarged: Tensor = self.upsampling(semantic_logits, features)
        return enlarged

    def forward_instance(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``center_heatmap`` and ``offset_map`` from the four encoder features."""
        center_heatmap, offset_map = self.instance_branch(features)
        return center_heatmap, offset_map

    def _correct_classes(self, features: Sequence[Tensor], semantic_logits: Tensor) -> Tensor:
        """Correct the classes by the discriminant, from step 1 on, and by the image."""
        if self.discriminant is not None and len(self.class_counts) > 1:
            semantic_logits = self.discriminant(features[-1], semantic_logits)
        if self.settings.image_prior:
            semantic_logits = apply_image_prior(semantic_logits, self.settings.image_prior)
        return semantic_logits

    def _init_heads(self) -> None:
        """Let classes begin rare, background frequent, and center heatmaps empty.

        Source: the prior initialisation of RetinaNet (Lin et al., ICCV 2017), section 4.1.
        """
        rare = math.log(_CLASS_PRIOR / (1 - _CLASS_PRIOR))
        classifier = self.semantic_branch.classifier
        classifier.init_constant(bias=rare)
        classifier.state_dict()["0.bias"][0] = -rare  # background
        self.instance_branch.center_head.init_constant(bias=0.0, weight=0.0)

    def train(self, mode: bool = True) -> "InstanceSegmenter":
        """Set the mode; the encoder stays in evaluation mode when it is to keep its stored statistics."""
        super().train(mode)
        if self.settings.encoder_statistics == "stored":
            self.encoder.eval()
        return self

    def load_previous(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights of the previous step's network; the convolutions this step adds keep their initial values.

        Where ``settings.new_class_init`` asks for it, these follow from the copied weights instead.

        Args:
            state: ``state_dict`` of a network with the same settings and one step less.

        Raises:
            ValueError: this network has one step only, so nothing comes before it.
            RunError: a tensor is missing, superfluous or has another shape.
        """
        if len(self.class_counts) < 2:
            raise ValueError("load_previous needs a network of at least two steps; use load_state_dict for the first")
        statistics = {key.removeprefix(_STATISTICS): state[key] for key in state if key.startswith(_STATISTICS)}
        state = {key: tensor for key, tensor in state.items() if not key.startswith(_STATISTICS)}
        own = {key: tensor for key, tensor in self.state_dict().items() if not key.startswith(_STATISTICS)}
        added = len(self.class_counts) - 1
        new_heads = (f"semantic_branch.classifier.{added}.", f"instance_branch.center_head.{added}.")
        kept = {key: tensor for key, tensor in own.items() if not key.startswith(new_heads)}
        problems = [f"{key} is missing" for key in kept if key not in state]
        problems += [f"{key} is not part of it" for key in state if key not in kept]
        problems += [
            f"{key} has shape {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
            for key, tensor in kept.items()
            if key in state and state[key].shape != tensor.shape
        ]
        if problems:
            rest = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise RunError(
                f"the previous step's weights do not fit a network of {added} earlier step(s) with classes "
                f"{list(self.class_counts[:-1])}: {'; '.join(problems[:3])}{rest}. Train every step of a plan with the "
                "same recipe.network"
            )
        if self.discriminant is not None:
            self.discriminant.load_previous(statistics)
        self.load_state_dict({**self.state_dict(), **state})
        self._init_new_classes()

    def _init_new_classes(self) -> None:
        """Give the channels of the last step the first values that the settings ask for."""
        classifier, center_head = self.semantic_branch.classifier, self.instance_branch.center_head
        if self.settings.new_class_init == "background":
            classifier.init_from_background()
            for parameter in center_head.convolutions[-1].parameters():
                nn.init.zeros_(parameter)
        elif self.settings.new_class_init == "old_mean":
            classifier.init_from_mean(first=1)
            center_head.init_from_mean(first=0)


def _build_discriminant(
    settings: NetworkSettings, num_features: int, class_counts: Sequence[int]
) -> LinearDiscriminant | None:
    """Build one where it is asked for, and in step 0 always: later steps may want its statistics."""
    if not settings.discriminant and len(class_counts) > 1:
        return None
    return LinearDiscriminant(num_features, class_counts, settings.discriminant, settings.discriminant_window)
