import pytest
import torch
from torch import Tensor

from cl4wsis_train.models.localizer import Localizer, PeakGenerator, normalized_global_weighted_pooling


def pool_by_loops(logits: Tensor, focal: bool) -> Tensor:
    num_images, num_channels, height, width = logits.shape
    pooled = torch.zeros(num_images, num_channels, dtype=logits.dtype)
    for b in range(num_images):
        for c in range(num_channels):
            weighted, mass = 0.0, 0.0
            for y in range(height):
                for x in range(width):
                    exps = logits[b, :, y, x].exp()
                    prob = float(exps[c] / exps.sum())
                    weighted += prob * float(logits[b, c, y, x])
                    mass += prob
            mean = mass / (height * width)
            penalty = (1 - mean) ** 3 * float(torch.tensor(0.01 + mean, dtype=logits.dtype).log())
            pooled[b, c] = weighted / (1 + mass) + (penalty if focal else 0)
    return pooled


def identity_peak_generator(num_new_classes: int, threshold_ratio: float = 0.7) -> PeakGenerator:
    generator = PeakGenerator(num_new_classes, threshold_ratio)
    with torch.no_grad():
        generator.conv.weight.copy_(torch.eye(num_new_classes)[:, :, None, None])
    return generator


@pytest.mark.parametrize("focal", [True, False])
def test_pooling_equals_loops(focal: bool) -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    torch.testing.assert_close(normalized_global_weighted_pooling(logits, focal), pool_by_loops(logits, focal))


def test_pooling_of_one_pixel_by_hand() -> None:
    logits = torch.tensor([1.0986123, 0.0]).view(1, 2, 1, 1)  # ln 3 and 0: probabilities 3/4 and 1/4
    plain = normalized_global_weighted_pooling(logits, focal=False)
    torch.testing.assert_close(plain, torch.tensor([[0.4708338, 0.0]]), rtol=0, atol=1e-6)
    focal = normalized_global_weighted_pooling(logits)
    torch.testing.assert_close(focal, torch.tensor([[0.4665457, -0.5682967]]), rtol=0, atol=1e-6)


def test_focal_penalty_spares_a_class_that_fills_the_image() -> None:
    logits = torch.full((1, 2, 4, 4), -20.0)
    logits[:, 1] = 20.0
    penalty = normalized_global_weighted_pooling(logits) - normalized_global_weighted_pooling(logits, focal=False)
    torch.testing.assert_close(penalty, torch.tensor([[-4.6051702, 0.0]]), rtol=0, atol=1e-5)  # log(0.01) and nothing


@pytest.mark.parametrize("focal", [True, False])
def test_pooling_gradient(focal: bool) -> None:
    logits = torch.randn(2, 3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: normalized_global_weighted_pooling(z, focal), logits.requires_grad_(), fast_mode=False
    )


def test_pooling_of_half_precision_is_float32() -> None:
    logits = torch.full((1, 2, 64, 64), 4.0, dtype=torch.float16)
    pooled = normalized_global_weighted_pooling(logits)
    assert pooled.dtype == torch.float32
    assert pooled.isfinite().all()


def test_pooling_rejects_a_single_map() -> None:
    with pytest.raises(ValueError, match=r"\(B, C, h, w\), got shape \(3, 4, 5\)"):
        normalized_global_weighted_pooling(torch.zeros(3, 4, 5))


def test_localizer_gives_one_channel_per_class_and_background() -> None:
    localizer = Localizer(in_channels=6, channels=8, num_classes=3)
    features = torch.randn(2, 6, 5, 7, requires_grad=True)
    cam_logits = localizer(features)
    assert cam_logits.shape == (2, 4, 5, 7)
    cam_logits.sum().backward()
    assert features.grad is not None
    assert (features.grad != 0).any()


def test_localizer_last_layer_is_plain_convolution() -> None:
    localizer = Localizer(in_channels=6, channels=8, num_classes=3).eval()
    with torch.no_grad():
        localizer.layers.classifier.weight.zero_()
        localizer.layers.classifier.bias.copy_(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
    cam_logits = localizer(torch.randn(1, 6, 4, 4))
    assert cam_logits[0, :, 2, 1].tolist() == [-3.0, -1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("row", "ratio", "expected"),
    [
        ([1.0, 0.7, 0.69, -2.0], 0.7, [1.0, 0.7, 0.0, 0.0]),
        ([4.0, 2.0, 1.9, 4.0], 0.5, [4.0, 2.0, 0.0, 4.0]),
        ([-1.0, -2.0, -3.0, -4.0], 0.7, [0.0, 0.0, 0.0, 0.0]),
        ([1.0, 0.7, 0.01, -2.0], 0.0, [1.0, 0.7, 0.01, 0.0]),
    ],
)
def test_peak_generator_keeps_values_from_the_threshold_on(
    row: list[float], ratio: float, expected: list[float]
) -> None:
    peak_maps = identity_peak_generator(1, ratio)(torch.tensor(row).view(1, 1, 1, 4))
    assert peak_maps.flatten().tolist() == torch.tensor(expected).tolist()


def test_peak_threshold_is_per_image_and_class() -> None:
    new_logits = torch.tensor([[[[10.0, 1.0]], [[1.0, 0.5]]], [[[0.2, 0.1]], [[3.0, 2.9]]]])  # (2, 2, 1, 2)
    expected = torch.tensor([[[[10.0, 0.0]], [[1.0, 0.0]]], [[[0.2, 0.0]], [[3.0, 2.9]]]])
    torch.testing.assert_close(identity_peak_generator(2)(new_logits), expected)


def test_peak_generator_leaves_its_input_alone() -> None:
    logits = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    generator = PeakGenerator(3)
    generator.activation(generator(logits[:, 2:]), torch.ones(2, 3))
    assert torch.equal(logits, before)


def test_peak_generator_initial_weights() -> None:
    torch.manual_seed(3)
    conv = PeakGenerator(200).conv
    assert conv.bias is not None
    assert (conv.bias == 0).all()
    assert conv.weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.02)


def test_peak_generator_trains_what_lies_before_it() -> None:
    new_logits = torch.tensor([1.0, 0.8, 0.1, -1.0]).view(1, 1, 1, 4).requires_grad_()
    identity_peak_generator(1)(new_logits).sum().backward()
    assert new_logits.grad is not None
    assert new_logits.grad.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_peak_pooling_competes_among_new_classes_alone() -> None:
    peak_maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    pooled = PeakGenerator(3).pooled_logits(peak_maps)
    torch.testing.assert_close(pooled, normalized_global_weighted_pooling(peak_maps, focal=False))


def test_activation_is_scaled_to_one_for_tagged_classes_and_zero_for_others() -> None:
    peak_maps = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(5)) * 40
    activation = PeakGenerator(2).activation(peak_maps, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert activation.min() >= 0
    assert activation.max() <= 1
    peaks = activation.amax(dim=(2, 3))
    torch.testing.assert_close(peaks, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), rtol=0, atol=1e-5)


def test_activation_without_any_positive_value_is_zero() -> None:
    activation = PeakGenerator(1).activation(torch.full((1, 1, 3, 3), -1.0), torch.ones(1, 1))
    assert activation.eq(0).all()
