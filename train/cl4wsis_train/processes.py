"""What several training processes must share to give what one process with the whole batch gives.

Each process holds every n-th image of a batch, and gradients are averaged. Then counts must be averaged too, statistics
of normalisation must be those of the whole batch, and numbers that are drawn for images must not depend on who holds
them: the generator of the CPU runs alike in all processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def num_processes() -> int:
    """Return the number of training processes, 1 if there is no process group."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes, without gradient; with one process it is returned as it is."""
    if not _is_distributed():
        return values
    total = values.detach().clone()
    torch.distributed.all_reduce(total)
    return total / num_processes()


def draw_for_images(low: int, high: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw integers for the images of a batch, the same for an image whichever process holds it.

    Args:
        low: smallest value.
        high: first value that is too large.
        shape: (B, ...), B images in this process.
        device: of the result.

    Returns:
        ``shape`` int64.
    """
    drawn = torch.randint(low, high, (shape[0] * num_processes(), *shape[1:]))
    rank = torch.distributed.get_rank() if _is_distributed() else 0
    return drawn[rank :: num_processes()].to(device, non_blocking=True)


class SynchronizedNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics in training are those of all processes together.

    Shares parameters and running statistics with the layer whose place it takes, and keeps the activation that some
    layers of timm have inside; PyTorch's conversion would lose it. Processes must hold equally many values.

    Args:
        norm: layer to stand in for.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, D, h, w), normalised, and activated where the original layer does that."""
        output = self._normalize(input) if self.training else super().forward(input)
        activated: Tensor = self.act(self.drop(output))
        return activated

    def _normalize(self, x: Tensor) -> Tensor:
        values = x.float()
        mean = _Mean.apply(values.mean(dim=(0, 2, 3)))
        centered = values - mean[:, None, None]
        variance = _Mean.apply(centered.square().mean(dim=(0, 2, 3)))
        self._update_statistics(mean.detach(), variance.detach(), x.numel() // x.shape[1] * num_processes())
        output: Tensor = centered * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            output = output * self.weight[:, None, None] + self.bias[:, None, None]
        return output.to(x.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)


def synchronize_norms(module: nn.Module) -> None:
    """Let all batch normalisation inside a module take its statistics from all processes."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and not isinstance(child, SynchronizedNorm):
            setattr(module, name, SynchronizedNorm(child))
        else:
            synchronize_norms(child)


class _Mean(torch.autograd.Function):
    """Average over processes; gradients, which are averaged again with those of the parameters, go back likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return mean_over_processes(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return mean_over_processes(gradient)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
