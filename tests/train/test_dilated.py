import pytest
import torch
from torch import nn

from cl4wsis_train.models.dilated import DilatedDepthwiseConv2d, replace_dilated_depthwise
from cl4wsis_train.models.encoder import build_encoder


def depthwise(channels: int, kernel_size: int, dilation: int, **options: object) -> nn.Conv2d:
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(
        channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, **options
    ).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel_size", "dilation", "size"), [(5, 2, (8, 12)), (3, 4, (8, 8)), (3, 2, (7, 8))])
def test_values_and_gradients_are_those_of_the_plain_convolution(
    kernel_size: int, dilation: int, size: tuple[int, int], bias: bool
) -> None:
    plain = depthwise(6, kernel_size, dilation, bias=bias)
    fast = DilatedDepthwiseConv2d(plain)
    features = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(2, 6, *size, dtype=torch.float64)
    results = []
    for convolution in (plain, fast):
        given = features.clone().requires_grad_()
        convolution.zero_grad()
        output = convolution(given)
        (output * weights).sum().backward()
        gradients = [parameter.grad.clone() for parameter in convolution.parameters()]
        results.append([output, given.grad, *gradients])
        assert output.is_contiguous(memory_format=torch.channels_last)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dilation", [2, 4])
def test_values_without_gradients_are_those_of_the_plain_convolution(dilation: int) -> None:
    plain = depthwise(6, 5, dilation)
    features = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(DilatedDepthwiseConv2d(plain)(features), plain(features))


def test_only_convolutions_it_can_stand_for_are_replaced() -> None:
    network = nn.Sequential(
        depthwise(4, 3, 2),
        depthwise(4, 3, 1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, padding_mode="reflect"),
    )
    replace_dilated_depthwise(network)
    assert [type(module) is DilatedDepthwiseConv2d for module in network] == [True] + 6 * [False]


def test_encoders_keep_their_parameters_and_names() -> None:
    encoder = build_encoder("tf_efficientnet_lite0", 16, "none")
    replaced = [name for name, module in encoder.named_modules() if isinstance(module, DilatedDepthwiseConv2d)]
    assert len(replaced) == 4
    assert {f"{name}.weight" for name in replaced} <= set(encoder.state_dict())
    assert not any(parameter.is_meta for parameter in encoder.parameters())
