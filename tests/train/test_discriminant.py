"""The linear discriminant: statistics against slow loops, corrected maps, and what a run keeps of it."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_plan
from torch import Tensor

from cl4wsis.errors import RunError
from cl4wsis.recipe import Recipe
from cl4wsis_train.checkpoint import load_step
from cl4wsis_train.models.discriminant import NO_CLASS, LinearDiscriminant
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.trainer import train_step

FROZEN = ("recipe.network.discriminant=0.5", "recipe.semantic.train_encoder=false", "recipe.network.image_prior=0")


def scene(num_images: int = 6, num_classes: int = 3) -> tuple[Tensor, Tensor]:
    """Draw features (B, 4, 5, 6) around a mean of their class, and the class of each cell."""
    torch.manual_seed(1)
    labels = torch.randint(NO_CLASS, num_classes, (num_images, 5, 6))
    means = torch.randn(num_classes + 1, 4) * 2
    return means[labels + 1].permute(0, 3, 1, 2) + torch.randn(num_images, 4, 5, 6), labels


def test_statistics_are_those_of_a_slow_loop() -> None:
    features, labels = scene()
    labels[0][labels[0] == 2] = NO_CLASS  # an image without class 2
    discriminant = LinearDiscriminant(4, [3], 1.0, 1)
    discriminant.fit([(features[:4], labels[:4]), (features[4:], labels[4:])])

    means, covariance, num_images = [], torch.zeros(4, 4), [6, 6, 5]
    for label in range(3):
        shown = [image for image in range(6) if (labels[image] == label).any()]
        assert len(shown) == num_images[label]
        means.append(torch.stack([features[i][:, labels[i] == label].mean(1) for i in shown]).mean(0))
        for image in shown:
            cells = features[image][:, labels[image] == label] - means[label][:, None]
            covariance += cells @ cells.T / cells.shape[1] / sum(num_images)
    torch.testing.assert_close(discriminant.class_means, torch.stack(means))
    torch.testing.assert_close(discriminant.covariance, covariance)
    assert discriminant.num_images.tolist() == num_images

    shrunk = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(4)
    cell = features[2, :, 3, 3]
    distances = torch.stack([(cell - mean) @ shrunk.inverse() @ (cell - mean) for mean in means])
    scores = discriminant.weight[:, :, 0, 0] @ cell + discriminant.bias
    torch.testing.assert_close((scores[:, None] - scores), (distances - distances[:, None]) / 2, rtol=1e-3, atol=1e-3)


def test_classes_learned_in_two_steps_are_those_learned_at_once() -> None:
    features, labels = scene()
    at_once = LinearDiscriminant(4, [3], 1.0, 1)
    at_once.fit([(features, labels)])
    first, second = LinearDiscriminant(4, [2], 1.0, 1), LinearDiscriminant(4, [2, 1], 1.0, 1)
    first.fit([(features, labels.masked_fill(labels == 2, NO_CLASS))])
    second.load_previous(first.state_dict())
    second.fit([(features, labels)])  # old classes are there as well, and add nothing
    for name, expected in at_once.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], expected, msg=name)


def test_a_class_that_no_image_shows_is_neither_preferred_nor_held_back() -> None:
    features, labels = scene()
    discriminant = LinearDiscriminant(4, [3], 1.0, 1)
    discriminant.fit([(features, labels.masked_fill(labels == 1, NO_CLASS))])
    assert not discriminant.weight[1].any()
    assert not discriminant.bias[1]
    assert discriminant.weight[0].any()


def test_classes_of_object_pixels_are_corrected_by_what_the_window_shows() -> None:
    features, labels = scene(2)
    discriminant = LinearDiscriminant(4, [3], 0.7, 3)
    discriminant.fit([(features, labels)])
    logits = torch.randn(2, 4, 5, 6) * 2
    found = discriminant(features, logits).softmax(1)
    probs = logits.softmax(1)
    torch.testing.assert_close(found[:, 0], probs[:, 0])  # what is background is not its business

    scores = torch.einsum("kd,bdhw->bkhw", discriminant.weight[:, :, 0, 0], features)
    scores += discriminant.bias[:, None, None]
    objects = probs[:, 1:].sum(1, keepdim=True)
    for row, column in ((0, 0), (2, 3), (4, 5)):
        near = (slice(None), slice(None), slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2))
        mean = (scores[near] * objects[near]).sum((2, 3)) / objects[near].sum((2, 3))
        shares = probs[:, 1:, row, column] * (0.7 * mean).exp()
        expected = shares / shares.sum(1, keepdim=True) * objects[:, :, row, column]
        torch.testing.assert_close(found[:, 1:, row, column], expected)


def test_images_without_any_object_stay_finite() -> None:
    features, labels = scene(2)
    discriminant = LinearDiscriminant(4, [3], 0.5, 3)
    discriminant.fit([(features, labels)])
    logits = torch.zeros(2, 4, 5, 6)
    logits[:, 0] = 500.0
    assert discriminant(features, logits).isfinite().all()


def test_statistics_of_another_encoder_are_refused() -> None:
    with pytest.raises(RunError, match=r"statistics of shape \(2, 5\), expected \(2, 4\)"):
        LinearDiscriminant(4, [2, 1], 1.0, 1).load_previous(LinearDiscriminant(5, [2], 1.0, 1).state_dict())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"discriminant": 0.5}, "set semantic.train_encoder = false"),
        ({"discriminant_window": 4}, "must be odd, got 4"),
    ],
)
def test_recipes_that_cannot_work_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"network": fields})


# --- in a run ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps; step 0 as the plan that knows of no discriminant trains it."""
    path = tmp_path_factory.mktemp("run")
    train_step(tiny_plan("recipe.network.image_prior=0"), 0, path, evaluate=False)
    train_step(tiny_plan(*FROZEN), 1, path, evaluate=False)
    return path


def test_old_classes_keep_the_statistics_of_their_masks(run: Path) -> None:
    old, new = load_step(run / "step-0")[0].discriminant, load_step(run / "step-1")[0].discriminant
    assert old is not None
    assert new is not None
    assert (old.num_images > 0).all()
    assert torch.equal(new.num_images[:4], old.num_images)
    assert torch.equal(new.class_means[:4], old.class_means)
    assert not torch.equal(new.weight[:4], old.weight)


def test_it_corrects_later_steps_outside_of_training_only(run: Path) -> None:
    base, network = load_step(run / "step-0")[0], load_step(run / "step-1")[0]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for model in (base, network):
            features = model.encoder(images)
            plain, found = model.forward_semantic(features), model(images).semantic_logits
            assert torch.equal(plain, found) == (model is base)
        network.train()
        network.encoder.eval()
        network.semantic_branch.eval()
        assert torch.equal(network(images).semantic_logits, plain)


def test_a_step_whose_predecessor_has_no_statistics_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "step-0").symlink_to(run / "step-0")
    steps = 'steps=[["disc", "square", "triangle", "star"], ["ring"], ["cross"]]'
    train_step(tiny_plan(steps, "recipe.network.image_prior=0"), 1, tmp_path, evaluate=False)
    with pytest.raises(RunError, match="the previous step has no class statistics"):
        train_step(tiny_plan(steps, *FROZEN), 2, tmp_path, evaluate=False)


@pytest.mark.parametrize("method", ["fine-tune", "joint"])
def test_supervised_baselines_do_without_it(run: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "step-0").symlink_to(run / "step-0")
    folder = train_step(tiny_plan(*FROZEN, f"recipe.method={method}"), 1, tmp_path, evaluate=False)
    network, info = load_step(folder)
    assert network.discriminant is None
    assert info.network.discriminant == 0


def test_networks_of_step_0_are_alike_with_and_without() -> None:
    torch.manual_seed(0)
    plain = InstanceSegmenter(tiny_plan().recipe.network, (4,))
    torch.manual_seed(0)
    asked = InstanceSegmenter(tiny_plan(*FROZEN).recipe.network, (4,))
    assert all(torch.equal(tensor, asked.state_dict()[name]) for name, tensor in plain.state_dict().items())
