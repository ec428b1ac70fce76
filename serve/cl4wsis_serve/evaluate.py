"""Measure an exported bundle on a plan's evaluation images, through the runtime that is deployed."""

from collections.abc import Callable

from cl4wsis.bundle import Manifest
from cl4wsis.datasets import load_evaluation_set
from cl4wsis.errors import BundleError
from cl4wsis.metrics import Evaluation, EvaluationReport
from cl4wsis.tasks import ClassSplit, Plan
from cl4wsis_serve.predictor import Predictor

_BATCH_SIZE = 4


def evaluate_predictor(
    predictor: Predictor, plan: Plan, progress: Callable[[int, int], None] | None = None
) -> EvaluationReport:
    """Measure a bundle; objects of classes it does not know count as background.

    A bundle answers with instances alone, so the class map behind mIoU is that of its instances.

    Args:
        predictor: an open bundle.
        plan: gives the evaluation images.
        progress: called with the number of images done and of all.

    Raises:
        BundleError: the bundle's classes are not those of the plan at the bundle's step.
    """
    split = check_plan(predictor.manifest, plan)
    samples = load_evaluation_set(plan, split.step)
    evaluation = Evaluation(split)
    for start in range(0, len(samples), _BATCH_SIZE):
        batch = [samples[index] for index in range(start, min(start + _BATCH_SIZE, len(samples)))]
        for sample, found in zip(batch, predictor.predict_batch([s.image for s in batch]), strict=True):
            evaluation.add(found, sample.true_instances())
        if progress is not None:
            progress(len(evaluation), len(samples))
    return evaluation.report()


def check_plan(manifest: Manifest, plan: Plan) -> ClassSplit:
    """Return old and new classes of a bundle's step, once it is sure that the bundle knows just these.

    Raises:
        BundleError: the bundle's classes are not those of the plan at the bundle's step.
    """
    step = manifest.step
    expected = plan.split(step).seen_names if step < plan.num_steps else ()
    found = tuple(info.name for info in manifest.classes)
    if found != expected:
        raise BundleError(
            f"the bundle of step {step} knows {', '.join(found)}; plan '{plan.name}' has "
            f"{', '.join(expected) or 'no such step'}: give the plan it was trained on with --config"
        )
    return plan.split(step)
