"""AP50 of every precision of a bundle, old and new classes apart, beside the trained network in torch.

    python tests/bench/bench_precision.py animals7/4-3 BUNDLE --root DATA [--step runs/animals7-4-3/step-1]

All are measured on the evaluation images of the plan with the grouping of the bundle; differences are in points
(hundredths) to the first row. Behind them stand their standard errors: the standard deviation of the difference over
500 sets of images that are drawn from these with replacement. A difference of less than two of them may be chance.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cl4wsis.bundle import open_bundle
from cl4wsis.datasets import EvaluationSample, load_evaluation_set
from cl4wsis.metrics import Evaluation, GroupMeans
from cl4wsis.tasks import ClassSplit, Plan, load_plan
from cl4wsis_serve.predictor import Predictor

GROUPS = ("old", "new", "all")
RESAMPLES = 500

Answer = Callable[[EvaluationSample], tuple]
"""Returns the instances of an image, and perhaps its class map."""


def answers(arguments: argparse.Namespace, plan: Plan, step: int) -> Iterator[tuple[str, Answer]]:
    """Give the step in torch if there is one, then every precision of the bundle."""
    if arguments.step:
        from cl4wsis_train.checkpoint import load_step
        from cl4wsis_train.evaluate import predict_batch

        network, info = load_step(arguments.step)
        if info.step != step:
            raise SystemExit(f"{arguments.step} is step {info.step}, the bundle's is {step}")
        yield "torch float32", lambda sample: predict_batch(network, [sample.image], plan)[0]
    for variant in open_bundle(arguments.bundle).manifest.variants:
        if variant.post == arguments.post:
            options = {"precision": variant.precision, "post": variant.post, "threads": arguments.threads}
            predictor = Predictor.open(arguments.bundle, arguments.backend, **options)
            yield (
                f"{predictor.backend.name} {variant.precision}",
                lambda sample, p=predictor: (p.predict(sample.image),),
            )


def measure(answer: Answer, plan: Plan, split: ClassSplit) -> Evaluation:
    evaluation = Evaluation(split)
    for sample in load_evaluation_set(plan, split.step):
        prediction, *semantic_map = answer(sample)
        evaluation.add(prediction, sample.true_instances(), *semantic_map)
    return evaluation


def points(means: GroupMeans) -> NDArray[np.float64]:
    return 100 * np.array([np.nan if (value := getattr(means, group)) is None else value for group in GROUPS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="file, or name of a plan that comes with cl4wsis")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", help="folder of the images and annotations (data.root of the plan)")
    parser.add_argument("--step", type=Path, help="folder of the trained step, measured in torch")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--post", default="graph", choices=["graph", "host"])
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    manifest = open_bundle(arguments.bundle).manifest
    settings = [f"recipe.grouping.{name}={value}" for name, value in manifest.grouping.model_dump().items()]
    plan = load_plan(arguments.plan, [*settings, *([f"data.root={arguments.root}"] if arguments.root else [])])
    split = plan.split(manifest.step)
    print("| run | " + " | ".join(f"AP50 {group} | difference" for group in GROUPS) + " |")
    print("| --- |" + " ---: | ---: |" * len(GROUPS))
    first: Evaluation | None = None
    for name, answer in answers(arguments, plan, manifest.step):
        found = measure(answer, plan, split)
        first = first or found
        images = np.arange(len(found))
        generator = np.random.default_rng(0)
        drawn = [generator.choice(images, len(images)) for _ in range(RESAMPLES)]
        errors = np.std([points(found.ap50(chosen)) - points(first.ap50(chosen)) for chosen in drawn], axis=0)
        values = points(found.ap50(images))
        columns = zip(values, values - points(first.ap50(images)), errors, strict=True)
        print(f"| {name} | " + " | ".join(f"{v:.2f} | {d:+.2f} ± {e:.2f}" for v, d, e in columns) + " |", flush=True)


if __name__ == "__main__":
    main()
