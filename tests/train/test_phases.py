"""What the phases add to losses and pseudo labels: switches, and inputs made from the network's maps."""

import pytest
import torch
from tiny import tiny_phase, tiny_plan

from cl4wsis_train.data.batch import Batch
from cl4wsis_train.phases.instance import InstancePhase
from cl4wsis_train.phases.semantic import SemanticPhase


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


def settled_phase(*settings: str) -> tuple[SemanticPhase, dict[str, torch.Tensor], torch.Tensor]:
    """Settle a phase whose new classes win somewhere; return its branch as it was, and where they won."""
    torch.manual_seed(0)
    phase = tiny_phase(*(f"recipe.semantic.{setting}" for setting in settings)).eval()
    branch = phase.network.semantic_branch
    branch.classifier[-1].weight.data.mul_(30)  # some pixels for, some against them
    branch.classifier[-1].bias.data.add_(2)
    before = {name: tensor.clone() for name, tensor in branch.state_dict().items()}
    own = margins(phase) > 0
    assert 0 < own.sum() < own.numel()
    phase.settle([weak_batch()])
    return phase, before, own


def margins(phase: SemanticPhase) -> torch.Tensor:
    batch = weak_batch()
    with torch.no_grad():
        logits = phase.network.forward_semantic(phase.network.encoder(phase.network.normalize(batch.images)))
    return phase._margin_of_new(logits, batch.image_labels)


def test_margin_is_that_of_tagged_new_classes_over_all_others() -> None:
    logits = torch.zeros(2, 7, 1, 5)
    logits[0, 5, 0] = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.5])  # the tagged new class of the first image
    logits[0, 6, 0, 1] = 9.0  # a new class that this image does not hold wins here
    logits[1, 6, 0] = torch.tensor([2.0, -1.0, -1.0, -1.0, -1.0])
    found = tiny_phase()._margin_of_new(logits, weak_batch().image_labels)
    assert found.tolist() == [[[1.0, -7.0, 3.0, -1.0, 0.5]], [[2.0, -1.0, -1.0, -1.0, -1.0]]]


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_new_classes_yield_the_share_of_their_pixels_that_the_recipe_states(kept: float) -> None:
    phase, _, own = settled_phase("yielded_share=0.25", f"kept_share={kept}")
    lost = (margins(phase)[own] < 0).float().mean().item()
    assert lost == pytest.approx(0.25, abs=1.5 / own.sum().item())


def test_the_branch_becomes_the_mean_of_old_and_new_weights() -> None:
    phase, before, _ = settled_phase("kept_share=0.3", "yielded_share=0")
    old = phase.old_network.semantic_branch.state_dict()
    for name, tensor in phase.network.semantic_branch.state_dict().items():
        expected = before[name]
        if name in old and tensor.is_floating_point():
            expected = 0.7 * before[name] + 0.3 * old[name]
        torch.testing.assert_close(tensor, expected)
    assert set(before) > set(old)


def test_new_classes_that_win_nowhere_are_left_alone() -> None:
    phase = tiny_phase("recipe.semantic.yielded_share=0.5")
    phase.network.semantic_branch.classifier[-1].bias.data.fill_(-50.0)
    assert phase.settle([weak_batch()]) == 0.0
