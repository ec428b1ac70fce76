"""What several CPU processes run, for tests that compare them with one.

As a script it trains the tiny plan, without dropout, whose masks depend on who holds an image:
``python tests/processes.py NUM_PROCESSES RUN_FOLDER LAST_STEP [ASSIGNMENT ...]``.
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed
from timm.layers.norm_act import BatchNormAct2d
from tiny import no_dropout, tiny_plan
from torch import nn

from cl4wsis_train.processes import draw_for_images, mean_over_processes, num_processes, synchronize_norms
from cl4wsis_train.trainer import build_fabric, train_step


def train(processes: int, run: Path, last_step: int, assignments: list[str]) -> None:
    """Train all steps up to one."""
    plan = tiny_plan(*assignments)
    fabric = build_fabric(plan, "cpu", processes)
    with no_dropout():
        for step in range(last_step + 1):
            train_step(plan, step, run, fabric=fabric, evaluate=False)


def compare_with_one_process(rank: int, world_size: int, store: str) -> None:
    """Check in each of several processes that what they share is what one process would have."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        _compare_norms(rank)
        _compare_draws(rank)
        mean = mean_over_processes(torch.tensor([float(rank), 1.0]))
        assert mean.tolist() == [(world_size - 1) / 2, 1.0]
    finally:
        torch.distributed.destroy_process_group()


def _compare_norms(rank: int) -> None:
    """Train a step on every n-th image, and a copy on all images without the others' help."""
    torch.manual_seed(0)
    images = 3 + 2 * torch.randn(4, 3, 5, 6)
    norms = BatchNormAct2d(4, act_layer=nn.ReLU6), nn.BatchNorm2d(2)
    whole = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Conv2d(4, 2, 1), norms[1])
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    shared = copy.deepcopy(whole)
    synchronize_norms(shared)
    assert list(shared.state_dict()) == list(whole.state_dict())
    model = nn.parallel.DistributedDataParallel(shared)

    expected, found = whole(images), model(images[rank :: num_processes()])
    torch.testing.assert_close(found, expected[rank :: num_processes()], rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected)
    (weight * expected).square().mean().backward()
    (weight[rank :: num_processes()] * found).square().mean().backward()
    for (name, mine), theirs in zip(shared.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for (name, mine), theirs in zip(shared.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(shared.eval()(images), whole.eval()(images), rtol=1e-4, atol=1e-5)


def _compare_draws(rank: int) -> None:
    """Draw for half of the images each what one process draws for all of them."""
    torch.manual_seed(1)
    mine = draw_for_images(2, 9, (2, 3, 4), torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(mine, torch.randint(2, 9, (2 * num_processes(), 3, 4))[rank :: num_processes()])


if __name__ == "__main__":
    train(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
