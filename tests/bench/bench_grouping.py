"""Measure the NumPy grouping on one core: python tests/bench/bench_grouping.py [--size 512] [--repeats 50].

The scenes are drawn (see cases.py): logits at stride 16, heatmap and offsets at stride 4. *maps* is ``group_maps`` on
them as they are; *plain* enlarges them to the grid of the profile, takes the softmax and calls ``group_instances``.
Prints one line per profile and number of instances.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from cl4wsis.enlarge import EnlargedMap
from cl4wsis.grouping import GroupingSpec, group_instances, group_maps
from cl4wsis.instances import Instances

sys.path.insert(0, str(Path(__file__).parent.parent))

from cases import NetworkScene, network_scene

Profile = Literal["exact", "fast", "paper"]


def group_plainly(scene: NetworkScene, spec: GroupingSpec) -> Instances:
    grid = scene.input_size[0] // spec.stride
    maps = (scene.semantic_logits, scene.center_heatmap, scene.offset_map)
    logits, heatmap, offsets = (EnlargedMap(values, grid // values.shape[1]).full() for values in maps)
    exponentials = np.exp(logits - logits.max(axis=0))
    return group_instances(exponentials / exponentials.sum(axis=0), heatmap, offsets, spec)


def group_directly(scene: NetworkScene, spec: GroupingSpec) -> Instances:
    return group_maps(scene.semantic_logits, scene.center_heatmap, scene.offset_map, scene.input_size, spec)


def measure(call: Callable[[], Instances], repeats: int) -> tuple[int, float, float]:
    """Return instances found, median and 95th percentile in ms."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
    p50, p95 = np.percentile(np.array(seconds[2:]) * 1000, [50, 95])
    return len(found), float(p50), float(p95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the network input, px")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    print(f"{platform.processor() or platform.machine()}, {platform.system()}, NumPy {np.__version__}, one core")
    print(f"{'profile':8} {'path':6} {'drawn':>6} {'found':>6} {'p50 ms':>8} {'p95 ms':>8}")
    profiles: tuple[Profile, ...] = ("exact", "fast", "paper")
    for profile in profiles:
        spec = GroupingSpec(profile=profile)
        for count in (10, 40):
            scene = network_scene(11, 20, arguments.size, arguments.size, count)
            for name, group in (("maps", group_directly), ("plain", group_plainly)):
                found, p50, p95 = measure(partial(group, scene, spec), arguments.repeats)
                print(f"{profile:8} {name:6} {count:6} {found:6} {p50:8.2f} {p95:8.2f}")


if __name__ == "__main__":
    main()
