"""Milliseconds of the exported grouping alone on ONNX Runtime (CPU), by profile and input size.

python tests/bench/bench_graph.py [--threads 2] [--classes 20] [--slots 64]
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import grouping_scene

from cl4wsis.grouping import GroupingSpec, group_instances
from cl4wsis_export.graph import export_module, serialize
from cl4wsis_export.grouping import GroupingOutput, StaticGrouping

NAMES = ("semantic_probs", "center_heatmap", "offset_map")
REPEATS = 15


def median_ms(call) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(profile: str, side: int, num_classes: int, slots: int, threads: int) -> tuple[int, float, float]:
    spec = GroupingSpec(profile=profile, max_instances=slots)
    grid = side // spec.stride
    scene = grouping_scene(1, num_classes=num_classes, height=grid, width=grid, stride=spec.stride)
    maps = {name: getattr(scene, name) for name in NAMES}
    module = StaticGrouping(spec, (grid, grid), rounds=6).eval()
    examples = {name: torch.from_numpy(np.stack([array, array])) for name, array in maps.items()}
    model = export_module(module, examples, GroupingOutput._fields, opset=18)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    feed = {name: array[None] for name, array in maps.items()}
    nodes = sum(1 for _ in model.graph.all_nodes())
    return nodes, median_ms(lambda: session.run(None, feed)), median_ms(lambda: group_instances(*maps.values(), spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512])
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}, {options}")
    print("profile  input  nodes   graph ms   NumPy ms")
    for side in options.sides:
        for profile in ("exact", "fast"):
            nodes, graph, host = measure(profile, side, options.classes, options.slots, options.threads)
            print(f"{profile:7}  {side:5}  {nodes:5}  {graph:9.1f}  {host:9.1f}", flush=True)


if __name__ == "__main__":
    main()
