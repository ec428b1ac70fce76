"""Several processes train like one: on CPUs with gloo; GPUs differ in the collectives' transport alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from cl4wsis_train.data.loading import SeededSampler
from cl4wsis_train.processes import SynchronizedNorm, draw_for_images, synchronize_norms

GENTLE = [
    # Small rates and well-posed statistics, so that the last bits of sums do not grow into different curves; yet every
    # loss but the localizer's self-training has something to teach.
    "recipe.network.weights=package",
    "recipe.network.encoder_statistics=stored",
    "recipe.network.semantic_channels=32",
    "recipe.network.localizer_channels=32",
    "recipe.crop_size=96",
    'recipe.base.optimizer={kind="sgd",encoder_lr=1e-4,head_lr=1e-2}',
    "recipe.base.instance_loss.center_weight=5",
    'recipe.semantic.optimizer={kind="sgd",encoder_lr=1e-5,head_lr=1e-3,warmup_epochs=1}',
    'recipe.instance.optimizer={kind="sgd",encoder_lr=0.0,head_lr=1e-3,warmup_epochs=0}',
    "recipe.instance.instance_loss.center_weight=5",
    "recipe.instance.peaks.smoothing=false",
    "recipe.instance.peaks.accept_peakless=true",
    "recipe.semantic.old_classes_compete=true",
    "recipe.semantic.peak_input=log_odds",
]


def train_in_processes(count: int, run: Path) -> list[dict[str, Any]]:
    """Train steps 0 and 1 and return the lines of their logs."""
    command = [sys.executable, processes.__file__, str(count), str(run), "1", *GENTLE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr
    logs = [run / f"step-{step}" / "metrics.jsonl" for step in (0, 1)]
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_in_every_phase(tmp_path: Path) -> None:
    one, two = (train_in_processes(count, tmp_path / str(count)) for count in (1, 2))
    assert [(line["phase"], line["iteration"]) for line in one] == [
        (phase, iteration) for phase in ("base", "semantic", "instance") for iteration in (1, 2, 3, 4)
    ]
    taught = set()
    for expected, found in zip(one, two, strict=True):
        assert (found["phase"], found["iteration"], found["lr"]) == tuple(
            expected[k] for k in ("phase", "iteration", "lr")
        )
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2, abs=1e-4)
        taught |= {(expected["phase"], name) for name, value in expected["losses"].items() if value > 1e-4}
    assert {name for phase, name in taught if phase == "base"} == {"semantic", "center", "offset"}
    assert {name for phase, name in taught if phase == "semantic"} >= {
        *("classification", "peak", "localizer_distillation", "encoder_distillation", "flac"),
        *("semantic", "random_dropout"),
    }
    assert {name for phase, name in taught if phase == "instance"} == {
        *("center_old", "center_new", "offset_old", "offset_new"),
    }


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
