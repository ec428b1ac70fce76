"""What the exported grouping costs on ONNX Runtime (CPU), by profile and input size, and stage by stage.

python tests/bench/bench_graph.py [--threads 1] [--classes 20] [--slots 64] [--sides 512]

The first table holds medians of whole runs; the second one, for the largest side, the least time of the kernels of each
stage as a graph of its own, and the bytes that they read and write.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import grouping_scene

from cl4wsis.grouping import GroupingSpec, group_instances
from cl4wsis_export import grouping
from cl4wsis_export.graph import export_module, serialize
from cl4wsis_export.grouping import GroupingOutput, StaticGrouping

NAMES = ("semantic_probs", "center_heatmap", "offset_map")
REPEATS = 9
ROUNDS = 6


class Setting(NamedTuple):
    """Maps of one image, and the module that groups them."""

    maps: dict[str, np.ndarray]
    spec: GroupingSpec
    module: StaticGrouping


class Cost(NamedTuple):
    """Of a graph: nodes that are run, ms, MB read and written."""

    nodes: int
    milliseconds: float
    megabytes: float


def setting(profile: Literal["exact", "fast"], side: int, num_classes: int, slots: int) -> Setting:
    spec = GroupingSpec(profile=profile, max_instances=slots)
    grid = side // spec.stride
    scene = grouping_scene(1, num_classes=num_classes, height=grid, width=grid, stride=spec.stride)
    module = StaticGrouping(spec, (grid, grid), ROUNDS).eval()
    return Setting({name: getattr(scene, name) for name in NAMES}, spec, module)


def open_session(
    module: nn.Module, inputs: dict[str, np.ndarray], outputs: list[str], options: onnxruntime.SessionOptions
) -> tuple[onnxruntime.InferenceSession, int]:
    """Export for inputs of batch 1; return the session and its number of nodes."""
    examples = {name: torch.from_numpy(np.concatenate([array, array])) for name, array in inputs.items()}
    model = export_module(module, examples, outputs, opset=18)
    session = onnxruntime.InferenceSession(serialize(model), options, providers=["CPUExecutionProvider"])
    return session, sum(1 for _ in model.graph.all_nodes())


def session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return options


def median_ms(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(case: Setting, threads: int) -> tuple[int, float, float]:
    """Return nodes of the graph, and ms of the graph and of the reference."""
    inputs = {name: array[None] for name, array in case.maps.items()}
    session, nodes = open_session(case.module, inputs, list(GroupingOutput._fields), session_options(threads))
    graph_ms = median_ms(lambda: session.run(None, inputs))
    return nodes, graph_ms, median_ms(lambda: group_instances(*case.maps.values(), case.spec))


class Stage(nn.Module):
    """A part of the grouping that reads up to four maps."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], owner: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.owner = owner

    def forward(self, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> tuple[Tensor, ...]:
        return self.run(first, second, third, fourth)


def profile_stage(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], owner: nn.Module, threads: int) -> Cost:
    with torch.no_grad():
        outputs = [f"output{i}" for i in range(len(run(*inputs)))]
    arrays = {f"input{i}": tensor.numpy() for i, tensor in enumerate(inputs)}
    options = session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "stage")
        session, _ = open_session(Stage(run, owner).eval(), arrays, outputs, options)
        for _ in range(REPEATS):
            session.run(None, arrays)
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    fastest: dict[str, float] = {}
    moved: dict[str, int] = {}
    for event in kernels:
        name, sizes = event["name"], event["args"]
        fastest[name] = min(event["dur"], fastest.get(name, float("inf")))
        moved[name] = int(sizes["activation_size"]) + int(sizes["parameter_size"]) + int(sizes["output_size"])
    return Cost(len(fastest), sum(fastest.values()) / 1e3, sum(moved.values()) / 1e6)


def profile_stages(case: Setting, threads: int) -> dict[str, Cost]:
    """Profile the stages one after the other, each on what the one before gave."""
    module = case.module
    probs, heatmap, offsets = (torch.from_numpy(array)[None] for array in case.maps.values())
    costs: dict[str, Cost] = {}

    def stage(name: str, run: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        padded = [*inputs, *[torch.zeros(1, 1)] * (4 - len(inputs))]
        costs[name] = profile_stage(run, padded, module, threads)
        with torch.no_grad():
            return run(*padded)

    def classify(probs: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        class_map = probs.argmax(dim=1)
        return class_map, grouping.read_channel(probs, class_map)

    def choose_centers(labels: Tensor, peaks: Tensor, class_map: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        exists, pixels, values = peaks.unbind(1)
        return module._choose_centers(labels, grouping._Peaks(exists, pixels.long(), values), class_map.float())

    def describe(ids: Tensor, centers: Tensor, class_probs: Tensor, full_class_map: Tensor) -> tuple[Tensor, ...]:
        return module._describe(ids, grouping._Centers(*centers.unbind(1)), class_probs, full_class_map)

    class_map, class_probs = stage("class map", classify, probs)
    full_class_map = class_map
    if case.spec.profile == "fast":
        [full_class_map] = stage("full-size class map", lambda p, *_: (grouping.enlarged_class_map(p),), probs)
    [labels] = stage("regions", lambda c, *_: (module.label_regions(c.float())[0],), class_map)
    peaks = stage("peaks", lambda c, m, *_: module._find_peaks(c, c.float(), m), class_map, heatmap)
    packed_peaks = torch.stack([tensor.float() for tensor in peaks], dim=1)  # (1, 3, P)
    centers = torch.stack(stage("centers", choose_centers, labels, packed_peaks, class_map), dim=1)  # (1, 6, K)
    [ids] = stage(
        "assignment",
        lambda r, k, o, _: (module._assign_pixels(r, grouping._Centers(*k.unbind(1)), o),),
        *(labels, centers, offsets),
    )
    stage("ids and figures", describe, ids, centers, class_probs, full_class_map)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 512])
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}, {options}")
    print("profile  input  nodes   graph ms   NumPy ms")
    for side in options.sides:
        for profile in ("exact", "fast"):
            case = setting(profile, side, options.classes, options.slots)
            nodes, graph, host = measure(case, options.threads)
            print(f"{profile:7}  {side:5}  {nodes:5}  {graph:9.1f}  {host:9.1f}", flush=True)
    for profile in ("exact", "fast"):
        print(f"\n{profile} {max(options.sides)}          nodes         ms         MB")
        costs = profile_stages(setting(profile, max(options.sides), options.classes, options.slots), options.threads)
        costs["all stages"] = Cost(*map(sum, zip(*costs.values(), strict=True)))
        for name, cost in costs.items():
            print(f"{name:19} {cost.nodes:5} {cost.milliseconds:10.2f} {cost.megabytes:10.1f}", flush=True)


if __name__ == "__main__":
    main()
