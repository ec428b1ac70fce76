"""Encoders of ours and conversion of checkpoints, against a plain reading of the same tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from cl4wsis.cli.main import app
from cl4wsis.errors import ConfigError, DataError
from cl4wsis.recipe import NetworkSettings
from cl4wsis_export.graph import export_module, serialize
from cl4wsis_train.convert import convert_encoder, convert_state
from cl4wsis_train.models.encoder import build_encoder, create_feature_network
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.models.wider_resnet import WiderResNet

THIN = ((4, 4), (6, 6), (8, 8), (8, 12), (6, 8, 16), (8, 12, 24))
"""Channels of a WiderResNet with the published wiring."""

State = Mapping[str, Tensor]


def thin_network(output_stride: int) -> WiderResNet:
    return WiderResNet(output_stride, num_blocks=(2, 1, 2, 1, 1, 1), channels=THIN)


def randomized(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return tensors for a network as training with in-place ABN may leave them: norms with weights of either sign."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue  # in-place ABN has none
        if tensor.ndim == 4:
            fan_in = tensor[0].numel()
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
        else:
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.5
    return state


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


# --- WiderResNet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output_stride", "last"), [(8, (8, 12)), (16, (4, 6))])
def test_wider_resnet_has_the_published_size(output_stride: int, last: tuple[int, int]) -> None:
    with torch.device("meta"):
        encoder = build_encoder("wider_resnet38_a2", output_stride, "none")
        features = encoder(torch.zeros(2, 3, 64, 96))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 105_070_912  # published as 105.1 M
    assert encoder.channels == [256, 512, 2048, 4096]
    assert encoder.strides == [4, 8, output_stride, output_stride]
    assert [feature.shape[1:] for feature in features] == [(256, 16, 24), (512, 8, 12), (2048, *last), (4096, *last)]
    assert (encoder.mean, encoder.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.mark.parametrize(
    ("output_stride", "dilations", "strides"),
    [(8, [1, 1, 1, 2, 4, 4], [1, 1, 2, 1, 1, 1]), (16, [1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 1, 1])],
)
def test_wider_resnet_trades_strides_for_dilations(
    output_stride: int, dilations: list[int], strides: list[int]
) -> None:
    modules = [thin_network(output_stride).get_submodule(f"mod{number}") for number in range(2, 8)]
    kernels = [[layer for layer in module.modules() if isinstance(layer, nn.Conv2d)] for module in modules]
    assert [{c.dilation[0] for c in convs if c.kernel_size == (3, 3)} for convs in kernels] == [{d} for d in dilations]
    assert [convs[0].stride[0] for convs in kernels] == strides
    assert all(c.stride == (1, 1) for convs in kernels for c in convs[1:] if c.kernel_size == (3, 3))


def test_wider_resnet_drops_channels_of_the_last_two_modules_in_training() -> None:
    layers = {name: layer.p for name, layer in thin_network(8).named_modules() if isinstance(layer, nn.Dropout2d)}
    assert layers == {"mod6.block1.convs.dropout": 0.3, "mod7.block1.convs.dropout": 0.5}


def test_wider_resnet_of_another_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 32"):
        WiderResNet(32)


# --- conversion ---------------------------------------------------------------------------------------------------


def in_place_norm(state: State, name: str, x: Tensor, activate: bool = True) -> Tensor:
    """Normalise as in-place ABN does: scale |weight| + 1e-5, then leaky ReLU of slope 0.01."""
    mean, variance, bias, weight = (
        state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "bias", "weight")
    )
    y = (x - mean) / (variance + 1e-5).sqrt() * (weight.abs() + 1e-5) + bias
    return torch.where(y > 0, y, 0.01 * y) if activate else y


def wider_resnet_plainly(state: State, x: Tensor) -> list[Tensor]:
    """Run the published WiderResNet at output stride 8 from the tensors of a checkpoint."""
    outputs = []
    x = F.conv2d(x, state["mod1.conv1.weight"], padding=1)
    for module, dilation in zip(range(2, 8), (1, 1, 1, 2, 4, 4), strict=True):
        if module <= 3:
            x = F.max_pool2d(x, 3, 2, 1)
        for block in range(1, 10):
            name = f"mod{module}.block{block}"
            if f"{name}.bn1.weight" not in state:
                break
            stride = 2 if module == 4 and block == 1 else 1
            y = in_place_norm(state, f"{name}.bn1", x)
            projection = state.get(f"{name}.proj_conv.weight")
            shortcut = x if projection is None else F.conv2d(y, projection, stride=stride)
            for layer in (1, 2, 3):
                if layer > 1:
                    y = in_place_norm(state, f"{name}.convs.bn{layer}", y)
                weight = state[f"{name}.convs.conv{layer}.weight"]
                spread = dilation if weight.shape[2] == 3 else 0
                y = F.conv2d(y, weight, stride=stride if layer == 1 else 1, padding=spread, dilation=max(spread, 1))
                if f"{name}.convs.conv{layer + 1}.weight" not in state:
                    break
            x = y + shortcut
        outputs.append(x)
    return [outputs[1], outputs[2], outputs[4], in_place_norm(state, "bn_out", x)]


def resnet_plainly(state: State, x: Tensor) -> list[Tensor]:
    """Run the published bottleneck ResNet at output stride 32 from the tensors of a checkpoint."""
    x = in_place_norm(state, "mod1.bn1", F.conv2d(x, state["mod1.conv1.weight"], stride=2, padding=3))
    x = F.max_pool2d(x, 3, 2, 1)
    outputs = []
    for module in range(2, 6):
        for block in range(1, 100):
            name = f"mod{module}.block{block}"
            if f"{name}.convs.conv1.weight" not in state:
                break
            stride = 2 if module > 2 and block == 1 else 1
            y = in_place_norm(state, f"{name}.convs.bn1", F.conv2d(x, state[f"{name}.convs.conv1.weight"]))
            y = F.conv2d(y, state[f"{name}.convs.conv2.weight"], stride=stride, padding=1)
            y = F.conv2d(in_place_norm(state, f"{name}.convs.bn2", y), state[f"{name}.convs.conv3.weight"])
            y = in_place_norm(state, f"{name}.convs.bn3", y, activate=False)
            if f"{name}.proj_conv.weight" in state:
                x = F.conv2d(x, state[f"{name}.proj_conv.weight"], stride=stride)
                x = in_place_norm(state, f"{name}.proj_bn", x, activate=False)
            x = F.leaky_relu(x + y, 0.01)
        outputs.append(x)
    return outputs


def resnet_checkpoint(network: nn.Module) -> dict[str, Tensor]:
    """Give a timm ResNet's tensors the names that they have in checkpoints of the in-place ABN project."""
    checkpoint = {}
    for key, tensor in randomized(network).items():
        stage, *rest = key.split(".")
        if not stage.startswith("layer"):
            checkpoint[f"mod1.{key}"] = tensor
            continue
        block, part, *tail = rest
        if part == "downsample":
            part, tail = ("proj_conv", "proj_bn")[int(tail[0])], tail[1:]
        else:
            part = f"convs.{part}"
        checkpoint[f"mod{int(stage[5:]) + 1}.block{int(block) + 1}.{'.'.join([part, *tail])}"] = tensor
    return checkpoint


def test_converted_wider_resnet_answers_as_in_place_abn_does(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = thin_network(8).eval()
    checkpoint = randomized(network)
    monkeypatch.setattr("cl4wsis_train.convert.create_feature_network", lambda *_, **__: network)
    name, converted = convert_state({f"module.{key}": tensor for key, tensor in checkpoint.items()})
    assert name == "wider_resnet38_a2"
    network.load_state_dict(converted, strict=False)
    assert any((checkpoint[key] < 0).any() for key in checkpoint if key.endswith("bn1.weight"))
    with torch.no_grad():
        for found, expected in zip(network(images), wider_resnet_plainly(checkpoint, images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_converted_resnet_answers_as_in_place_abn_does(images: Tensor) -> None:
    network = create_feature_network("resnet50_leaky", 16)
    checkpoint = resnet_checkpoint(network)
    name, converted = convert_state({**checkpoint, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)})
    assert name == "resnet50_leaky"
    network.load_state_dict(converted, strict=False)
    with torch.no_grad():
        found, expected = network.eval()(images)[:3], resnet_plainly(checkpoint, images)[:3]  # the last is dilated
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "tar"])
def test_checkpoint_becomes_initial_weights(tmp_path: Path, legacy: bool) -> None:
    network = create_feature_network("resnet18_leaky", 16)
    state = {f"module.{key}": tensor for key, tensor in resnet_checkpoint(network).items()}
    source, weights = tmp_path / "resnet18.pth.tar", tmp_path / "encoders" / "resnet18.safetensors"
    content = {"epoch": 90, "arch": "resnet18", "state_dict": state, "best_prec1": torch.tensor(70.0)}
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)

    finished = CliRunner().invoke(app, ["convert-encoder", str(source), str(weights), "--json"])
    assert finished.exit_code == 0, finished.output
    answer = json.loads(finished.stdout)
    assert (answer["encoder"], answer["num_parameters"]) == ("resnet18_leaky", 11_176_512)
    encoder = build_encoder("resnet18_leaky", 8, str(weights))
    found = encoder.state_dict()["features.layer2.0.downsample.1.weight"]
    torch.testing.assert_close(found, state["module.mod3.block1.proj_bn.weight"].abs() + 1e-5)
    with pytest.raises(ConfigError, match=r"holds weights of 'resnet18_leaky', not of 'resnet18'; set"):
        build_encoder("resnet18", 16, str(weights))


def test_command_shows_how_to_use_what_it_wrote(tmp_path: Path) -> None:
    source, weights = tmp_path / "a.pth", tmp_path / "a.safetensors"
    torch.save(resnet_checkpoint(create_feature_network("resnet18_leaky", 16)), source)
    finished = CliRunner().invoke(app, ["convert-encoder", str(source), str(weights)])
    assert finished.exit_code == 0, finished.output
    assert "--set recipe.network.encoder=resnet18_leaky" in finished.stdout
    assert "11.2 M" in finished.stdout


class Stranger:
    """Anything but a tensor or a plain value."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1)}, "model": Stranger()}, "not a checkpoint of tensors and plain values"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ([1, 2], "holds no tensors by name"),
        ({"conv1.weight": torch.zeros(1)}, r"holds neither a ResNet nor .* first tensors are conv1\.weight"),
        (
            {"mod7.block1.bn1.weight": torch.zeros(1)},
            r"looks like 'wider_resnet38_a2', .*mod1\.conv1\.weight is missing",
        ),
    ],
)
def test_foreign_checkpoints_are_refused(tmp_path: Path, content: object, message: str) -> None:
    source = tmp_path / "checkpoint.pth"
    torch.save(content, source)
    with pytest.raises(DataError, match=message):
        convert_encoder(source, tmp_path / "encoder.safetensors")
    assert not (tmp_path / "encoder.safetensors").exists()


def test_unreadable_checkpoints_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"broken\.pth: is not a checkpoint"):
        convert_encoder(tmp_path / "broken.pth", tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"absent\.pth: cannot be read \(No such file"):
        convert_encoder(tmp_path / "absent.pth", tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"must end in \.safetensors"):
        convert_encoder(tmp_path / "broken.pth", tmp_path / "a.bin")


# --- use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wider_resnet38_a2", "resnet101_leaky"])
def test_networks_without_hub_weights_say_where_to_get_some(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the hub has none for '{name}'; convert a checkpoint"), torch.device("meta"):
        build_encoder(name, 8, "hub")


def test_misspelt_names_of_our_own_are_understood() -> None:
    with pytest.raises(ConfigError, match="did you mean 'wider_resnet38_a2'"):
        build_encoder("wider_resnet38", 8, "none")


@pytest.mark.parametrize(("name", "millions"), [("resnet101", 42.5), ("resnet101_leaky", 42.5)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_resnet_101_has_the_published_size(name: str, millions: float, output_stride: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, output_stride, "none")
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert encoder.channels == [256, 512, 1024, 2048]
    assert encoder.strides == [4, 8, output_stride, output_stride]
    slopes = {layer.negative_slope for layer in encoder.modules() if isinstance(layer, nn.LeakyReLU)}
    relus = [layer for layer in encoder.modules() if isinstance(layer, nn.ReLU)]
    assert (slopes, bool(relus)) == (({0.01}, False) if name.endswith("_leaky") else (set(), True))


def test_published_branches_on_resnet_101_have_the_published_size() -> None:
    settings = NetworkSettings(encoder="resnet101", weights="none", output_stride=16)
    with torch.device("meta"):
        network = InstanceSegmenter(settings, (15, 5))
    sizes = [
        sum(parameter.numel() for parameter in branch.parameters()) / 1e6
        for branch in (network.semantic_branch, network.instance_branch)
    ]
    assert sizes == pytest.approx([15.5, 15.7], abs=0.05)


def test_wide_recipe_builds_a_segmenter() -> None:
    settings = NetworkSettings(encoder="wider_resnet38_a2", weights="none", output_stride=8)
    with torch.device("meta"):
        network = InstanceSegmenter(settings, (60, 20))
        features = network.encoder(torch.zeros(2, 3, 64, 64))
        assert network.forward_semantic(features).shape == (2, 81, 8, 8)
        decoded = network.instance_branch.decoder(network.instance_branch.pyramid(features[-1]), features)
    assert decoded.shape == (2, 128, 16, 16)
    assert [path.dilation[0] for path in network.semantic_branch.pyramid.paths] == [1, 12, 24, 32]


class _Features(nn.Module):
    """The feature network as the exporter wants it: a tuple of outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images))


@pytest.mark.slow
def test_wider_resnet_exports_with_operators_that_every_runtime_has(images: Tensor) -> None:
    network = _Features(WiderResNet(8, num_blocks=(1,) * 6, channels=THIN)).eval()
    network.network.load_state_dict(randomized(network.network), strict=False)
    names = ["features4", "features8", "features16", "last"]
    model = export_module(network, {"images": images}, names, opset=18)
    session = onnxruntime.InferenceSession(serialize(model), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for found, expected in zip(session.run(None, {"images": images.numpy()}), network(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)


def test_file_without_an_owner_may_serve_any_encoder(tmp_path: Path) -> None:
    network = create_feature_network("resnet18", 16)
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    encoder = build_encoder("resnet18_leaky", 16, str(tmp_path / "a.safetensors"))
    assert torch.equal(encoder.features.conv1.weight, load_file(tmp_path / "a.safetensors")["conv1.weight"])
