"""What every loss does with its inputs before the formula: enough precision, and shapes that fit."""

import torch
from torch import Tensor

_REDUCED_PRECISIONS = (torch.float16, torch.bfloat16)


def full_precision(values: Tensor) -> Tensor:
    """Return half and bfloat16 values as float32, and anything else as it is.

    Losses sum over millions of pixels, and offsets beyond 256 px have steps of 0.25 px in half precision.
    """
    return values.float() if values.dtype in _REDUCED_PRECISIONS else values


def check_shape(name: str, values: Tensor, expected: tuple[int, ...]) -> None:
    """Compare a shape with the one the other inputs ask for; broadcasting a loss by accident is never wanted.

    Raises:
        ValueError: the shapes differ; the message gives both.
    """
    if tuple(values.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} to match the other inputs, found {tuple(values.shape)}")
