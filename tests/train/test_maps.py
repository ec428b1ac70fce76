import math

import pytest
import torch

from cl4wsis.tasks import load_plan
from cl4wsis_train.models.maps import apply_image_prior, maps_on_grid, share_centers
from cl4wsis_train.models.network import InstanceSegmenter, SegmenterOutput


def test_probabilities_are_weighted_by_the_shares_of_the_image() -> None:
    logits = torch.randn(2, 4, 5, 6) * 3
    probs = logits.softmax(1)
    for image in range(2):
        mass = probs[image, 1:].sum((1, 2))
        prior = mass / mass.sum() + 0.001
        prior = prior / prior.max()
        expected = probs[image].clone()
        expected[1:] *= (prior**1.5)[:, None, None]
        expected /= expected.sum(0)
        found = apply_image_prior(logits, 1.5)[image].softmax(0)
        torch.testing.assert_close(found, expected)


def test_background_and_the_most_frequent_class_keep_their_ratio() -> None:
    logits = torch.randn(1, 5, 8, 8)
    logits[:, 3] += 3
    weighted = apply_image_prior(logits, 1.0)
    torch.testing.assert_close(weighted[:, [0, 3]], logits[:, [0, 3]])
    assert (weighted[:, [1, 2, 4]] < logits[:, [1, 2, 4]]).all()


def test_an_object_of_two_classes_falls_to_the_one_that_has_more_of_it() -> None:
    logits = torch.zeros(1, 3, 4, 10)
    logits[:, 0] = -9.0
    logits[0, 1, :, :6] = 0.5
    logits[0, 2, :, 6:] = 0.1
    assert logits.argmax(1).unique().tolist() == [1, 2]
    assert apply_image_prior(logits, 1.0).argmax(1).unique().tolist() == [1]


def test_an_image_that_is_nothing_but_background_keeps_its_logits() -> None:
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 0] = 500.0  # all other probabilities are 0 in float32
    torch.testing.assert_close(apply_image_prior(logits, 1.0), logits)


@pytest.mark.parametrize("image_prior", [0.0, 1.0])
def test_the_network_applies_it_outside_of_training_only(image_prior: float) -> None:
    fields = ["weights=none", "learned_upsampling=false", f"image_prior={image_prior}"]
    settings = load_plan("shapes", [f"recipe.network.{field}" for field in fields])
    network = InstanceSegmenter(settings.recipe.network, (2, 2)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = network.forward_semantic(network.encoder(images))
        expected = apply_image_prior(plain, 1.0) if image_prior else plain
        assert torch.equal(network(images).semantic_logits, expected)
        assert torch.equal(plain, expected) == (image_prior == 0)
        network.train()  # the encoder keeps its statistics, the branches do not
        network.semantic_branch.eval()
        assert torch.equal(network(images).semantic_logits, plain)


def test_centers_are_shared_like_the_pixels_class() -> None:
    logits = torch.tensor([4.0, 1.0, 3.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    heatmap = torch.zeros(1, 2, 8, 8)
    heatmap[0, 0, 3, 4], heatmap[0, 1, 3, 4] = 0.5, -0.25
    heatmap[0, :, 6, 1] = torch.tensor([0.5, 0.4])
    heatmap[0, :, 0, 0] = torch.tensor([0.3, 1.2])
    shared = share_centers(logits, heatmap)
    second = 1 / (1 + math.exp(-2))
    for (row, column), center in {(3, 4): 0.5, (6, 1): 1 - 0.5 * 0.6, (0, 0): 1.0}.items():
        assert shared[0, :, row, column].tolist() == pytest.approx([center * (1 - second), center * second], rel=1e-5)
    assert shared.count_nonzero() == 6


def test_objects_side_by_side_keep_their_own_centers() -> None:
    logits = torch.full((1, 3, 4, 8), -20.0)
    logits[0, 1, :, :4] = 20.0
    logits[0, 2, :, 4:] = 20.0
    heatmap = torch.zeros(1, 2, 16, 32)
    heatmap[0, 0, 8, 6] = heatmap[0, 1, 8, 26] = 1.0
    torch.testing.assert_close(share_centers(logits, heatmap), heatmap, rtol=0, atol=2e-6)


def test_the_network_shares_centers_outside_of_training_only() -> None:
    overrides = ["recipe.network.weights=none", "recipe.network.image_prior=0", "recipe.network.shared_centers=true"]
    network = InstanceSegmenter(load_plan("shapes", overrides).recipe.network, (2, 2)).eval()
    torch.nn.init.normal_(network.instance_branch.center_head.convolutions[0].weight)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = network.encoder(images)
        plain, _ = network.forward_instance(features)
        expected = share_centers(network.forward_semantic(features), plain)
        torch.testing.assert_close(network(images).center_heatmap, expected)
        network.train()
        network.instance_branch.eval()
        assert torch.equal(network(images).center_heatmap, plain)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
def test_an_enlarged_heatmap_is_constant_beyond_the_outermost_coarse_pixels(stride: int) -> None:
    coarse = [torch.rand(2, channels, 12, 16) for channels in (4, 3, 2)]
    size = (12 * stride, 16 * stride)
    fine = maps_on_grid(SegmenterOutput(*coarse), size, "exact").center_heatmap
    expected = torch.nn.functional.interpolate(coarse[1], size=size, mode="bilinear")
    torch.testing.assert_close(fine, expected, atol=1e-6, rtol=0)
    rim = (stride + 1) // 2
    for side in (fine, fine.transpose(2, 3)):
        for first, last in ((0, rim), (side.shape[2] - rim, side.shape[2])):
            assert (side[:, :, first:last] == side[:, :, first : first + 1]).all()
