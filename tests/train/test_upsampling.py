"""Learned upsampling: bilinear before anything is learned, and against a slow loop with any weights."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_plan

from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.models.upsampling import LearnedUpsampling, mix_neighbours

SMALL = tiny_plan("recipe.network.learned_upsampling=true", "recipe.network.image_prior=0").recipe.network


@pytest.mark.parametrize("scale", [2, 4])
def test_it_begins_close_to_bilinear_interpolation(scale: int) -> None:
    upsampling = LearnedUpsampling([4, 4, 4, 4], 8, scale).eval()
    features = [torch.randn(1, 4, 3 * scale // k, 5 * scale // k) for k in (1, 2)] + [torch.randn(1, 4, 3, 5)] * 2
    maps = torch.rand(1, 2, 3, 5)
    expected = F.interpolate(maps, scale_factor=scale, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampling(maps, features), expected, atol=0.06, rtol=0)


def test_every_pixel_mixes_the_cells_around_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 4, 5, generator=generator)
    scores = torch.randn(2, 9, 8, 10, generator=generator)
    prior = torch.randn(2, 2, 9, generator=generator)
    found = mix_neighbours(maps, scores, prior)
    assert found.shape == (2, 3, 8, 10)
    for image, y, x in ((0, 0, 0), (0, 3, 4), (1, 7, 9), (1, 2, 5)):
        weights = (scores[image, :, y, x] + prior[y % 2, x % 2]).softmax(0)
        expected = torch.zeros(3)
        for number in range(9):
            row, column = y // 2 + number // 3 - 1, x // 2 + number % 3 - 1
            expected += weights[number] * maps[image, :, min(max(row, 0), 3), min(max(column, 0), 4)]
        torch.testing.assert_close(found[image, :, y, x], expected)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_class_maps_of_the_network_are_at_stride_4(output_stride: int) -> None:
    network = InstanceSegmenter(SMALL.model_copy(update={"output_stride": output_stride}), [3, 2])
    output = network(network.normalize(torch.randint(0, 256, (2, 3, 64, 96))))
    assert output.semantic_logits.shape == (2, 6, 16, 24)
    output.semantic_logits.square().sum().backward()
    head = network.upsampling.weight_head
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0


def test_the_wide_network_of_stride_8_has_it_too() -> None:
    settings = SMALL.model_copy(update={"encoder": "wider_resnet38_a2", "output_stride": 8})
    network = InstanceSegmenter(settings, [3]).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 64)).semantic_logits.shape == (1, 4, 16, 16)


def test_corrections_of_classes_come_before_it() -> None:
    """They rest on cells of the encoder's features, and on the image as a whole."""
    torch.manual_seed(0)
    network = InstanceSegmenter(SMALL.model_copy(update={"image_prior": 1.0}), [3]).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        features = network.encoder(images)
        corrected = network._correct_classes(features, network.semantic_branch(features))
        expected = network.upsampling(corrected, features)
        assert torch.equal(network(images).semantic_logits, expected)
        assert not torch.equal(expected, network.forward_semantic(features))


def test_later_steps_inherit_it() -> None:
    torch.manual_seed(0)
    old, network = InstanceSegmenter(SMALL, [3]), InstanceSegmenter(SMALL, [3, 2])
    network.load_previous(old.state_dict())
    for name, tensor in old.upsampling.state_dict().items():
        assert torch.equal(network.upsampling.state_dict()[name], tensor)
