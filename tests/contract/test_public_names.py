"""Names that other programs may build on: they stay importable, with these parameters in this order."""

import importlib
import inspect

import pytest

FUNCTIONS = {
    "cl4wsis.grouping.group_instances": "semantic_probs, center_heatmap, offset_map, spec",
    "cl4wsis.metrics.voc_average_precision": "predictions, ground_truths, num_classes, iou_thresholds",
    "cl4wsis.metrics.coco_average_precision": "predictions, ground_truths, num_classes",
    "cl4wsis.metrics.mean_iou": "confusion",
    "cl4wsis.tasks.load_plan": "path",
    "cl4wsis.tasks.Plan.split": "self, step",
    "cl4wsis.instances.Instances": "instance_ids, labels, scores, boxes",
    "cl4wsis.instances.Instances.masks": "self",
    "cl4wsis.instances.Instances.to_coco": "self",
    "cl4wsis_train.models.network.InstanceSegmenter.forward": "self, images",
    "cl4wsis_train.models.localizer.Localizer.forward": "self, features",
    "cl4wsis_train.models.localizer.PeakGenerator": "num_new_classes",
    "cl4wsis_train.models.localizer.normalized_global_weighted_pooling": "logits, focal",
    "cl4wsis_train.models.affinity.PixelAdaptiveRefinement": "dilations, num_iterations",
    "cl4wsis_train.models.affinity.PixelAdaptiveRefinement.forward": "self, images, probs",
    "cl4wsis_train.losses.cam.flac_loss": "logits, flipped, rotated, quarter_turns, num_old_classes",
    "cl4wsis_train.losses.cam.random_dropout_loss": "logits, pixel_mask, random_classes",
    "cl4wsis_train.losses.semantic.semantic_bce_loss": "logits, target",
    "cl4wsis_train.losses.semantic.classification_loss": "pooled, image_labels",
    "cl4wsis_train.losses.semantic.self_training_loss": "logits, hard_target, image_labels",
    "cl4wsis_train.losses.distill.localizer_distillation_loss": "cam_logits, old_probs",
    "cl4wsis_train.losses.distill.encoder_distillation_loss": "features, old_features",
    "cl4wsis_train.losses.distill.selective_center_loss": "center_heatmap, old_center_heatmap, old_mask, count",
    "cl4wsis_train.losses.distill.selective_offset_loss": "offset_map, old_offset_map, old_mask, count",
    "cl4wsis_train.losses.instance.center_loss": "center_heatmap, center_target, loss_weight, count",
    "cl4wsis_train.losses.instance.offset_loss": "offset_map, offset_target, loss_weight, count",
    "cl4wsis_train.data.targets.encode_instance_targets": "instance_ids, labels, num_classes, sigma",
    "cl4wsis_train.pseudo.instance.synthesize_targets": "",
    "cl4wsis_train.pseudo.refine.refine_targets": "",
    "cl4wsis_serve.Predictor.open": "path, backend",
    "cl4wsis_serve.Predictor.predict": "self, image",
    "cl4wsis_serve.Predictor.stream": "self, sources",
}

FIELDS = {
    "cl4wsis.grouping.GroupingSpec": "profile, center_threshold, nms_kernel_size, min_area, max_instances",
    "cl4wsis_train.models.network.SegmenterOutput": "semantic_logits, center_heatmap, offset_map",
    "cl4wsis_train.data.targets.InstanceTargets": "center_target, offset_target, loss_weight",
}


def find(path: str) -> object:
    """Import the longest module that a dotted path begins with, and follow its attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        if importlib.util.find_spec(parts[0]) and _is_module(module):
            found: object = importlib.import_module(module)
            for name in parts[length:]:
                found = getattr(found, name)
            return found
    raise ImportError(path)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


@pytest.mark.parametrize(("path", "parameters"), FUNCTIONS.items(), ids=FUNCTIONS.keys())
def test_function_takes_these_parameters_first(path: str, parameters: str) -> None:
    expected = parameters.split(", ") if parameters else []
    assert list(inspect.signature(find(path)).parameters)[: len(expected)] == expected


@pytest.mark.parametrize(("path", "fields"), FIELDS.items(), ids=FIELDS.keys())
def test_record_has_these_fields(path: str, fields: str) -> None:
    assert set(fields.split(", ")) <= set(find(path).__annotations__)


def test_predictor_chooses_its_backend_by_itself() -> None:
    assert inspect.signature(find("cl4wsis_serve.Predictor.open")).parameters["backend"].default == "auto"
