"""WiderResNet-38 A2: a shallow, very wide residual network with activations before the convolutions.

Six modules of residual blocks follow a stem of one convolution; the first four hold blocks of two 3x3 convolutions,
the last two bottlenecks with channel dropout. From ``output_stride`` on, dilations stand in for strides. Batch
normalisation with leaky ReLU has the place of in-place activated batch normalisation; tensors go by the names of the
published checkpoints.

Source: Wu, Shen and van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition" (2016), in
the variant A2 of Rota Bulò et al., "In-Place Activated BatchNorm" (CVPR 2018).
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

LEAKY_SLOPE = 0.01

STEM_CHANNELS = 64
NUM_BLOCKS = (3, 3, 6, 3, 1, 1)
"""Residual blocks of each module."""
CHANNELS = ((128, 128), (256, 256), (512, 512), (512, 1024), (512, 1024, 2048), (1024, 2048, 4096))
"""Output channels of each convolution in a block of each module."""

_DROPOUT = (0.0, 0.0, 0.0, 0.0, 0.3, 0.5)
_NUM_POOLED = 2  # modules that begin with a max-pooling; the next three halve the size themselves, the last does not
_STRIDES = (2, 2, 2, 2, 2, 1)
_TAPS = (1, 2, 4, 5)  # modules whose output is a feature map

_NormAct = partial(BatchNormAct2d, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": LEAKY_SLOPE})


class WiderResNet(nn.Module):
    """The network without its classifier, with four feature maps.

    The maps are the outputs of the second (stride 4), third (8), fifth and last module (both at the output stride); the
    last is normalised and activated, the others are sums of residuals as they leave their module. With output stride 8
    the published network takes its finest map at stride 8 too; here the second module adds stride 4.

    Args:
        output_stride: stride of the last modules, 8 or 16.
        num_blocks: residual blocks of each of the six modules.
        channels: output channels of each convolution in a block, per module: two numbers, or three for bottlenecks.
    """

    def __init__(
        self,
        output_stride: int,
        num_blocks: Sequence[int] = NUM_BLOCKS,
        channels: Sequence[tuple[int, ...]] = CHANNELS,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16):
            raise ValueError(f"output_stride must be 8 or 16, got {output_stride}")
        self.channels = [channels[module][-1] for module in _TAPS]
        """Channels of the four feature maps."""
        self.strides: list[int] = []
        """Strides of the four feature maps, input pixels."""
        self.mod1 = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, STEM_CHANNELS, 3, padding=1, bias=False)))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels, stride, dilation = STEM_CHANNELS, 1, 1
        for module, (count, widths) in enumerate(zip(num_blocks, channels, strict=True)):
            reduction = _STRIDES[module]
            if stride == output_stride:
                reduction, dilation = 1, dilation * reduction
            stride *= reduction
            first_stride = 1 if module < _NUM_POOLED else reduction
            blocks = OrderedDict[str, nn.Module]()
            for block in range(count):
                blocks[f"block{block + 1}"] = ResidualBlock(
                    in_channels, widths, first_stride if block == 0 else 1, dilation, _DROPOUT[module]
                )
                in_channels = widths[-1]
            self.add_module(f"mod{module + 2}", nn.Sequential(blocks))
            if module in _TAPS:
                self.strides.append(stride)
        self.bn_out = _NormAct(in_channels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, LEAKY_SLOPE, nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four feature maps, finest first, from normalised images (B, 3, H, W)."""
        x = self.mod1(images)
        features = []
        for module in range(len(_STRIDES)):
            if module < _NUM_POOLED:
                x = self.pool(x)
            x = self.get_submodule(f"mod{module + 2}")(x)
            if module in _TAPS:
                features.append(x)
        features[-1] = self.bn_out(x)
        return features


class ResidualBlock(nn.Module):
    """Normalised and activated input, two or three convolutions, and the input added to what they give.

    The input is projected where its size or its channels change; then the projection sees it normalised and activated.

    Args:
        in_channels: channels of the input.
        channels: output channels of two 3x3 convolutions, or of a 1x1, a 3x3 and a 1x1 convolution.
        stride: of the first convolution.
        dilation: of the 3x3 convolutions.
        dropout: probability with which a channel is dropped before the last convolution, in training.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], stride: int, dilation: int, dropout: float) -> None:
        super().__init__()
        kernels = (3, 3) if len(channels) == 2 else (1, 3, 1)
        layers = OrderedDict[str, nn.Module]()
        inputs, strides = (in_channels, *channels[:-1]), (stride, 1, 1)
        for number, (width_in, width, kernel) in enumerate(zip(inputs, channels, kernels, strict=True), start=1):
            if number > 1:
                layers[f"bn{number}"] = _NormAct(width_in)
            if number == len(channels) and dropout:
                layers["dropout"] = nn.Dropout2d(dropout)
            spread = dilation if kernel == 3 else 1
            layers[f"conv{number}"] = nn.Conv2d(
                width_in, width, kernel, strides[number - 1], spread * (kernel // 2), spread, bias=False
            )
        self.bn1 = _NormAct(in_channels)
        self.convs = nn.Sequential(layers)
        changes = stride != 1 or in_channels != channels[-1]
        self.proj_conv = nn.Conv2d(in_channels, channels[-1], 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels[-1], h / stride, w / stride) from (B, in_channels, h, w)."""
        activated = self.bn1(x)
        shortcut = x if self.proj_conv is None else self.proj_conv(activated)
        output: Tensor = self.convs(activated) + shortcut
        return output
