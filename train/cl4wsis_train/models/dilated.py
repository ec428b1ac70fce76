"""Dilated convolutions without work that changes nothing, and depthwise ones that are cheap on CPUs too.

On a map of at most d cells, dilation d puts every tap but the middle one on padding: a 3x3 convolution is a 1x1 one
there. With dilations 12 and 18, as the pyramids have them, that is so for images of up to 192 and 288 px at stride 16.

Depthwise: output pixels depend on input pixels of the same row and column modulo d alone. The d x d interleaved images
are therefore convolved side by side without dilation: the same sums, but CPU libraries have a fast backward pass for
them. At 8x8 cells and 1152 channels, kernel 5 and dilation 2, forward and backward take a tenth of the time; so does
the forward pass alone at 20x20 cells and dilation 4, for which these libraries lack a fast one too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DilatedConv2d(nn.Conv2d):
    """A dilated 3x3 convolution that keeps the size of its input; only taps that can see the map are computed."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        sides = list(zip(input.shape[2:], self.dilation, strict=True))
        rows, columns = (slice(None) if size > dilation else slice(1, 2) for size, dilation in sides)
        padding = [dilation if size > dilation else 0 for size, dilation in sides]
        dilations = [dilation if size > dilation else 1 for size, dilation in sides]
        return F.conv2d(input, self.weight[:, :, rows, columns], padding=padding, dilation=dilations)


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps the size of its input.

    Args:
        convolution: whose settings and parameters it takes over.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            padding=convolution.padding,  # type: ignore[arg-type]
            dilation=convolution.dilation,  # type: ignore[arg-type]
            groups=convolution.groups,
            bias=convolution.bias is not None,
            device="meta",
        )
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W); interleaved where that is faster and the size allows it."""
        batch, channels, height, width = input.shape
        dilation, padding = self.dilation[0], int(self.padding[0])
        backward_follows = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if (
            not (backward_follows or dilation > 2)
            or input.device.type != "cpu"
            or height % dilation
            or width % dilation
            or torch.compiler.is_compiling()
        ):
            return super().forward(input)
        cells = (batch, height // dilation, dilation, width // dilation, dilation, channels)
        apart = input.permute(0, 2, 3, 1).reshape(cells).permute(0, 2, 4, 1, 3, 5)  # (B, d, d, H/d, W/d, C)
        interleaved = apart.reshape(-1, *apart.shape[3:]).permute(0, 3, 1, 2)  # (B d d, C, H/d, W/d), channels last
        output = F.conv2d(interleaved, self.weight, self.bias, padding=padding // dilation, groups=channels)
        together = output.permute(0, 2, 3, 1).reshape(apart.shape).permute(0, 3, 1, 4, 2, 5)
        return together.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def replace_dilated_depthwise(network: nn.Module) -> None:
    """Put :class:`DilatedDepthwiseConv2d` in the place of every convolution that it can stand for, parameters kept."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and _is_suitable(child):
                setattr(parent, name, DilatedDepthwiseConv2d(child))


def _is_suitable(convolution: nn.Conv2d) -> bool:
    (dilation, across), (side, width) = convolution.dilation, convolution.kernel_size
    return (
        convolution.in_channels == convolution.out_channels == convolution.groups
        and convolution.stride == (1, 1)
        and convolution.padding_mode == "zeros"
        and dilation == across > 1
        and side == width
        and convolution.padding == (dilation * (side - 1) // 2,) * 2
        and side % 2 == 1
    )
