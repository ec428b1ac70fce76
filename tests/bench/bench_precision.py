"""AP50 of every precision of a bundle, old and new classes apart, beside the trained network in torch.

    python tests/bench/bench_precision.py animals7/4-3 BUNDLE --root DATA [--step runs/animals7-4-3/step-1]

All are measured on the evaluation images of the plan with the grouping of the bundle; differences are in points
(hundredths) to the first row.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from cl4wsis.bundle import open_bundle
from cl4wsis.metrics import EvaluationReport
from cl4wsis.tasks import Plan, load_plan
from cl4wsis_serve.evaluate import evaluate_predictor
from cl4wsis_serve.predictor import Predictor

GROUPS = ("old", "new", "all")


def reports(arguments: argparse.Namespace, plan: Plan) -> Iterator[tuple[str, EvaluationReport]]:
    """Measure the step in torch if it is given, then every precision of the bundle."""
    if arguments.step:
        from cl4wsis_train.checkpoint import load_step
        from cl4wsis_train.evaluate import evaluate_network

        network, info = load_step(arguments.step)
        yield "torch float32", evaluate_network(network, plan, info.step)
    for variant in open_bundle(arguments.bundle).manifest.variants:
        if variant.post == arguments.post:
            options = {"precision": variant.precision, "post": variant.post, "threads": arguments.threads}
            predictor = Predictor.open(arguments.bundle, arguments.backend, **options)
            yield f"{predictor.backend.name} {variant.precision}", evaluate_predictor(predictor, plan)


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
    grouping = open_bundle(arguments.bundle).manifest.grouping.model_dump()
    settings = [f"recipe.grouping.{name}={value}" for name, value in grouping.items()]
    plan = load_plan(arguments.plan, [*settings, *([f"data.root={arguments.root}"] if arguments.root else [])])
    print("| run | " + " | ".join(f"AP50 {group} | difference" for group in GROUPS) + " |")
    print("| --- |" + " --- | --- |" * len(GROUPS))
    first: list[float] = []
    for name, report in reports(arguments, plan):
        values = [100 * (getattr(report.ap50, group) or 0) for group in GROUPS]
        first = first or values
        cells = (f"{value:.2f} | {value - start:+.2f}" for value, start in zip(values, first, strict=True))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
