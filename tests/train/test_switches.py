"""Where paper and published code differ, both are a field of the recipe: each does what it says, by hand."""

import math

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from torch import Tensor

from cl4wsis.geometry import FitTransform
from cl4wsis.recipe import EvaluationSettings, Recipe
from cl4wsis.tasks import Plan, load_plan
from cl4wsis_train.data.batch import Batch
from cl4wsis_train.evaluate import _enlarged_to_image, _group_in_image, predict_batch
from cl4wsis_train.losses.cam import flac_loss
from cl4wsis_train.models.localizer import PeakAttention, PeakGenerator
from cl4wsis_train.models.network import InstanceSegmenter, SegmenterOutput
from cl4wsis_train.optim import build_optimizer
from cl4wsis_train.phases.base import BasePhase
from cl4wsis_train.phases.instance import FrozenMaps, InstancePhase
from cl4wsis_train.phases.semantic import SemanticPhase
from cl4wsis_train.pseudo.instance import SemanticMap

SMALL = "recipe.network.encoder=test_efficientnet"
TAGS = torch.tensor([[0.0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]])


def tiny_plan(*overrides: str) -> Plan:
    return tiny.tiny_plan(SMALL, *overrides)


def tiny_phase(*overrides: str) -> SemanticPhase:
    return tiny.tiny_phase(SMALL, *overrides)


def batch(image_labels: Tensor = TAGS) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(image_labels), 3, 64, 64), generator=generator, dtype=torch.uint8)
    return Batch(images, image_labels)


def with_constant_cams(phase: SemanticPhase, logits: list[float]) -> SemanticPhase:
    """Make the localizer say the same everywhere."""
    classifier = phase.localizer.layers.classifier
    torch.nn.init.zeros_(classifier.weight)
    classifier.bias.data[:] = torch.tensor(logits)
    return phase


# --- step 0: rate of the heads, width of centers ---


def test_published_code_trains_heads_like_the_encoder_and_the_paper_ten_times_faster() -> None:
    code, paper = (
        load_plan("sbd/15-5", overrides).recipe.base.optimizer
        for overrides in ([], ["recipe.base.optimizer.head_lr=5e-4"])
    )
    rates = []
    for settings in (code, paper):
        encoder, head = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        rates.append([group["lr"] for group in build_optimizer(settings, [encoder], [head]).param_groups])
    assert rates == [[5e-5, 5e-5], [5e-5, 5e-4]]


@pytest.mark.parametrize(("sigma", "scale"), [(8.0, 1.0), (6.0, 1.0), (8.0, 0.5)])
def test_centers_of_step_0_have_the_width_of_the_recipe(sigma: float, scale: float) -> None:
    recipe = tiny_plan(f"recipe.base.instance_loss.center_sigma={sigma}", f"recipe.reference_size={64 / scale:.0f}")
    assert BasePhase(InstanceSegmenter(recipe.recipe.network, (4,)), recipe.recipe).center_sigma == sigma * scale
    assert (Recipe().base.instance_loss.center_sigma, Recipe().instance.instance_loss.center_sigma) == (8.0, 6.0)


@pytest.mark.parametrize("sigma", [6.0, 8.0])
def test_centers_of_phase_2_have_a_width_of_their_own(sigma: float) -> None:
    overrides = [f"recipe.instance.instance_loss.center_sigma={sigma}", "recipe.reference_size=64"]
    overrides += ["recipe.instance.refine.enabled=false", "recipe.instance.peaks.accept_peakless=true"]
    phase = InstancePhase(tiny_phase(*overrides), tiny_plan(*overrides).recipe)
    semantic_map = torch.zeros(1, 64, 64, dtype=torch.int64)
    semantic_map[0, 20:31, 20:31] = 5  # the first new class; its centroid is (25, 25)
    nothing = torch.zeros(1, 2, 64, 64)
    frozen = FrozenMaps([], SemanticMap(semantic_map, nothing[:, 0]), torch.zeros(1, 2, 4, 4), nothing, nothing)
    target = phase.make_targets(batch(TAGS[:1]), frozen, torch.zeros(1, 6, 64, 64), nothing).center_target
    assert target[0, 0, 25, 25] == 1
    assert target[0, 0, 28, 29].item() == pytest.approx(math.exp(-(3**2 + 4**2) / (2 * sigma**2)))


# --- phase 1: FLAC, random dropout, clipped logits, tags of old classes ---


def test_flac_averages_what_the_recipe_says() -> None:
    losses = {}
    for average in ("logits", "probabilities"):
        phase = tiny_phase(f"recipe.semantic.flac_average={average}").train()
        torch.manual_seed(3)
        losses[average] = phase(batch(), 0)["flac"].item()
        torch.manual_seed(3)
        features, _ = phase._run_encoders(batch())
        turns = int(torch.randint(1, 4, ()))
        maps = phase._cam_logits(features[-1], turns)
        assert maps[1] is not None
        assert maps[2] is not None
        assert losses[average] == pytest.approx(flac_loss(maps[0], maps[1], maps[2], turns, 4, average).item())  # type: ignore[arg-type]
    assert losses["logits"] != pytest.approx(losses["probabilities"])


@pytest.mark.parametrize("with_background", [True, False])
def test_random_dropout_draws_from_old_classes_with_or_without_background(with_background: bool) -> None:
    phase = tiny_phase(f"recipe.semantic.random_dropout_background={str(with_background).lower()}").train()
    with_constant_cams(phase, [-6.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0])
    loss = phase(batch(), 1)["random_dropout"].item()
    old, background = math.log1p(math.exp(-2.0)), math.log1p(math.exp(6.0))  # -log sigmoid
    pixels = 2 * 4 * 4
    shares = [(loss - old) / (background - old) * pixels]
    assert shares[0] == pytest.approx(round(shares[0]), abs=1e-3)  # a whole number of pixels drew background
    assert (round(shares[0]) > 0) == with_background


@pytest.mark.parametrize("clip", [True, False])
def test_tags_see_new_logits_clipped_at_zero_where_the_recipe_says_so(clip: bool) -> None:
    phase = tiny_phase(f"recipe.semantic.clip_new_logits={str(clip).lower()}").train()
    logits = [0.5, -1.0, -1.0, -1.0, -1.0, -2.0, 1.0]
    loss = with_constant_cams(phase, logits)(batch(), 0)["classification"].item()

    seen = [*logits[:5], 0.0 if clip else -2.0, 1.0]
    total = sum(math.exp(value) for value in seen)
    pooled = []
    for value in seen[5:]:
        m, pixels = math.exp(value) / total, 16
        pooled.append(value * pixels * m / (1 + pixels * m) + (1 - m) ** 3 * math.log(0.01 + m))
    positive = sum(math.log1p(math.exp(-y)) for y in pooled)  # each class is tagged in one of two images ...
    negative = sum(math.log1p(math.exp(y)) for y in pooled)  # ... and absent in the other
    assert loss == pytest.approx((positive + negative) / 4, rel=1e-4)


@pytest.mark.parametrize(("clean", "tagged_old"), [(False, 1.0), (True, 1.0), (True, 0.0)])
def test_tags_of_old_classes_clean_the_segmenters_target_where_the_recipe_says_so(
    clean: bool, tagged_old: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = tiny_phase(f"recipe.semantic.clean_old_targets={str(clean).lower()}", "all_seen_labels=true").eval()
    tags = torch.tensor([[tagged_old, 0, 0, 0, 1, 0]])
    old_logits, cam_logits = torch.zeros(1, 5, 4, 4), torch.zeros(1, 7, 4, 4)
    seen = {}

    def spy(logits: Tensor, target: Tensor) -> Tensor:
        seen["target"] = target
        return logits.sum()

    monkeypatch.setattr("cl4wsis_train.phases.semantic.semantic_bce_loss", spy)
    phase._semantic_loss(batch(tags), cam_logits, torch.zeros(1, 7, 4, 4), old_logits)
    first, second = seen["target"][0, 1:3, 0, 0].tolist()
    assert first == (0.5 if tagged_old or not clean else 0.0)
    assert second == (0.0 if clean else 0.5)
    assert seen["target"][0, 0, 0, 0] > 0  # background is always there


@pytest.mark.parametrize("all_seen", [False, True])
def test_tags_of_old_classes_reach_every_loss_of_the_localizer(all_seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first old class is in the image, the second is not; without tags of old classes nobody knows."""
    phase = tiny_phase(f"all_seen_labels={str(all_seen).lower()}", "recipe.semantic.random_dropout_background=false")
    tags = torch.tensor([[1.0, 0, 0, 0, 1, 0]])
    taught = []

    def classify(pooled: Tensor, labels: Tensor) -> Tensor:
        taught.append(labels[0].tolist())
        return pooled.sum()

    with monkeypatch.context() as patch:
        patch.setattr("cl4wsis_train.phases.semantic.classification_loss", classify)
        phase._tag_losses(torch.zeros(1, 7, 4, 4), tags)
    assert taught == [tags[0].tolist() if all_seen else [1, 0], [1, 0]]  # of the localizer, of the peak generator

    guides = []

    def spy(logits: Tensor, guide: Tensor) -> Tensor:
        guides.append(guide)
        return logits.sum()

    monkeypatch.setattr("cl4wsis_train.phases.semantic.localizer_distillation_loss", spy)
    phase.eval()(batch(tags), epoch=0)
    held = guides[0].amax((0, 2, 3)) > 0
    assert held.tolist() == [True, True, *([not all_seen] * 3)]

    dropped = []

    def drop(logits: Tensor, mask: Tensor, classes: Tensor, count: Tensor) -> Tensor:
        dropped.append(classes[mask])
        return logits.sum()

    monkeypatch.setattr("cl4wsis_train.phases.semantic.random_dropout_loss", drop)
    found = torch.zeros(1, 7, 16, 16)
    found[:, 5] = 9.0
    torch.manual_seed(0)
    phase._self_supervised_losses(batch(tags), found, found)
    assert set(dropped[0].tolist()) == ({1} if all_seen else {1, 2, 3, 4})


@pytest.mark.parametrize("clip", [False, True])
def test_self_training_sees_new_classes_as_the_published_code_does(clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = tiny_phase(f"recipe.semantic.clip_new_logits={str(clip).lower()}")
    seen = []

    def spy(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits)
        return logits.sum()

    monkeypatch.setattr("cl4wsis_train.phases.semantic.self_training_loss", spy)
    logits = torch.full((2, 7, 4, 4), -2.0)
    phase._self_supervised_losses(batch(), logits, logits)
    assert seen[0][:, :5].unique().tolist() == [-2.0]
    assert seen[0][:, 5:].unique().tolist() == [0.0 if clip else -2.0]


@pytest.mark.parametrize("proposals", ["refine", "replace", "ignore"])
def test_proposals_shape_the_semantic_target_as_the_recipe_says(
    proposals: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = tiny_phase(f"recipe.semantic.proposals={proposals}", "recipe.semantic.label_smoothing=0").eval()
    cam_logits = torch.zeros(1, 7, 4, 4)
    cam_logits[0, 5, 0, 0] = 5.0  # one cell of the left half, which is a proposal
    images = batch(TAGS[:1])
    ids = torch.zeros(1, 64, 64, dtype=torch.int32)
    ids[:, :, :32] = 1
    images = Batch(images.images, images.image_labels, proposals=ids)
    seen = {}

    def spy(logits: Tensor, target: Tensor) -> Tensor:
        seen["target"] = target[0, 5]
        return logits.sum()

    monkeypatch.setattr("cl4wsis_train.phases.semantic.semantic_bce_loss", spy)
    phase._semantic_loss(images, cam_logits, torch.zeros(1, 7, 4, 4), torch.zeros(1, 5, 4, 4))
    peak = math.exp(5) / (math.exp(5) + 6)
    left, right = seen["target"][:, :2], seen["target"][:, 2:]
    if proposals == "ignore":
        assert left.flatten().tolist() == pytest.approx([peak, *[1 / 7] * 7])
    else:
        assert left.flatten().tolist() == pytest.approx([(peak + 7 / 7) / 8] * 8)
    assert right.flatten().tolist() == pytest.approx([0.0 if proposals == "replace" else 1 / 7] * 8)


def test_without_tags_of_old_classes_there_is_nothing_to_clean() -> None:
    losses = [
        tiny_phase(f"recipe.semantic.clean_old_targets={value}")
        .eval()
        ._semantic_loss(batch(), torch.zeros(2, 7, 4, 4), torch.ones(2, 7, 4, 4), torch.zeros(2, 5, 4, 4))
        for value in ("true", "false")
    ]
    assert losses[0] == losses[1]


# --- peaks ---


def test_peak_attention_is_the_generator_without_its_convolution() -> None:
    logits = torch.tensor([[[[4.0, 3.0, 2.75], [-1.0, 0.0, 3.5]]]])
    assert PeakAttention()(logits).tolist() == [[[[4.0, 3.0, 0.0], [0.0, 0.0, 3.5]]]]  # 0.7 * 4 = 2.8
    generator = PeakGenerator(1)
    generator.conv.weight.data.fill_(2.0)
    assert torch.equal(generator(logits), 2 * PeakAttention()(logits))
    tags = torch.ones(1, 1)
    assert PeakAttention().activation(PeakAttention()(logits), tags).amax() == pytest.approx(4 / (4 + 1e-5))


@pytest.mark.parametrize(("module", "kind"), [("generator", PeakGenerator), ("attention", PeakAttention)])
def test_phases_use_the_peak_module_of_the_recipe(module: str, kind: type) -> None:
    override = f"recipe.semantic.peak_module={module}"
    phase = tiny_phase(override).train()
    assert type(phase.peak_generator) is kind
    loss = phase(batch(), 0)["peak"]
    loss.backward()
    assert phase.localizer.layers.classifier.weight.grad is not None
    assert type(InstancePhase(phase, tiny_plan(override).recipe).peak_generator) is kind


# --- first values of new classes ---


def grown(init: str) -> tuple[InstanceSegmenter, InstanceSegmenter]:
    torch.manual_seed(0)
    plain = ["recipe.network.image_prior=0", "recipe.network.shared_centers=false"]
    settings = tiny_plan(f"recipe.network.new_class_init={init}", *plain).recipe.network
    old, network = InstanceSegmenter(settings, (4,)).eval(), InstanceSegmenter(settings, (4, 2)).eval()
    network.load_previous(old.state_dict())
    return old, network


def test_new_classes_share_backgrounds_probability() -> None:
    old, network = grown("background")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before, after = old(images), network(images)
    old_probs, probs = before.semantic_logits.softmax(1), after.semantic_logits.softmax(1)
    torch.testing.assert_close(probs[:, 1:5], old_probs[:, 1:])
    for channel in (0, 5, 6):
        torch.testing.assert_close(probs[:, channel], old_probs[:, 0] / 3)
    assert not after.center_heatmap[:, 4:].any()
    torch.testing.assert_close(after.center_heatmap[:, :4], before.center_heatmap)


def test_new_classes_begin_as_the_mean_of_the_old_ones() -> None:
    _, network = grown("old_mean")
    with torch.no_grad():
        found = network(torch.randn(1, 3, 64, 64))
    for channel in (5, 6):
        torch.testing.assert_close(found.semantic_logits[:, channel], found.semantic_logits[:, 1:5].mean(1))
    for channel in (4, 5):
        torch.testing.assert_close(found.center_heatmap[:, channel], found.center_heatmap[:, :4].mean(1))


def test_published_first_values_are_random_and_leave_old_outputs_alone() -> None:
    old, network = grown("default")
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        before, after = old(images).semantic_logits, network(images).semantic_logits
    torch.testing.assert_close(after[:, :5], before)
    assert not torch.allclose(after[:, 5], after[:, 6])


# --- inference as published ---


def test_corners_are_aligned_where_the_recipe_says_so() -> None:
    maps = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    transform = FitTransform((1, 4), (1, 4), (1, 4))
    aligned, half_pixel = (_enlarged_to_image(maps, transform, flag)[0, 0, 0].tolist() for flag in (True, False))
    assert aligned == pytest.approx([0.0, 1.0, 2.0, 3.0])
    assert half_pixel == pytest.approx([0.0, 0.75, 2.25, 3.0])


def two_squares(image_size: int, offset: float) -> tuple[SegmenterOutput, FitTransform]:
    """Say one class everywhere, two centers at the sides, and the same offset (to the right) everywhere."""
    logits = torch.zeros(1, 2, 32, 32)
    logits[:, 1] = 5
    heatmap = torch.zeros(1, 1, 32, 32)
    heatmap[0, 0, 16, [2, 29]] = 1.0
    heatmap[0, 0, 16, [3, 30]] = heatmap[0, 0, 17, [2, 29]] = 0.2  # no two pixels share the maximum when enlarged
    offsets = torch.zeros(1, 2, 32, 32)
    offsets[0, 1] = offset
    return SegmenterOutput(logits, heatmap, offsets), FitTransform.fit((image_size, image_size), (32, 32))


@pytest.mark.parametrize(
    ("rescale", "expected"),
    [(True, 64 / 2 - 2 * 4), (False, 64 / 2 - 4)],  # pixels left of the middle less the offset in image pixels
)
def test_offsets_become_pixels_of_the_image_unless_the_published_error_is_asked_for(
    rescale: bool, expected: float
) -> None:
    recipe = Recipe.model_validate(
        {
            "evaluation": {"rescale_offsets": rescale},
            "grouping": {"profile": "paper", "nms_kernel_size": 9, "min_area": 1},
        }
    )
    output, transform = two_squares(64, 4.0)
    instances, class_map = _group_in_image(output, 0, transform, recipe)
    assert class_map.shape == instances.instance_ids.shape == (64, 64)
    left = instances.instance_ids[0, 0]
    assert int((instances.instance_ids[0] == left).sum()) == pytest.approx(expected, abs=1)


def test_published_profile_groups_in_pixels_of_the_image() -> None:
    plan = tiny_plan("recipe.grouping.profile=paper", "recipe.grouping.min_area=1")
    torch.manual_seed(0)
    network = InstanceSegmenter(plan.recipe.network, (4,))
    image = np.zeros((40, 90, 3), np.uint8)
    ((instances, class_map),) = predict_batch(network, [image], plan)
    assert instances.instance_ids.shape == class_map.shape == (40, 90)


def test_published_inference_belongs_to_its_profile() -> None:
    with pytest.raises(ValidationError, match=r"belong to grouping\.profile 'paper', found 'exact'"):
        Recipe(evaluation=EvaluationSettings(align_corners=True))
