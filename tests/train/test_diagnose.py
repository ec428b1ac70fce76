"""Parts of a network's answer replaced by the truth."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, tiny_plan
from typer.testing import CliRunner

from cl4wsis.cli.main import app
from cl4wsis.datasets import EvaluationSample, load_evaluation_set
from cl4wsis.geometry import FitTransform
from cl4wsis_train.diagnose import SUBSTITUTIONS, diagnose_network, substituted_predictions, true_maps
from cl4wsis_train.models.network import InstanceSegmenter
from cl4wsis_train.trainer import build_fabric, train_step

SMALL = "recipe.network.encoder=test_efficientnet"


def sample(rows: list[str], labels: list[int]) -> tuple[EvaluationSample, FitTransform]:
    ids = np.array([[int(cell) for cell in row] for row in rows], np.int32)
    image = np.zeros((*ids.shape, 3), np.uint8)
    return EvaluationSample("a", image, ids, np.array(labels, np.int32)), FitTransform.fit(ids.shape, ids.shape)


@pytest.fixture(scope="module")
def blind() -> InstanceSegmenter:
    """A network of four and two classes that sees background everywhere, and centers nowhere."""
    torch.manual_seed(0)
    network = InstanceSegmenter(tiny_plan(SMALL).recipe.network, (4, 2)).eval()
    for head in (*network.semantic_branch.classifier, *network.instance_branch.center_head):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    network.semantic_branch.classifier[0].bias.data[0] = 5.0
    return network


def test_true_maps_of_two_objects_by_hand() -> None:
    picture, transform = sample(["11100", "10100", "11100", "00022", "00022"], [1, 0])
    maps = true_maps([picture], [transform], num_classes=2, sigma=1.0)
    classes = maps.semantic_probs[0].argmax(0)
    assert classes.tolist() == [[2, 2, 2, 0, 0], [2, 0, 2, 0, 0], [2, 2, 2, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert maps.semantic_probs.sum(1).eq(1).all()
    # The ring has its mean in the hole, at (1, 1); of its pixels that are one step away the first is (0, 1).
    assert (maps.center_heatmap[0, 1] == 1).nonzero().tolist() == [[0, 1]]
    # The square's mean is (3.5, 3.5); all its pixels are equally near, and the first one counts.
    assert (maps.center_heatmap[0, 0] == 1).nonzero().tolist() == [[3, 3]]
    assert maps.offset_map[0, :, 2, 0].tolist() == [-2, 1]
    assert maps.offset_map[0, :, 4, 4].tolist() == [-1, -1]
    assert maps.offset_map[0, :, 1, 1].tolist() == [0, 0]


def test_images_of_a_batch_keep_their_own_objects() -> None:
    first, second = sample(["10", "00"], [0]), sample(["00", "21"], [1, 0])
    maps = true_maps([first[0], second[0]], [first[1], second[1]], num_classes=2, sigma=1.0)
    assert maps.semantic_probs.argmax(1).tolist() == [[[1, 0], [0, 0]], [[0, 0], [1, 2]]]
    assert (maps.center_heatmap[1] == 1).nonzero().tolist() == [[0, 1, 0], [1, 1, 1]]


def test_everything_true_finds_every_object(blind: InstanceSegmenter) -> None:
    plan = tiny_plan("recipe.grouping.min_area=1")
    reports = diagnose_network(blind, plan, 1)
    assert set(reports) == set(SUBSTITUTIONS)
    complete = reports["everything true"]
    assert complete.ap50.all == 1.0
    assert complete.iou.all == pytest.approx(1.0)
    assert reports["as it is"].ap50.all == 0.0
    assert reports["true centers"].ap50.all == 0.0  # without a class nothing is found
    assert reports["true classes"].iou.all == pytest.approx(1.0)
    assert 0 < (reports["true classes"].ap50.all or 0) <= 1


def test_true_centers_split_what_touches(blind: InstanceSegmenter) -> None:
    picture, _ = sample(["1" * 32 + "2" * 32] * 64, [3, 3])
    found = substituted_predictions(blind, [picture], tiny_plan("recipe.grouping.min_area=1"))
    assert len(found["true classes"][0][0]) == 1
    split, class_map = found["everything true"][0]
    assert split.instance_ids[0, 0] != split.instance_ids[0, 63]
    assert np.array_equal(np.unique(split.instance_ids[:, :32]), [split.instance_ids[0, 0]])
    assert (class_map == 4).all()


def test_ruling_out_absent_classes_leaves_those_of_the_image(blind: InstanceSegmenter) -> None:
    blind.semantic_branch.classifier[0].bias.data[0] = 0.0
    blind.semantic_branch.classifier[0].bias.data[3] = 5.0  # sees class 2 everywhere, and class 1 behind it
    blind.semantic_branch.classifier[0].bias.data[2] = 4.0
    picture, _ = sample(["1" * 64] * 64, [1])
    found = substituted_predictions(blind, [picture], tiny_plan())
    assert (found["as it is"][0][1] == 3).all()
    assert (found["absent classes ruled out"][0][1] == 2).all()


def test_as_it_is_equals_the_evaluation_after_training(tmp_path: Path) -> None:
    plan = tiny_plan(SMALL, "recipe.base.epochs=1")
    train_step(plan, 0, tmp_path, fabric=build_fabric(plan, "cpu"))
    settings = [part for override in [*TINY, SMALL, "recipe.base.epochs=1"] for part in ("--set", override)]
    arguments = ["diagnose", "shapes", "--step", "0", "--run", str(tmp_path), "--device", "cpu"]
    answer = CliRunner().invoke(app, [*arguments, "--json", *settings])
    assert answer.exit_code == 0, answer.output
    reports = json.loads(answer.stdout)
    assert reports["as it is"] == json.loads((tmp_path / "step-0/step.json").read_text())["metrics"]
    assert len(load_evaluation_set(plan, 0)) == reports["everything true"]["num_images"]
    table = CliRunner().invoke(app, [*arguments, *settings])
    assert "true classes and centers" in table.stdout


def test_run_without_steps_says_what_to_do(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["diagnose", "shapes", "--run", str(tmp_path)])
    assert answer.exit_code == 1
    assert "cl4wsis train-step" in answer.stderr
