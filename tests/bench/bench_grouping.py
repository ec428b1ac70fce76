"""Measure the NumPy grouping on one core: python tests/bench/bench_grouping.py [--size 512] [--repeats 50].

The scenes are drawn (see cases.py) and smooth at stride 4, as network maps are; ``exact`` and ``paper`` get them
upsampled bilinearly to the full size. Prints one line per profile and number of instances.
"""

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from cl4wsis.grouping import FloatMap, GroupingSpec, group_instances

sys.path.insert(0, str(Path(__file__).parent.parent))

from cases import grouping_scene

Profile = Literal["exact", "fast", "paper"]


def network_maps(profile: Profile, size: int, num_instances: int) -> tuple[FloatMap, FloatMap, FloatMap]:
    scene = grouping_scene(11, 20, size // 4, size // 4, num_instances, noise=0.15, stride=4)
    maps = (scene.semantic_probs, scene.center_heatmap, scene.offset_map)
    if profile == "fast":
        return maps
    probs, heatmap, offsets = (np.stack([cv2.resize(channel, (size, size)) for channel in values]) for values in maps)
    return probs, heatmap, offsets


def measure(profile: Profile, size: int, num_instances: int, repeats: int) -> tuple[int, float, float]:
    """Return instances found, median and 95th percentile in ms."""
    maps = network_maps(profile, size, num_instances)
    spec = GroupingSpec(profile=profile)
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        found = group_instances(*maps, spec)
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
    print(f"{'profile':8} {'drawn':>6} {'found':>6} {'p50 ms':>8} {'p95 ms':>8}")
    profiles: tuple[Profile, ...] = ("exact", "fast", "paper")
    for profile in profiles:
        for count in (10, 40):
            found, p50, p95 = measure(profile, arguments.size, count, arguments.repeats)
            print(f"{profile:8} {count:6} {found:6} {p50:8.2f} {p95:8.2f}")


if __name__ == "__main__":
    main()
