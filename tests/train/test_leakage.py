"""What later steps must not see, the teacher they must not touch, and the work they must not do twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny import read_losses, tiny_phase, tiny_plan
from torch import Tensor, nn

from cl4wsis.steps import read_step
from cl4wsis.tasks import Plan
from cl4wsis_train.data.loading import build_training_loader
from cl4wsis_train.models.maps import upsample
from cl4wsis_train.optim import build_optimizer
from cl4wsis_train.phases.common import Phase
from cl4wsis_train.phases.instance import InstancePhase
from cl4wsis_train.trainer import build_fabric, train_step

TAGS = [["red"], ["red", "green"], ["green"], ["red"], ["blue"], ["blue", "red"], ["blue"], ["blue", "green"]]
COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 230)}


def write_pictures(root: Path) -> Plan:
    """Write eight photographs of colored squares with masks and tags, and return a plan of two steps over them."""
    generator = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id, tags in enumerate(TAGS):
        pixels = generator.integers(90, 160, (64, 64, 3)).astype(np.uint8)
        for column, name in enumerate(tags):
            left, top = 4 + 32 * column, int(generator.integers(4, 34))
            pixels[top : top + 24, left : left + 24] = COLORS[name]
            corners = [left, top, left + 24, top, left + 24, top + 24, left, top + 24]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": list(COLORS).index(name),
                    "bbox": [left, top, 24, 24],
                    "segmentation": [corners],
                }
            )
        cv2.imwrite(str(root / "images" / f"{image_id}.png"), pixels[..., ::-1])
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 64})
    categories = [{"id": number, "name": name} for number, name in enumerate(COLORS)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(coco))
    (root / "val.json").write_text(json.dumps(coco))
    (root / "tags.json").write_text(json.dumps({f"{i}.png": tags for i, tags in enumerate(TAGS)}))
    source = {"images": "images", "instances": "instances.json", "tags": "tags.json"}
    data = {"kind": "coco", "root": str(root), "train": source, "val": {"images": "images", "instances": "val.json"}}
    recipe = tiny_plan().recipe.model_dump(mode="json") | {"num_workers": 0}
    tables = {"name": "squares", "steps": [["red", "green"], ["blue"]], "data": data, "recipe": recipe}
    return Plan.model_validate(tables)


def leave_masks(instances: Path) -> None:
    """Change nothing."""


def alter_masks(instances: Path) -> None:
    """Move every mask and give it another class."""
    coco = json.loads(instances.read_text())
    for annotation in coco["annotations"]:
        annotation["segmentation"] = [[0, 0, 60, 0, 60, 9, 0, 9]]
        annotation["bbox"] = [0, 0, 60, 9]
        annotation["category_id"] = (annotation["category_id"] + 1) % len(COLORS)
    instances.write_text(json.dumps(coco))


def test_later_steps_learn_the_same_with_true_altered_and_deleted_masks(tmp_path: Path) -> None:
    plan = write_pictures(tmp_path / "data")
    instances = tmp_path / "data" / "instances.json"
    changes: dict[str, Callable[[Path], None]] = {"as is": leave_masks, "altered": alter_masks, "deleted": Path.unlink}
    base = train_step(plan, 0, tmp_path / "base", fabric=build_fabric(plan, "cpu"), evaluate=False)
    results = {}
    for name, change in changes.items():
        change(instances)
        run = tmp_path / name
        run.mkdir()
        (run / "step-0").symlink_to(base)
        folder = train_step(plan, 1, run, fabric=build_fabric(plan, "cpu"), evaluate=False)
        results[name] = read_step(folder).weights_sha256, read_losses(folder)
    weights, losses = results["as is"]
    assert set(losses) == {"semantic", "instance"}
    assert results["altered"] == (weights, losses)
    assert results["deleted"] == (weights, losses)


def test_base_step_does_learn_from_masks(tmp_path: Path) -> None:
    plan = write_pictures(tmp_path / "data")
    curves = []
    for name, change in (("as is", leave_masks), ("altered", alter_masks)):
        change(tmp_path / "data" / "instances.json")
        curves.append(
            read_losses(train_step(plan, 0, tmp_path / name, fabric=build_fabric(plan, "cpu"), evaluate=False))
        )
    assert curves[0] != curves[1]


def run_phase(phase: Phase, plan: Plan, name: Any, epochs: int = 2) -> None:
    """Train a phase for some epochs without the trainer around it."""
    settings = getattr(plan.recipe, name).optimizer
    encoder = list(phase.network.encoder.parameters())
    heads = [parameter for parameter in phase.parameters() if all(parameter is not other for other in encoder)]
    optimizer = build_optimizer(settings, encoder, heads)
    loader = build_training_loader(plan, 1, name, 4, seed=0)
    phase.train()
    for epoch in range(epochs):
        for batch in loader:
            torch.stack(list(phase(batch, epoch).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def state_hash(module: nn.Module) -> str:
    """Hash all parameters and buffers, and the mode of every layer."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    digest.update(str([layer.training for layer in module.modules()]).encode())
    return digest.hexdigest()


def test_teacher_and_frozen_parts_are_untouched_by_training() -> None:
    plan, semantic = tiny_plan(), tiny_phase()
    teacher = state_hash(semantic.train().old_network)
    student = state_hash(semantic.network.semantic_branch)
    instance_branch = state_hash(semantic.network.instance_branch)
    run_phase(semantic, plan, "semantic")
    assert state_hash(semantic.old_network) == teacher
    assert state_hash(semantic.network.instance_branch) == instance_branch
    assert state_hash(semantic.network.semantic_branch) != student  # it did train

    instance = InstancePhase(semantic, plan.recipe).train()
    frozen = {
        "teacher": instance.old_network,
        "encoder": instance.network.encoder,
        "semantic branch": instance.network.semantic_branch,
        "localizer": instance.localizer,
        "peak generator": instance.peak_generator,
    }
    before = {name: state_hash(module) for name, module in frozen.items()}
    instance_branch = state_hash(instance.network.instance_branch)
    run_phase(instance, plan, "instance")
    assert {name: state_hash(module) for name, module in frozen.items()} == before
    assert instance.old_network is semantic.old_network
    assert before["teacher"] == teacher
    assert state_hash(instance.network.instance_branch) != instance_branch
    assert all(parameter.grad is None for module in frozen.values() for parameter in module.parameters())


class PixelCounter:
    """Counts how often each image, or its features, passes each part of a phase that is not being trained."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[str] = Counter()
        self.handles = [
            part.register_forward_pre_hook(lambda _, inputs, name=name: self._count(name, inputs))
            for name, part in parts.items()
        ]

    def _count(self, name: str, inputs: tuple[Any, ...]) -> None:
        maps: Tensor = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][-1]
        self.calls[name] += 1
        for image in maps.detach():
            self.seen[name, hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()] += 1

    def images(self, name: str) -> int:
        """Return how many different images a part has seen."""
        return sum(1 for part, _ in self.seen if part == name)


@pytest.mark.parametrize("train_encoder", [True, False])
@pytest.mark.parametrize("name", ["semantic", "instance"])
def test_frozen_networks_run_once_per_image(name: Any, train_encoder: bool) -> None:
    override = f"recipe.semantic.train_encoder={str(train_encoder).lower()}"
    plan, phase = tiny_plan(override), tiny_phase(override)
    trained: Phase = phase if name == "semantic" else InstancePhase(phase, plan.recipe)
    networks = {"old": trained.old_network, "own": trained.network}
    parts = {
        f"{owner} {part}": getattr(network, part)
        for owner, network in networks.items()
        for part in ("encoder", "semantic_branch", "instance_branch")
    }
    counter = PixelCounter(parts)
    batch = next(iter(build_training_loader(plan, 1, name, 4, seed=0)))
    trained.train()(batch, 1)
    assert set(counter.seen.values()) == {1}
    if name == "semantic":
        encoders = {"old encoder": 1, "own encoder": 1} if train_encoder else {"old encoder": 1}
        assert counter.calls == encoders | {"old semantic_branch": 1, "own semantic_branch": 1}
        assert all(counter.images(part) == 4 for part in counter.calls)
    else:  # the image and its mirror image
        encoders = {"old encoder": 1, "own encoder": 1} if train_encoder else {"own encoder": 1}
        branches = {"own semantic_branch": 1, "own instance_branch": 1, "old instance_branch": 1}
        assert counter.calls == encoders | branches
        assert (counter.images("own encoder"), counter.images("own semantic_branch")) == (8, 8)
        assert all(counter.images(part) == 4 for part in ("own instance_branch", "old instance_branch"))


def test_features_of_a_frozen_encoder_serve_the_old_network_too() -> None:
    plan = tiny_plan("recipe.semantic.train_encoder=false")
    phase = tiny_phase("recipe.semantic.train_encoder=false")
    instance = InstancePhase(phase, plan.recipe).train()
    batch = next(iter(build_training_loader(plan, 1, "instance", 4, seed=0)))
    frozen = instance._run_frozen(batch, (64, 64))
    with torch.no_grad():
        features = instance.old_network.encoder(instance.network.normalize(batch.images))
        center_heatmap, offset_map = instance.old_network.forward_instance(features)
    torch.testing.assert_close(frozen.old_center_heatmap, upsample(center_heatmap, (64, 64)))
    torch.testing.assert_close(frozen.old_offset_map, upsample(offset_map, (64, 64)))
