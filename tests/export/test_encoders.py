"""Every encoder in every precision: exported, verified, run at every batch size, and built for four kinds of GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_plan
from torch import nn

from cl4wsis.bundle import Precision, open_bundle
from cl4wsis.checks import Limits
from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import ClassInfo, InputRule, StepInfo
from cl4wsis.tasks import class_color
from cl4wsis_export import ExportSpec, export_network
from cl4wsis_export.verify import open_session, verification_frames
from cl4wsis_train.models.network import InstanceSegmenter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "int8")
GPUS = ("8.0", "8.6", "8.9", "12.0")
SIDE = 128


def loose_limits(matched: float | None) -> Limits:
    """Leave little to keep to: untrained maps are flat, and much of their instances is rounding."""
    return Limits(golden_pixels=None, differing_pixels=None, matched=matched, mask_iou=None)


LARGE = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("resnet50", "resnet101")]


def measure_statistics(network: InstanceSegmenter, frames: np.ndarray) -> None:
    """Let an untrained network normalise as a trained one does; the order of centers would be rounding otherwise."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        network(network.normalize(torch.from_numpy(frames).permute(0, 3, 1, 2)))
    network.eval()


@pytest.fixture(scope="module", params=["tf_efficientnet_lite0", "convnextv2_atto", *LARGE])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export an untrained network whose answers hold many instances."""
    plan = tiny_plan(
        f"recipe.input_size=[{SIDE}, {SIDE}]",
        f"recipe.network.encoder={request.param}",
        'steps=[["disc", "square", "star"], ["ring"]]',
    )
    torch.manual_seed(5)  # no region of its maps hangs on the rounding of one pixel
    network = InstanceSegmenter(plan.recipe.network, (3, 1)).eval()
    rule = InputRule(size=plan.recipe.input_size, mean=network.mean, std=network.std)
    measure_statistics(network, verification_frames(rule, 8, seed=1))
    classes = (
        ClassInfo(name=n, step_added=i // 3, color=class_color(i)) for i, n in enumerate(plan.split(1).seen_names)
    )
    info = StepInfo(
        plan=plan,
        step=1,
        classes=tuple(classes),
        class_counts=(3, 1),
        network=plan.recipe.network,
        input=rule,
        weights_sha256="12" * 32,
        parent_sha256=None,
        seconds={},
    )
    spec = ExportSpec(
        grouping=GroupingSpec(min_area=4, max_instances=8),
        region_rounds=4,
        verification_images=2,
        precisions=PRECISIONS,
        precision_images=3,
        calibration_images=4,
        limits={"float16": loose_limits(0.7), "int8": loose_limits(None)},
    )
    return export_network(network, info, tmp_path_factory.mktemp("encoders") / "x.cl4wsis", spec)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_batch_size_gives_the_same_answers(path: Path, precision: Precision) -> None:
    bundle = open_bundle(path)
    frames = verification_frames(bundle.manifest.input, 8, seed=2)
    names = ["instance_ids", "scores"]
    session, exact = (open_session(bundle.path_of(bundle.variant(kind))) for kind in (precision, "float32"))
    alone = [session.run(names, {"images": frame[None]}) for frame in frames]
    assert sum(len(np.unique(ids)) - 1 for ids, _ in alone) >= 8
    is_int8 = precision == "int8"  # the last digit of a sum may decide how a value is rounded, but not more than that
    away = [np.mean(exact.run(names, {"images": f[None]})[0] != ids) for f, (ids, _) in zip(frames, alone, strict=True)]
    limit = np.mean(away) if is_int8 else 1e-3
    for size in range(1, 9):
        ids, scores = session.run(names, {"images": frames[:size]})
        for row in range(size):
            assert (ids[row] != alone[row][0][0]).mean() < limit
            if not is_int8:
                np.testing.assert_allclose(scores[row], alone[row][1][0], atol=1e-3)


@pytest.mark.trt
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_rtx_builds_it_and_keeps_the_types(path: Path, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    from cl4wsis_export.engines import TENSORRT_RTX, EngineSpec, build_engine, load_library

    bundle = open_bundle(path)
    variant = bundle.variant(precision)
    assert variant.types[precision] > 40
    spec = EngineSpec(max_batch=8, compute_capabilities=GPUS)
    built = build_engine(TENSORRT_RTX, load_library(TENSORRT_RTX), bundle.path_of(variant), spec, variant.types)
    assert len(built.content) > 1_000_000
    assert (
        max(built.types, key=lambda name: built.types[name]) == precision
    )  # convolutions merged by the builder count once
