"""What the phases add to losses and pseudo labels: switches, and inputs made from the network's maps."""

import pytest
import torch
from tiny import tiny_phase, tiny_plan

from cl4wsis_train.data.batch import Batch
from cl4wsis_train.phases.instance import InstancePhase


def weak_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.tensor([[0.0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]))


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("recipe.semantic.flac=false", {"flac"}),
        ("recipe.semantic.peak_generator=false", {"peak"}),
        ("recipe.semantic.random_dropout=false", {"random_dropout"}),
        ("recipe.semantic.self_training=false", {"self_training"}),
        ("recipe.semantic.encoder_distillation=0", {"encoder_distillation"}),
        ("recipe.semantic.localizer_distillation=0", {"localizer_distillation"}),
        ("recipe.semantic.train_encoder=false", {"encoder_distillation"}),
    ],
)
def test_each_module_of_phase_1_can_be_switched_off(override: str, missing: set[str]) -> None:
    full, reduced = (set(tiny_phase(*chosen).train()(weak_batch(), 1)) for chosen in ([], [override]))
    assert full - reduced == missing
    assert reduced <= full


def test_warmup_leaves_out_what_needs_pseudo_labels() -> None:
    names = set(tiny_phase().train()(weak_batch(), 0))
    assert names == {"classification", "peak", "localizer_distillation", "encoder_distillation", "flac"}


def test_peak_input_is_the_logit_or_the_log_odds_of_the_softmax() -> None:
    logits = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(1))
    published = tiny_phase().peak_input(logits)
    assert torch.equal(published, logits[:, 5:])
    probs = logits.softmax(1)[:, 5:]
    log_odds = tiny_phase("recipe.semantic.peak_input=log_odds").peak_input(logits)
    torch.testing.assert_close(log_odds, (probs / (1 - probs)).log(), atol=1e-4, rtol=1e-4)


def test_refined_target_reaches_the_semantic_branch_alone() -> None:
    phase = tiny_phase("recipe.semantic.refine_target=true").train()
    loss = phase(weak_batch(), 1)["semantic"]
    loss.backward()
    assert all(parameter.grad is None for parameter in phase.localizer.parameters())
    assert any(parameter.grad is not None for parameter in phase.network.semantic_branch.parameters())


@pytest.mark.parametrize("refined", ["true", "false"])
def test_tags_teach_the_semantic_branch_through_the_learned_upsampling_but_not_the_upsampling(refined: str) -> None:
    overrides = ("recipe.network.learned_upsampling=true", f"recipe.semantic.refine_target={refined}")
    phase = tiny_phase(*overrides).train()
    batch = weak_batch()
    before = {name: tensor.clone() for name, tensor in phase.network.upsampling.state_dict().items()}
    phase(batch, 1)["semantic"].backward()
    assert all(parameter.grad is not None for parameter in phase.network.semantic_branch.parameters())
    assert all(parameter.grad is None for parameter in phase.network.upsampling.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in phase.network.upsampling.state_dict().items())
    features, classes = phase.labelled_features(batch)
    assert classes.shape == features.shape[:1] + features.shape[2:]
    plan = tiny_plan(*overrides)
    assert all(loss.isfinite() for loss in InstancePhase(phase, plan.recipe).train()(batch, 0).values())


def test_one_upsampling_serves_both_networks_on_the_features_of_a_frozen_encoder() -> None:
    phase = tiny_phase("recipe.network.learned_upsampling=true", "recipe.semantic.train_encoder=false").train()
    features, old_features = phase._run_encoders(weak_batch())
    old_cells = phase.old_network.semantic_branch(old_features)
    found = phase._enlarged(features, old_features, old_cells)
    expected = phase._enlarged(list(features), old_features, old_cells)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not found[1].requires_grad


@pytest.mark.parametrize("selective", [True, False])
def test_old_maps_are_distilled_on_old_pixels_or_on_all(selective: bool) -> None:
    semantic_phase = tiny_phase(f"recipe.instance.selective_distillation={str(selective).lower()}")
    plan = tiny_plan(f"recipe.instance.selective_distillation={str(selective).lower()}")
    classifier = semantic_phase.network.semantic_branch.classifier
    for head in classifier:  # a network that sees background everywhere
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, -3.0)
    classifier[0].bias.data[0] = 3.0
    losses = InstancePhase(semantic_phase, plan.recipe).train()(weak_batch(), 0)
    assert (losses["center_old"].item() > 0) != selective


def test_phase_2_trains_nothing_but_the_instance_branch() -> None:
    phase = InstancePhase(tiny_phase(), tiny_plan().recipe).train()
    trained = {name for name, parameter in phase.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("network.instance_branch.") for name in trained)
    assert phase.network.instance_branch.training
    assert not phase.network.encoder.training


def test_new_classes_yield_the_share_of_their_pixels_that_the_recipe_states() -> None:
    phase = tiny_phase()
    logits = torch.zeros(2, 7, 1, 5)
    logits[0, 5, 0] = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5])  # the tagged new class of the first image
    logits[0, 6, 0, 1] = 9.0  # a new class that this image does not hold wins here
    logits[1, 6, 0] = torch.tensor([2.0, -1.0, -1.0, -1.0, -1.0])
    phase.network.forward_semantic = lambda features: logits  # type: ignore[method-assign]
    before = [head.bias.clone() for head in phase.network.semantic_branch.classifier]
    drop = phase.lower_new_classes([weak_batch()], 1 / 3)  # of the margins 0.5, 1, 2 and 3
    assert drop == pytest.approx(1.0)
    after = [head.bias for head in phase.network.semantic_branch.classifier]
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], after[:-1], strict=True))
    torch.testing.assert_close(after[-1], before[-1] - 1.0)


def test_new_classes_that_win_nowhere_are_left_alone() -> None:
    phase = tiny_phase()
    phase.network.forward_semantic = lambda features: torch.zeros(2, 7, 3, 3)  # type: ignore[method-assign]
    assert phase.lower_new_classes([weak_batch()], 0.5) == 0.0
