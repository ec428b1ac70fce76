"""Several processes train like one: on CPUs with gloo; GPUs differ in the collectives' transport alone."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from timm.layers.norm_act import BatchNormAct2d
from tiny import GENTLE, read_losses
from torch import nn

from cl4wsis_train.data.loading import SeededSampler
from cl4wsis_train.processes import SynchronizedNorm, draw_for_images, synchronize_norms


def train_in_processes(count: int, run: Path) -> dict[str, list[dict[str, float]]]:
    """Train steps 0 and 1 and return the losses of every iteration by phase."""
    command = [sys.executable, processes.__file__, str(count), str(run), "1", *GENTLE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr
    return read_losses(run / "step-0") | read_losses(run / "step-1")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_in_every_phase(tmp_path: Path) -> None:
    one, two = (train_in_processes(count, tmp_path / str(count)) for count in (1, 2))
    assert {phase: len(curve) for phase, curve in one.items()} == {"base": 4, "semantic": 4, "instance": 4}
    taught = set()
    for phase, curve in one.items():
        for expected, found in zip(curve, two[phase], strict=True):
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)
            taught |= {(phase, name) for name, value in expected.items() if value > 1e-4}
    assert taught >= {
        *(("base", name) for name in ("semantic", "center", "offset")),
        *(("semantic", name) for name in ("classification", "peak", "localizer_distillation", "flac")),
        *(("semantic", name) for name in ("encoder_distillation", "semantic", "random_dropout")),
        *(("instance", name) for name in ("center_old", "offset_old", "center_new", "offset_new")),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignment", "error"),
    [
        ('steps=[["disc"],["unicorn"]]', "DataError: .*unicorn"),  # found by the one that checks the data
        ("recipe.base.batch_size=3", "ConfigError: .*batch_size 3 cannot be shared evenly by 2 processes"),
    ],
)
def test_processes_refuse_together_what_cannot_work(tmp_path: Path, assignment: str, error: str) -> None:
    command = [sys.executable, processes.__file__, "2", str(tmp_path), "0", *GENTLE, assignment]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode != 0
    assert len(re.findall(error, finished.stderr)) == 2


@pytest.mark.slow
def test_statistics_gradients_and_draws_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    arguments = (2, str(tmp_path / "store"))
    torch.multiprocessing.spawn(processes.compare_with_one_process, arguments, nprocs=2)


def test_synchronized_norms_share_weights_and_keep_activations() -> None:
    norm = BatchNormAct2d(3, act_layer=nn.ReLU6)
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(norm, nn.BatchNorm2d(3, affine=False)))
    images = 10 * torch.randn(4, 3, 5, 5)
    expected = module(images)  # moves the running statistics
    module.zero_grad()
    synchronize_norms(module)
    first, second = module[1]
    assert isinstance(first, SynchronizedNorm)
    assert isinstance(second, SynchronizedNorm)
    assert first.weight is norm.weight
    assert first.running_mean is norm.running_mean
    torch.testing.assert_close(module(images), expected, rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == 2
    synchronize_norms(module)
    assert module[1][0] is first


def test_one_process_draws_what_the_generator_gives() -> None:
    torch.manual_seed(0)
    drawn = draw_for_images(1, 5, (2, 3), torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.randint(1, 5, (2, 3)))


@pytest.mark.parametrize("num_images", [4, 7, 11, 12])
def test_processes_go_through_the_batches_of_one(num_images: int) -> None:
    def batches(world_size: int) -> list[set[Any]]:
        samplers = [SeededSampler(num_images, 4, torch.Generator().manual_seed(0), 4) for _ in range(world_size)]
        draws = [
            list(DistributedSamplerWrapper(sampler, num_replicas=world_size, rank=rank))
            for rank, sampler in enumerate(samplers)
        ]
        size = 4 // world_size
        return [
            {draw for own in draws for draw in own[start : start + size]}
            for start in range(0, len(draws[0]) - size + 1, size)
        ]

    assert batches(2) == batches(1)
    assert len(batches(1)) == num_images // 4
