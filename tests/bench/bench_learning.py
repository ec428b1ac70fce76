"""Train a plan and its supervised baselines with the same recipe, and print what each step learned and forgot.

    python tests/bench/bench_learning.py animals7/4-3 --root DATA --run runs/animals7-4-3

Steps that are trained already are measured from their folders, so an interrupted run goes on where it stopped.
"""

import argparse
from pathlib import Path

from cl4wsis.cli.demo import measured_steps, train_all
from cl4wsis.cli.report import print_steps
from cl4wsis.tasks import load_plan


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="file, or name of a plan that comes with cl4wsis")
    parser.add_argument("--root", help="folder of the images and annotations (data.root of the plan)")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--methods", nargs="+", default=["cl4wsis", "fine-tune", "joint"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the plan")
    arguments = parser.parse_args()
    settings = [*arguments.set, *([f"data.root={arguments.root}"] if arguments.root else [])]
    reports = {}
    for method in arguments.methods:
        plan = load_plan(arguments.plan, [*settings, f"recipe.method={method}"])
        train_all(plan, arguments.run, arguments.device)
        reports[method] = measured_steps(plan, arguments.run)
    print_steps(reports, f"{arguments.plan}, percent")


if __name__ == "__main__":
    main()
