import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cl4wsis_train.models.dilated import DilatedConv2d, DilatedDepthwiseConv2d, replace_dilated_depthwise
from cl4wsis_train.models.encoder import build_encoder


def depthwise(channels: int, kernel_size: int, dilation: int, **options: object) -> nn.Conv2d:
    padding = dilation * (kernel_size - 1) // 2
    return nn.Conv2d(
        channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, **options
    ).double()


def values_and_gradients(convolution: nn.Module, features: Tensor, weights: Tensor) -> list[Tensor]:
    given = features.clone().requires_grad_()
    convolution.zero_grad()
    output = convolution(given)
    (output * weights).sum().backward()
    assert given.grad is not None
    return [output, given.grad, *(parameter.grad.clone() for parameter in convolution.parameters())]


@pytest.mark.parametrize("size", [(7, 7), (6, 7), (7, 6), (6, 6), (1, 13), (3, 3)])
def test_leaving_out_taps_on_padding_changes_nothing(size: tuple[int, int]) -> None:
    fast = DilatedConv2d(3, 5, dilation=6).double()
    plain = nn.Conv2d(3, 5, 3, padding=6, dilation=6, bias=False).double()
    plain.load_state_dict(fast.state_dict())
    features, weights = (torch.randn(2, channels, *size, dtype=torch.float64) for channels in (3, 5))
    for expected, actual in zip(*(values_and_gradients(c, features, weights) for c in (plain, fast)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_taps_on_padding_cost_nothing() -> None:
    convolution = DilatedConv2d(4, 8, dilation=6).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        convolution(torch.zeros(1, 4, 6, 6))
    assert counter.get_total_flops() == 2 * 4 * 8 * 6 * 6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel_size", "dilation", "size"), [(5, 2, (8, 12)), (3, 4, (8, 8)), (3, 2, (7, 8))])
def test_values_and_gradients_are_those_of_the_plain_convolution(
    kernel_size: int, dilation: int, size: tuple[int, int], bias: bool
) -> None:
    plain = depthwise(6, kernel_size, dilation, bias=bias)
    fast = DilatedDepthwiseConv2d(plain)
    features = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(2, 6, *size, dtype=torch.float64)
    results = [values_and_gradients(convolution, features, weights) for convolution in (plain, fast)]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output, *_ in results)


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
