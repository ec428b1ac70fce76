"""One small network, exported once per session."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="export needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="verification needs the extra 'cpu'")

import torch
from tiny import tiny_plan
from torch import nn

from cl4wsis.grouping import GroupingSpec
from cl4wsis.steps import ClassInfo, InputRule, StepInfo
from cl4wsis.tasks import class_color
from cl4wsis_export import ExportSpec, export_network
from cl4wsis_train.models.network import InstanceSegmenter


@pytest.fixture(scope="session")
def step_info() -> StepInfo:
    """Describe step 1 of a plan of three and two classes, at 64x96 px."""
    steps = 'steps=[["disc", "square", "star"], ["ring", "cross"]]'
    ours = ["learned_upsampling=true", "image_prior=1.0", "discriminant=0.5", "discriminant_window=3"]
    plan = tiny_plan(
        "recipe.input_size=[64, 96]",
        "recipe.semantic.train_encoder=false",
        *(f"recipe.network.{field}" for field in (*ours, "shared_centers=true")),
        steps,
    )
    names = plan.split(1).seen_names
    classes = (ClassInfo(name=n, step_added=int(i > 2), color=class_color(i)) for i, n in enumerate(names))
    network = InstanceSegmenter(plan.recipe.network, (3, 2))
    return StepInfo(
        plan=plan,
        step=1,
        classes=tuple(classes),
        class_counts=(3, 2),
        network=plan.recipe.network,
        input=InputRule(size=plan.recipe.input_size, mean=network.mean, std=network.std),
        weights_sha256="12" * 32,
        parent_sha256="34" * 32,
        seconds={"semantic": 1.5},
        metrics={"ap50": {"old": 0.5, "new": None, "all": 0.456}},
        versions={"torch": torch.__version__},
    )


@pytest.fixture(scope="session")
def network(step_info: StepInfo) -> InstanceSegmenter:
    """Build a network whose random answers hold many instances."""
    torch.manual_seed(3)
    network = InstanceSegmenter(step_info.network, step_info.class_counts).eval()
    with torch.no_grad():
        for head in network.semantic_branch.classifier.parameters():
            head.mul_(20)  # untrained logits are so flat that one class would fill the image
        network.instance_branch.offset_head.weight.mul_(20)
        assert network.discriminant is not None
        nn.init.normal_(network.discriminant.weight, std=0.3)
    return network


@pytest.fixture(scope="session")
def export_spec() -> ExportSpec:
    """Keep small instances, so that there is something to compare."""
    return ExportSpec(grouping=GroupingSpec(min_area=4, max_instances=12), verification_images=3)


@pytest.fixture(scope="session")
def bundle_path(
    network: InstanceSegmenter, step_info: StepInfo, export_spec: ExportSpec, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Export the network."""
    return export_network(network, step_info, tmp_path_factory.mktemp("bundles") / "tiny.cl4wsis", export_spec)
