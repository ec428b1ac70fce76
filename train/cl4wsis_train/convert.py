"""From ImageNet checkpoints with in-place activated batch normalisation to encoder weights for plain normalisation.

The published encoders were trained with in-place activated batch normalisation followed by a leaky ReLU of slope 0.01.
It scales by ``|weight| + 1e-5`` where plain batch normalisation scales by ``weight``, so that the activation can be
inverted; means, variances and biases are used alike. Converted weights therefore answer as the original ones do, in
encoders with leaky ReLU: ``wider_resnet38_a2``, and timm's ResNets under their name with ``_leaky`` behind it.

Source: Rota Bulò, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs" (CVPR
2018), and the code of that paper.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl4wsis.errors import DataError
from cl4wsis.steps import file_sha256
from cl4wsis_train.checkpoint import save_tensors
from cl4wsis_train.models.encoder import ENCODER_KEY, LEAKY_SUFFIX, WIDER_RESNET, create_feature_network, match_tensors

IN_PLACE_EPSILON = 1e-5
"""What in-place activated batch normalisation adds to the magnitude of its weight."""

_RESNETS = {  # blocks of the four stages, and whether they are bottlenecks
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_BLOCK = re.compile(r"mod(\d+)\.block(\d+)\.(.+)")
_PARTS_OF_RESNET = {"proj_conv": "downsample.0", "proj_bn": "downsample.1"}
_CLASSIFIERS = ("fc.", "classifier.")


class ConvertedEncoder(NamedTuple):
    """What was read and written."""

    encoder: str
    """Name of the encoder that the weights are for, as in ``recipe.network.encoder``."""
    path: Path
    """The .safetensors file."""
    num_tensors: int
    num_parameters: int
    """Numbers in those tensors that training may change: statistics are not counted."""


def convert_encoder(source: Path, destination: Path) -> ConvertedEncoder:
    """Convert a checkpoint to a file for ``recipe.network.weights``.

    Args:
        source: .pth or .pth.tar file: a dict of tensors, or a dict that holds one under ``state_dict``. Nothing but
            tensors and plain values is unpickled.
        destination: .safetensors file to write; its metadata names the encoder.

    Raises:
        DataError: the file cannot be read, or does not hold one of the known encoders.
        RunError: the destination cannot be written.
    """
    if destination.suffix != ".safetensors":
        raise DataError(f"{destination}: the name of the converted weights must end in .safetensors")
    try:
        name, state = convert_state(_read_checkpoint(source))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    metadata = {ENCODER_KEY: name, "source_sha256": file_sha256(source)}
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(destination, state, metadata)
    learned = sum(tensor.numel() for key, tensor in state.items() if "running" not in key)
    return ConvertedEncoder(name, destination, len(state), learned)


def convert_state(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Rename the tensors of a checkpoint, and give its normalisations the weight that they scale by.

    Args:
        state: tensors by their names in the checkpoint, with or without ``module.`` in front.

    Returns:
        Name of the encoder and its tensors, without those of a classifier.

    Raises:
        DataError: the tensors are not those of a known encoder.
    """
    body = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    body = {key: tensor for key, tensor in body.items() if not key.startswith(_CLASSIFIERS)}
    name = _encoder_of(body)
    renamed = body if name == WIDER_RESNET else {_name_in_timm(key): tensor for key, tensor in body.items()}
    norms = {key.removesuffix(".running_mean") for key in renamed if key.endswith(".running_mean")}
    converted = {
        key: tensor.abs() + IN_PLACE_EPSILON if key.removesuffix(".weight") in norms else tensor
        for key, tensor in renamed.items()
    }
    with torch.device("meta"):  # names and shapes alone
        network = create_feature_network(name, output_stride=16)
    _, misfits = match_tensors(network, converted)
    if misfits:
        rest = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise DataError(f"looks like '{name}', but does not fit it: {'; '.join(misfits[:3])}{rest}")
    return name, converted


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"is not a checkpoint of tensors and plain values ({reason}); anything else may run code when read and is "
            "refused: save its 'state_dict' alone in a place you trust and convert that"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError("holds no tensors by name, neither at its top nor under 'state_dict'")
    return state


def _encoder_of(body: Mapping[str, Tensor]) -> str:
    """Name the encoder whose modules and blocks these are."""
    blocks = {(int(match[1]), int(match[2])) for key in body if (match := _BLOCK.match(key))}
    if any(module == 7 for module, _ in blocks):
        return WIDER_RESNET
    counts = tuple(sum(module == stage for module, _ in blocks) for stage in (2, 3, 4, 5))
    bottleneck = "mod2.block1.convs.conv3.weight" in body
    name = _RESNETS.get((counts, bottleneck))  # type: ignore[arg-type]
    if name is None:
        raise DataError(
            f"holds neither a ResNet nor a WiderResNet-38 A2 of the in-place ABN project: its stages have {counts} "
            f"blocks, its first tensors are {', '.join(list(body)[:3]) or 'none'}"
        )
    return name + LEAKY_SUFFIX


def _name_in_timm(key: str) -> str:
    """Translate the name of a ResNet's tensor: mod3.block2.convs.bn1.weight is layer2.1.bn1.weight."""
    match = _BLOCK.match(key)
    if match is None:
        return key.removeprefix("mod1.")
    stage, block, rest = int(match[1]) - 1, int(match[2]) - 1, match[3].removeprefix("convs.")
    part, _, tensor = rest.partition(".")
    return f"layer{stage}.{block}.{_PARTS_OF_RESNET.get(part, part)}.{tensor}"
