import numpy as np
import pytest
import torch

from cl4wsis_train.models.affinity import PixelAdaptiveRefinement


def refine_slowly(image, probs, dilations, num_iterations):
    """One image (3, h, w) and its maps (C, h, w), pixel by pixel, from the formula."""
    height, width = image.shape[1:]

    def clamp(y, x):
        return min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    neighbours = [step for step in steps if step != (0, 0)]
    kernel = np.zeros((len(neighbours), height, width))
    for y in range(height):
        for x in range(width):
            samples = np.array([image[:, *clamp(y + dy, x + dx)] for dy, dx in steps])  # (9 * dilations, 3)
            deviation = samples.std(axis=0, ddof=1)
            for index, (dy, dx) in enumerate(neighbours):
                difference = np.abs(image[:, y, x] - image[:, *clamp(y + dy, x + dx)])
                kernel[index, y, x] = -(difference / (1e-8 + 0.1 * deviation)).mean()
    kernel = np.exp(kernel - kernel.max(0))
    kernel /= kernel.sum(0)
    for _ in range(num_iterations):
        refined = np.zeros_like(probs)
        for y in range(height):
            for x in range(width):
                for index, (dy, dx) in enumerate(neighbours):
                    refined[:, y, x] += kernel[index, y, x] * probs[:, *clamp(y + dy, x + dx)]
        probs = refined
    return probs


@pytest.mark.parametrize(("dilations", "num_iterations"), [((1, 2, 4, 8, 12), 2), ((1, 3), 3)])
def test_matches_the_formula(dilations, num_iterations):
    rng = np.random.default_rng(0)
    images, probs = rng.random((2, 3, 10, 9)), rng.random((2, 4, 10, 9))
    refine = PixelAdaptiveRefinement(dilations, num_iterations)
    result = refine(torch.from_numpy(images), torch.from_numpy(probs))
    assert result.dtype == torch.float32
    for index in range(2):
        expected = refine_slowly(images[index], probs[index], dilations, num_iterations)
        np.testing.assert_allclose(result[index].numpy(), expected, atol=2e-6)


def test_kernel_sums_to_one():
    kernel = PixelAdaptiveRefinement().affinity(torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0)))
    assert kernel.shape == (2, 40, 16, 20)
    torch.testing.assert_close(kernel.sum(1), torch.ones(2, 16, 20))


def test_uniform_image_averages_all_neighbours():
    kernel = PixelAdaptiveRefinement().affinity(torch.full((1, 3, 8, 8), 0.5))
    torch.testing.assert_close(kernel, torch.full_like(kernel, 1 / 40))


def test_labels_stop_at_a_color_edge():
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    probs = torch.zeros(1, 1, 32, 32)
    probs[..., :13] = 1  # three columns short of the edge
    refined = PixelAdaptiveRefinement()(images, probs)[0, 0]
    assert refined[:, 14].min() > 0.5
    assert refined[:, 17].max() < 0.1


def test_channels_do_not_mix():
    generator = torch.Generator().manual_seed(1)
    images, probs = torch.rand(1, 3, 12, 12, generator=generator), torch.rand(1, 5, 12, 12, generator=generator)
    refine = PixelAdaptiveRefinement()
    torch.testing.assert_close(refine(images, probs)[:, [0, 3]], refine(images, probs[:, [0, 3]]))


def test_large_images_are_resized_with_aligned_corners():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 41), torch.linspace(0, 1, 41), indexing="ij")
    image = torch.stack((rows, columns, rows * columns))[None]
    probs = torch.rand(1, 2, 11, 11, generator=torch.Generator().manual_seed(2))
    refine = PixelAdaptiveRefinement()
    torch.testing.assert_close(refine(image, probs), refine(image[..., ::4, ::4], probs), rtol=1e-4, atol=1e-5)


def test_gradient_reaches_the_probabilities():
    probs = torch.rand(1, 2, 6, 6, requires_grad=True)
    PixelAdaptiveRefinement(num_iterations=2)(torch.rand(1, 3, 6, 6), probs).sum().backward()
    assert probs.grad is not None
    assert float(probs.grad.sum()) == pytest.approx(probs.numel(), rel=1e-4)
