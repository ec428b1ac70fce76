"""Losses against numbers derived by hand, slow loops over pixels, and the symmetries every loss must have."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from cl4wsis_train.losses.cam import flac_loss, random_dropout_loss
from cl4wsis_train.losses.distill import (
    encoder_distillation_loss,
    localizer_distillation_loss,
    selective_center_loss,
    selective_offset_loss,
)
from cl4wsis_train.losses.instance import center_loss, count_pixels, offset_loss
from cl4wsis_train.losses.semantic import classification_loss, self_training_loss, semantic_bce_loss

LN2, LN3 = math.log(2), math.log(3)
BATCH, CHANNELS, OLD, HEIGHT, WIDTH = 3, 5, 2, 4, 6  # background, two old and two new classes
NEW = CHANNELS - 1 - OLD

Inputs = dict[str, Tensor]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(logit: float, target: float) -> float:
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


# --- slow loops ---------------------------------------------------------------------------------------------------


def semantic_bce_loop(logits: Tensor, target: Tensor) -> float:
    total = sum(bce(logits[i].item(), target[i].item()) for i in indices(logits))
    return total / (BATCH * HEIGHT * WIDTH)


def classification_loop(pooled: Tensor, image_labels: Tensor) -> float:
    return sum(bce(pooled[i].item(), image_labels[i].item()) for i in indices(pooled)) / pooled.numel()


def self_training_loop(logits: Tensor, hard_target: Tensor, image_labels: Tensor) -> float:
    batch_total = 0.0
    for b in range(BATCH):
        counts = [int(hard_target[b, c].sum()) for c in range(CHANNELS)]
        needed = [0, *(c + 1 for c in range(CHANNELS - 1) if image_labels[b, c] > 0)]
        if any(counts[c] == 0 for c in needed):
            continue
        total = 0.0
        for y, x, c in product(range(HEIGHT), range(WIDTH), range(CHANNELS)):
            if hard_target[b, c, y, x]:
                normalizer = sum(math.exp(z) for z in logits[b, :, y, x].tolist())
                cross_entropy = -math.log(math.exp(logits[b, c, y, x].item()) / normalizer)
                total += (sum(counts) - counts[c]) / (1 + sum(counts)) * cross_entropy
        batch_total += total / (HEIGHT * WIDTH)
    return batch_total / BATCH


def flac_activations(inputs: Inputs, average: str) -> list[list[float]]:
    """Return the three activations of every pixel in the frame of the image; one quarter turn counter-clockwise."""

    def activation(channels: list[float]) -> float:
        if average == "logits":
            return sigmoid(sum(channels[OLD + 1 :]) / NEW)
        return sum(sigmoid(z) for z in channels[1:]) / (CHANNELS - 1)

    return [
        [
            activation(inputs["logits"][b, :, y, x].tolist()),
            activation(inputs["flipped"][b, :, y, WIDTH - 1 - x].tolist()),
            activation(inputs["rotated"][b, :, WIDTH - 1 - x, y].tolist()),
        ]
        for b, y, x in product(range(BATCH), range(HEIGHT), range(WIDTH))
    ]


def flac_loop(average: str) -> Callable[..., float]:
    def loop(**inputs: Tensor) -> float:
        pixels = flac_activations(inputs, average)
        return sum((a - max(branches)) ** 2 for branches in pixels for a in branches) / (3 * len(pixels))

    return loop


def random_dropout_loop(logits: Tensor, pixel_mask: Tensor, random_classes: Tensor) -> float:
    pixels = pixel_mask.nonzero().tolist()
    return sum(-math.log(sigmoid(logits[b, random_classes[b, y, x], y, x].item())) for b, y, x in pixels) / len(pixels)


def localizer_loop(cam_logits: Tensor, old_probs: Tensor) -> float:
    return sum(bce(cam_logits[i].item(), old_probs[i].item()) for i in indices(old_probs)) / old_probs.numel()


def encoder_loop(features: Tensor, old_features: Tensor) -> float:
    return sum((features[i].item() - old_features[i].item()) ** 2 for i in indices(features)) / features.numel()


def weighted_loop(power: int) -> Callable[[Tensor, Tensor, Tensor], float]:
    def loop(prediction: Tensor, target: Tensor, weight: Tensor) -> float:
        total = 0.0
        for b, c, y, x in indices(target):
            error = abs(prediction[b, c, y, x].item() - target[b, c, y, x].item())
            total += weight[b, 0, y, x].item() * error**power
        return total / sum(1 for w in weight.flatten().tolist() if w > 0)

    return loop


def indices(values: Tensor) -> product:
    return product(*(range(size) for size in values.shape))


# --- the losses in one table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A loss, a loop that computes the same, and inputs whose first entry is what the network gives."""

    loss: Callable[..., Tensor]
    loop: Callable[..., float]
    build: Callable[[torch.Generator], Inputs]
    swapped_channels: tuple[tuple[str, int, int], ...]
    """Channels of inputs that stand for two classes of equal rank."""


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def feature_map(generator: torch.Generator, channels: int = CHANNELS) -> Tensor:
    return normal(generator, BATCH, channels, HEIGHT, WIDTH)


def probability_map(generator: torch.Generator, channels: int = CHANNELS) -> Tensor:
    return uniform(generator, BATCH, channels, HEIGHT, WIDTH)


def weight_map(generator: torch.Generator) -> Tensor:
    weight = uniform(generator, BATCH, 1, HEIGHT, WIDTH)
    return weight * (weight > 0.4)


def self_training_inputs(generator: torch.Generator) -> Inputs:
    """Return maps in which the last image lacks a class its tags name, and a quarter of the pixels have no class."""
    image_labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.float64)
    classes = torch.where(uniform(generator, BATCH, HEIGHT, WIDTH) < 0.5, 0, OLD + 1)
    classes[0, 1:3] = OLD + 2
    hard_target = torch.nn.functional.one_hot(classes, CHANNELS).permute(0, 3, 1, 2).double()
    hard_target *= uniform(generator, BATCH, 1, HEIGHT, WIDTH) > 0.25
    return {"logits": feature_map(generator), "hard_target": hard_target, "image_labels": image_labels}


def flac_inputs(generator: torch.Generator) -> Inputs:
    rotated = normal(generator, BATCH, CHANNELS, WIDTH, HEIGHT)
    return {"logits": feature_map(generator), "flipped": feature_map(generator), "rotated": rotated}


def random_dropout_inputs(generator: torch.Generator) -> Inputs:
    return {
        "logits": feature_map(generator),
        "pixel_mask": uniform(generator, BATCH, HEIGHT, WIDTH) > 0.5,
        "random_classes": torch.randint(0, OLD + 1, (BATCH, HEIGHT, WIDTH), generator=generator),
    }


def keyword(loss: Callable[..., object], *names: str) -> Callable[..., object]:
    """Call a loss by position with inputs that go by other names."""
    return lambda **inputs: loss(*(inputs[name] for name in names))


MAPS = ("prediction", "target", "weight")
CASES = {
    "semantic_bce": Case(
        semantic_bce_loss,
        semantic_bce_loop,
        lambda g: {"logits": feature_map(g), "target": probability_map(g)},
        (("logits", 1, 4), ("target", 1, 4)),
    ),
    "classification": Case(
        classification_loss,
        classification_loop,
        lambda g: {"pooled": normal(g, BATCH, NEW), "image_labels": (uniform(g, BATCH, NEW) > 0.5).double()},
        (("pooled", 0, 1), ("image_labels", 0, 1)),
    ),
    "self_training": Case(
        self_training_loss,
        self_training_loop,
        self_training_inputs,
        (("logits", 3, 4), ("hard_target", 3, 4), ("image_labels", 2, 3)),
    ),
    "flac_logits": Case(
        lambda **inputs: flac_loss(**inputs, quarter_turns=1, num_old_classes=OLD),
        flac_loop("logits"),
        flac_inputs,
        (("logits", 3, 4), ("flipped", 3, 4), ("rotated", 3, 4)),
    ),
    "flac_probabilities": Case(
        lambda **inputs: flac_loss(**inputs, quarter_turns=1, num_old_classes=OLD, average="probabilities"),
        flac_loop("probabilities"),
        flac_inputs,
        (("logits", 1, 4), ("flipped", 1, 4), ("rotated", 1, 4)),
    ),
    "random_dropout": Case(random_dropout_loss, random_dropout_loop, random_dropout_inputs, (("logits", 3, 4),)),
    "localizer": Case(
        localizer_distillation_loss,
        localizer_loop,
        lambda g: {"cam_logits": feature_map(g), "old_probs": probability_map(g, OLD + 1)},
        (("cam_logits", 1, 2), ("old_probs", 1, 2)),
    ),
    "encoder": Case(
        encoder_distillation_loss,
        encoder_loop,
        lambda g: {"features": feature_map(g), "old_features": feature_map(g)},
        (("features", 0, 3), ("old_features", 0, 3)),
    ),
    "center": Case(
        keyword(center_loss, *MAPS),
        keyword(weighted_loop(2), *MAPS),
        lambda g: {"prediction": feature_map(g), "target": probability_map(g), "weight": weight_map(g)},
        (("prediction", 0, 1), ("target", 0, 1)),
    ),
    "offset": Case(
        keyword(offset_loss, *MAPS),
        keyword(weighted_loop(1), *MAPS),
        lambda g: {"prediction": 9 * feature_map(g, 2), "target": 9 * feature_map(g, 2), "weight": weight_map(g)},
        (("prediction", 0, 1), ("target", 0, 1)),
    ),
    "selective_center": Case(
        keyword(selective_center_loss, *MAPS),
        keyword(weighted_loop(2), *MAPS),
        lambda g: {
            "prediction": feature_map(g, CHANNELS - 1),
            "target": probability_map(g, OLD),
            "weight": (weight_map(g) > 0).double(),
        },
        (("prediction", 0, 1), ("target", 0, 1)),
    ),
    "selective_offset": Case(
        keyword(selective_offset_loss, *MAPS),
        keyword(weighted_loop(1), *MAPS),
        lambda g: {
            "prediction": 9 * feature_map(g, 2),
            "target": 9 * feature_map(g, 2),
            "weight": (weight_map(g) > 0).double(),
        },
        (("prediction", 0, 1), ("target", 0, 1)),
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def build(case: Case, seed: int = 0) -> Inputs:
    return case.build(torch.Generator().manual_seed(seed))


def network_maps(inputs: Inputs) -> list[str]:
    """Name the inputs that come from the network in training: the first, and both turned branches of FLAC."""
    return [name for i, name in enumerate(inputs) if i == 0 or name in ("flipped", "rotated")]


@by_case
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_loop_over_pixels(case: Case, seed: int) -> None:
    inputs = build(case, seed)
    loss = case.loss(**inputs)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(case.loop(**inputs), rel=1e-9)
    assert loss.item() > 0


@by_case
def test_follows_a_permutation_of_the_images(case: Case) -> None:
    inputs = build(case)
    permuted = {name: values[[2, 0, 1]] for name, values in inputs.items()}
    assert case.loss(**permuted).item() == pytest.approx(case.loss(**inputs).item(), rel=1e-9)


@by_case
@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)], ids=["up-down", "left-right", "both"])
def test_follows_a_flip_of_all_maps(case: Case, dims: tuple[int, ...]) -> None:
    inputs = build(case)

    def flip(name: str, values: Tensor) -> Tensor:
        if name == "rotated":  # rows of the turned map are columns of the image
            return values.flip([5 - dim for dim in dims])
        spatial = {4: dims, 3: tuple(dim - 1 for dim in dims)}.get(values.ndim, ())
        return values.flip(spatial)

    flipped = {name: flip(name, values) for name, values in inputs.items()}
    assert case.loss(**flipped).item() == pytest.approx(case.loss(**inputs).item(), rel=1e-9)


@by_case
def test_does_not_depend_on_the_order_of_equal_classes(case: Case) -> None:
    inputs = build(case)
    swapped = dict(inputs)
    for name, first, second in case.swapped_channels:
        order = list(range(inputs[name].shape[1]))
        order[first], order[second] = second, first
        swapped[name] = inputs[name][:, order]
    assert case.loss(**swapped).item() == pytest.approx(case.loss(**inputs).item(), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("flac")])
def test_gradient_is_that_of_the_formula(name: str) -> None:
    """Finite differences; FLAC's target is constant by definition, so its gradient is checked in closed form below."""
    case, inputs = CASES[name], build(CASES[name])
    learned = network_maps(inputs)[0]
    start = inputs[learned].requires_grad_()
    assert torch.autograd.gradcheck(lambda values: case.loss(**(inputs | {learned: values})), start, fast_mode=True)


def test_flac_gradient_treats_the_target_as_constant() -> None:
    inputs = build(CASES["flac_logits"])
    for values in inputs.values():
        values.requires_grad_()
    CASES["flac_logits"].loss(**inputs).backward()
    pixels = list(product(range(BATCH), range(HEIGHT), range(WIDTH)))
    detached = {name: values.detach() for name, values in inputs.items()}
    for (b, y, x), branches in zip(pixels, flac_activations(detached, "logits"), strict=True):
        at = {"logits": (y, x), "flipped": (y, WIDTH - 1 - x), "rotated": (WIDTH - 1 - x, y)}
        for (name, (row, column)), a in zip(at.items(), branches, strict=True):
            slope = 2 * (a - max(branches)) / (3 * len(pixels)) * a * (1 - a) / NEW
            expected = [0.0] * (OLD + 1) + [slope] * NEW
            assert inputs[name].grad[b, :, row, column].tolist() == pytest.approx(expected, abs=1e-12)


@by_case
def test_no_gradient_flows_into_targets(case: Case) -> None:
    inputs = build(case)
    learned = network_maps(inputs)
    for values in inputs.values():
        if values.is_floating_point():
            values.requires_grad_()
    case.loss(**inputs).backward()
    reached = [name for name, values in inputs.items() if values.grad is not None and values.grad.any()]
    assert set(reached) - {"image_labels"} == set(learned)


@by_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_half_precision_inputs_are_summed_in_full_precision(case: Case, dtype: torch.dtype) -> None:
    inputs = build(case)
    rounded = {name: values.to(dtype) if values.is_floating_point() else values for name, values in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(**rounded)
    exact = {name: values.double() if values.is_floating_point() else values for name, values in rounded.items()}
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case.loss(**exact).item(), rel=1e-5)


@by_case
def test_extreme_logits_stay_finite(case: Case) -> None:
    inputs = {name: v.float() if v.is_floating_point() else v for name, v in build(case).items()}
    learned = network_maps(inputs)
    for name in learned:
        inputs[name] = (inputs[name].sign() * 1e4).requires_grad_()
    loss = case.loss(**inputs)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(inputs[name].grad.isfinite().all() for name in learned)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_semantic_bce_sums_classes_and_averages_pixels() -> None:
    logits = torch.tensor([[[[0.0, LN3]], [[0.0, -LN3]]]])  # (1, 2, 1, 2)
    target = torch.tensor([[[[1.0, 1.0]], [[0.5, 0.0]]]])
    # First pixel ln 2 twice, second pixel -ln 0.75 twice.
    assert semantic_bce_loss(logits, target).item() == pytest.approx((2 * LN2 - 2 * math.log(0.75)) / 2)


def test_classification_averages_images_and_classes() -> None:
    # -ln 0.5 and -ln (1 - 0.75).
    loss = classification_loss(torch.tensor([[0.0, LN3]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx((LN2 + 2 * LN2) / 2)


def self_training_row() -> tuple[Tensor, Tensor]:
    """Return flat logits and a row of four pixels: background, background, class 0, nothing."""
    hard_target = torch.tensor([[[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 0]]]])
    return torch.zeros(1, 3, 1, 4), hard_target


def test_self_training_balances_classes_and_counts_ignored_pixels_in_the_mean() -> None:
    logits, hard_target = self_training_row()
    # N = (2, 1, 0), N_t = 3: background weighs 1/4, class 0 weighs 2/4; each pixel's cross-entropy is ln 3.
    loss = self_training_loss(logits, hard_target, torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx((2 * 0.25 + 0.5) * LN3 / 4)


@pytest.mark.parametrize("image_labels", [[1.0, 1.0], [0.0, 1.0]], ids=["one missing", "the only one missing"])
def test_self_training_skips_images_whose_target_lacks_a_tagged_class(image_labels: list[float]) -> None:
    logits, hard_target = self_training_row()
    good = self_training_loss(logits, hard_target, torch.tensor([[1.0, 0.0]]))
    assert self_training_loss(logits, hard_target, torch.tensor([image_labels])).item() == 0
    both = self_training_loss(logits.repeat(2, 1, 1, 1), hard_target.repeat(2, 1, 1, 1), torch.tensor([[1, 0], [1, 1]]))
    assert both.item() == pytest.approx(good.item() / 2)


def test_self_training_skips_images_without_background() -> None:
    logits, hard_target = self_training_row()
    hard_target[:, 0] = 0
    assert self_training_loss(logits, hard_target, torch.tensor([[1.0, 0.0]])).item() == 0


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("logits", 2 * 0.25**2 / 3),  # sigmoid((2 ln 3 + 0) / 2) = 0.75 against 0.5 twice
        ("probabilities", 2 * 0.2**2 / 3),  # (0.9 + 0.5) / 2 = 0.7 against 0.5 twice
    ],
)
def test_flac_pulls_every_branch_to_the_largest(average: str, expected: float) -> None:
    flat = torch.zeros(1, 3, 1, 1)
    strong = torch.tensor([-5.0, 2 * LN3, 0.0]).reshape(1, 3, 1, 1)
    for branches in ((strong, flat, flat), (flat, strong, flat), (flat, flat, strong)):
        loss = flac_loss(*branches, quarter_turns=2, num_old_classes=0, average=average)
        assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_flac_is_zero_when_the_maps_turn_with_the_features(quarter_turns: int) -> None:
    logits = build(CASES["flac_logits"])["logits"]
    rotated = torch.rot90(logits, quarter_turns, (2, 3))
    assert flac_loss(logits, logits.flip(3), rotated, quarter_turns, OLD).item() == 0
    shifted = rotated.roll(1, 3)
    assert flac_loss(logits, logits.flip(3), shifted, quarter_turns, OLD).item() > 0


def test_flac_on_logits_ignores_background_and_old_channels() -> None:
    inputs = build(CASES["flac_logits"])
    changed = {name: values.clone() for name, values in inputs.items()}
    changed["logits"][:, : OLD + 1] += 3
    assert CASES["flac_logits"].loss(**changed).item() == CASES["flac_logits"].loss(**inputs).item()


def test_random_dropout_reads_one_drawn_channel_per_chosen_pixel() -> None:
    logits = torch.tensor([[[[LN3, 7.0, 7.0]], [[7.0, -LN3, 7.0]]]])  # (1, 2, 1, 3)
    pixel_mask = torch.tensor([[[True, True, False]]])
    random_classes = torch.tensor([[[0, 1, -1]]])  # the last is no channel, and is not read
    expected = (-math.log(0.75) - math.log(0.25)) / 2
    assert random_dropout_loss(logits, pixel_mask, random_classes).item() == pytest.approx(expected)


def test_localizer_distillation_leaves_new_channels_alone() -> None:
    cam_logits = torch.tensor([0.0, LN3, 9.0]).reshape(1, 3, 1, 1).requires_grad_()
    loss = localizer_distillation_loss(cam_logits, torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1))
    loss.backward()
    assert loss.item() == pytest.approx((LN2 + 2 * LN2) / 2)
    assert cam_logits.grad.flatten().tolist() == pytest.approx([-0.25, 0.375, 0.0])


def test_encoder_distillation_is_the_mean_square() -> None:
    assert encoder_distillation_loss(torch.tensor([[[[1.0, 4.0]]]]), torch.tensor([[[[0.0, 2.0]]]])).item() == 2.5


def test_center_loss_divides_by_weighing_pixels_not_by_their_weight() -> None:
    heatmap = torch.tensor([[[[2.0, 1.0, 8.0]], [[0.0, 3.0, 8.0]]]])  # (1, 2, 1, 3)
    weight = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    # (4 + 0) * 1 + (1 + 9) * 0.5 over two pixels.
    assert center_loss(heatmap, torch.zeros_like(heatmap), weight).item() == pytest.approx(4.5)


def test_offset_loss_sums_both_coordinates() -> None:
    offsets = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1)
    weight = torch.full((1, 1, 1, 1), 0.5)
    assert offset_loss(offsets, torch.zeros_like(offsets), weight).item() == pytest.approx(1.5)


def test_selective_losses_compare_old_channels_on_old_pixels() -> None:
    heatmap = torch.tensor([[[[1.0, 5.0]], [[9.0, 9.0]]]])  # an old and a new class, two pixels
    old_mask = torch.tensor([[[[True, False]]]])
    assert selective_center_loss(heatmap, torch.zeros(1, 1, 1, 2), old_mask).item() == 1
    assert selective_offset_loss(heatmap, torch.zeros(1, 2, 1, 2), old_mask).item() == 10
    everywhere = torch.ones(1, 1, 1, 2)
    assert selective_center_loss(heatmap, torch.zeros(1, 1, 1, 2), everywhere).item() == 13


# --- nothing to learn from ------------------------------------------------------------------------------------------

NO_WEIGHT = {"weight": torch.zeros(BATCH, 1, HEIGHT, WIDTH)}
NOTHING = {
    "self_training": {"hard_target": torch.zeros(BATCH, CHANNELS, HEIGHT, WIDTH)},
    "random_dropout": {"pixel_mask": torch.zeros(BATCH, HEIGHT, WIDTH, dtype=torch.bool)},
    "center": NO_WEIGHT,
    "offset": NO_WEIGHT,
    "selective_center": NO_WEIGHT,
    "selective_offset": NO_WEIGHT,
}


@pytest.mark.parametrize(("name", "empty"), NOTHING.items(), ids=NOTHING.keys())
def test_nothing_supervised_is_zero_and_can_go_backward(name: str, empty: Inputs) -> None:
    inputs = build(CASES[name]) | empty
    learned = network_maps(inputs)[0]
    inputs[learned].requires_grad_()
    loss = CASES[name].loss(**inputs)
    loss.backward()
    assert loss.item() == 0
    assert inputs[learned].grad.count_nonzero() == 0


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [center_loss, offset_loss, selective_center_loss, selective_offset_loss])
def test_averaged_gradients_of_two_processes_equal_those_of_one(loss: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    prediction, target = (normal(generator, 2, 2, HEIGHT, WIDTH) for _ in range(2))
    weight = (uniform(generator, 2, 1, HEIGHT, WIDTH) > 0.5).double()
    weight[1] = 0
    weight[1, 0, 0, 0] = 1  # one pixel alone, so that local counts differ much
    prediction.requires_grad_()
    whole = torch.autograd.grad(loss(prediction, target, weight), prediction)[0]

    count = torch.stack([count_pixels(weight[rank : rank + 1]) for rank in range(2)]).mean()
    parts = [loss(prediction[r : r + 1], target[r : r + 1], weight[r : r + 1], count) for r in range(2)]
    averaged = torch.autograd.grad(torch.stack(parts).mean(), prediction)[0]
    assert torch.allclose(averaged, whole, rtol=1e-12)


def test_random_dropout_of_two_processes_equals_that_of_one() -> None:
    inputs = build(CASES["random_dropout"])
    inputs["pixel_mask"][1:] = False
    inputs["pixel_mask"][2, 0, 0] = True
    count = inputs["pixel_mask"].sum().double() / BATCH
    parts = [random_dropout_loss(*(values[r : r + 1] for values in inputs.values()), count) for r in range(BATCH)]
    assert torch.stack(parts).mean().item() == pytest.approx(random_dropout_loss(**inputs).item(), rel=1e-9)


def test_a_mean_count_below_one_is_used_as_it_is() -> None:
    heatmap, weight = torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1)
    assert center_loss(heatmap, torch.zeros_like(heatmap), weight, torch.tensor(0.25)).item() == 16
    classes = torch.zeros(1, 1, 1, dtype=torch.int64)
    loss = random_dropout_loss(torch.zeros(1, 2, 1, 1), classes == 0, classes, torch.tensor(0.5))
    assert loss.item() == pytest.approx(2 * LN2)


# --- wrong calls ------------------------------------------------------------------------------------------------------

MAP, ONE = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: semantic_bce_loss(MAP, ONE), r"target must have shape \(2, 3, 4, 5\).*found \(2, 1, 4, 5\)"),
        (lambda: classification_loss(MAP[:, :, 0, 0], MAP[:, :2, 0, 0]), r"image_labels must have shape \(2, 3\)"),
        (lambda: self_training_loss(MAP, ONE, MAP[:, :2, 0, 0]), "hard_target must have shape"),
        (lambda: self_training_loss(MAP, MAP, MAP[:, :, 0, 0]), r"image_labels must have shape \(2, 2\)"),
        (lambda: flac_loss(MAP, MAP, MAP, 1, 1), r"rotated \(turned back\) must have shape \(2, 3, 4, 5\)"),
        (lambda: flac_loss(MAP, ONE, MAP, 2, 1), "flipped must have shape"),
        (lambda: flac_loss(MAP, MAP, MAP, 2, 2), "3 channels, none beyond background and 2 old"),
        (lambda: flac_loss(MAP, MAP, MAP, 2, 1, "median"), "'logits' or 'probabilities', found 'median'"),
        (lambda: random_dropout_loss(MAP, ONE > 0, ONE[:, 0].long()), r"pixel_mask must have shape \(2, 4, 5\)"),
        (lambda: random_dropout_loss(MAP, ONE[:, 0] > 0, ONE.long()), r"random_classes must have shape \(2, 4, 5\)"),
        (lambda: localizer_distillation_loss(ONE, MAP), "old_probs has 3 channels, more than the 1"),
        (lambda: localizer_distillation_loss(MAP, ONE[:1]), r"old_probs must have shape \(2, 1, 4, 5\)"),
        (lambda: encoder_distillation_loss(MAP, ONE), "old_features must have shape"),
        (lambda: center_loss(MAP, ONE, ONE), "center target must have shape"),
        (lambda: offset_loss(MAP, MAP, MAP), r"loss_weight must have shape \(2, 1, 4, 5\)"),
        (lambda: selective_center_loss(ONE, MAP, ONE), "old_center_heatmap has 3 channels, more than the 1"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
