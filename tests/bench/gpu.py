"""Everything there is to measure on an NVIDIA GPU, in one command: every precision on TensorRT and ONNX Runtime (CUDA).

python tests/bench/gpu.py BUNDLE [--batches 1 4 8] [--backends tensorrt onnxruntime-cuda] [--out gpu.json]
python tests/bench/gpu.py BUNDLE --dry-run       # where there is no GPU: counts, and builds with TensorRT-RTX
python tests/bench/gpu.py BUNDLE --backends onnxruntime --peak-fp32 ... # peaks given: tries the script on a CPU

Per precision, backend and batch: milliseconds of the network alone, of the whole graph (so that the grouping's share
shows), and end to end from the decoded image; runs go through CUDA graphs where the backend has them. Operations and
bytes are counted from the graph, and set against the peaks of the device: those given with --peak-..., or what clock,
multiprocessors and memory bus tell. All of it in one run, the choices taking turns.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from cost import GraphCost, count_cost

from cl4wsis.bundle import Bundle, Precision, open_bundle
from cl4wsis.engines import check_cuda, cuda_runtime, find_machine, platform_name
from cl4wsis.errors import Cl4wsisError
from cl4wsis.images import read_image
from cl4wsis_export.engines import TENSORRT, TENSORRT_RTX, EngineSpec
from cl4wsis_export.from_bundle import add_engines
from cl4wsis_serve import Predictor
from cl4wsis_serve.backends import device_of

POSTS = ("host", "graph")
# Dense multiply-adds per multiprocessor and clock, from NVIDIA's architecture white papers, by compute capability.
MULTIPLY_ADDS = {
    "7.5": {"float32": 64, "float16": 512, "int8": 1024},
    "8.0": {"float32": 64, "float16": 1024, "int8": 2048},
    "8.6": {"float32": 128, "float16": 512, "int8": 1024},
    "8.9": {"float32": 128, "float16": 512, "int8": 1024},
    "9.0": {"float32": 128, "float16": 2048, "int8": 4096},
    "12.0": {"float32": 128, "float16": 512, "int8": 1024},
}


def device_peaks(options: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Return operations per second by precision, and bytes per second: as given, or as the device tells."""
    given = {"float32": options.peak_fp32, "float16": options.peak_fp16, "int8": options.peak_int8}
    if all(given.values()) and options.peak_bandwidth:
        return {name: value * 1e12 for name, value in given.items()}, options.peak_bandwidth * 1e9
    runtime, machine = cuda_runtime(), find_machine()

    def ask(name: str) -> int:
        attribute = getattr(runtime.cudaDeviceAttr, f"cudaDevAttr{name}")
        return int(check_cuda(runtime, runtime.cudaDeviceGetAttribute(attribute, 0), f"ask for {name}"))

    clock = 1e3 * ask("ClockRate") * ask("MultiProcessorCount")
    rates = MULTIPLY_ADDS.get(machine.compute_capability)
    bandwidth = 2 * 1e3 * ask("MemoryClockRate") * ask("GlobalMemoryBusWidth") / 8
    if rates is None or not clock or not bandwidth:
        sys.exit(f"the peaks of {machine.gpu} are not known here; give --peak-fp32, -fp16, -int8 and --peak-bandwidth")
    peaks = {name: value * 1e12 if value else 2 * rates[name] * clock for name, value in given.items()}
    return peaks, options.peak_bandwidth * 1e9 if options.peak_bandwidth else bandwidth


def count(bundle: Bundle, precisions: list[Precision], batches: list[int]) -> list[dict[str, Any]]:
    rows = []
    for precision in precisions:
        for batch in batches:
            network, whole = (costs(bundle, precision, post, batch) for post in POSTS)
            grouping = whole.other_bytes - network.other_bytes + whole.layer_bytes - network.layer_bytes
            rows.append(
                {
                    "precision": precision,
                    "batch": batch,
                    "GFLOP": sum(network.flops.values()) / 1e9,
                    "GFLOP by type": {name: flops / 1e9 for name, flops in network.flops.items()},
                    "layers MB": network.layer_bytes / 1e6,
                    "weights MB": network.weight_bytes / 1e6,
                    "other MB, unfused": network.other_bytes / 1e6,
                    "grouping MB, unfused": grouping / 1e6,
                }
            )
    return rows


def costs(bundle: Bundle, precision: Precision, post: str, batch: int) -> GraphCost:
    return count_cost(bundle.path_of(bundle.variant(precision, post)), batch)  # type: ignore[arg-type]


def build(bundle: Bundle, precisions: list[Precision], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Build what is to be measured; without a GPU, TensorRT-RTX builds the networks for the sake of the build."""
    library = TENSORRT_RTX if options.dry_run else TENSORRT
    targets = tuple(options.compute_capabilities) if options.dry_run else ()
    spec = EngineSpec(max_batch=max(options.batches), compute_capabilities=targets)
    rows = []
    for post in ("host",) if options.dry_run else POSTS:
        for precision in precisions:
            start = time.perf_counter()
            [engine] = add_engines(bundle.path, library, [precision], spec, in_cache=True, post=post)  # type: ignore[arg-type]
            rows.append(
                {
                    "precision": precision,
                    "post": post,
                    "runtime": engine.info.runtime,
                    "seconds": time.perf_counter() - start,
                    "MB": engine.path.stat().st_size / 1e6,
                    "layers": engine.info.types,
                }
            )
    return rows


def measure(bundle: Bundle, precisions: list[Precision], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every choice, one call each in turn, so that what else goes on hits all of them alike."""
    golden = [read_image(bundle.path / case.image) for case in bundle.manifest.golden]
    if not golden:
        sys.exit(f"{bundle.path}: holds no golden images to run; export it again")
    calls: dict[tuple[str, str, int, str], Callable[[], Any]] = {}
    for backend in options.backends:
        for precision in precisions:
            for post in POSTS:
                try:
                    predictor = Predictor.open(bundle.path, backend, precision, post)
                except Cl4wsisError as error:
                    print(f"skipped {backend}, {precision}, post={post}: {error}", file=sys.stderr)
                    continue
                for batch in options.batches:
                    images = [golden[index % len(golden)] for index in range(batch)]
                    frames = np.stack(images)
                    name = "network" if post == "host" else "graph"
                    calls[backend, precision, batch, name] = lambda p=predictor, f=frames: p.backend.run(f)
                    if post == "graph":
                        whole = (backend, precision, batch, "end to end")
                        calls[whole] = lambda p=predictor, i=images: p.predict_batch(i)
    times: dict[tuple[str, str, int, str], list[float]] = {key: [] for key in calls}
    for turn in range(options.warm_up + options.rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= options.warm_up:
                times[key].append(1e3 * (time.perf_counter() - start))
    return summarize(times, bundle, options)


def summarize(
    times: dict[tuple[str, str, int, str], list[float]], bundle: Bundle, options: argparse.Namespace
) -> list[dict[str, Any]]:
    peaks, bandwidth = device_peaks(options)
    rows = []
    for backend, precision, batch in sorted({key[:3] for key in times}):
        found = {key[3]: values for key, values in times.items() if key[:3] == (backend, precision, batch)}
        medians = {stage: statistics.median(values) for stage, values in found.items()}
        bound = 1e3 * costs(bundle, precision, "host", batch).roofline_seconds(peaks, bandwidth)  # type: ignore[arg-type]
        row: dict[str, Any] = {"backend": backend, "precision": precision, "batch": batch, "roofline ms": bound}
        row |= {f"{stage} ms": value for stage, value in medians.items()}
        row |= {f"{stage} p95 ms": float(np.percentile(values, 95)) for stage, values in found.items()}
        if {"network", "graph"} <= medians.keys():
            row["grouping share"] = 1 - medians["network"] / medians["graph"]
        if "network" in medians:
            row["times roofline"] = medians["network"] / bound
        if "end to end" in medians:
            row["images/s"] = 1e3 * batch / medians["end to end"]
        rows.append(row)
    return rows


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n## {title}\n")
    if not rows:
        print("nothing")
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        values = (row.get(name, "-") for name in columns)
        print(f"| {' | '.join(f'{value:.4g}' if isinstance(value, float) else str(value) for value in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--backends", nargs="+", default=["tensorrt", "onnxruntime-cuda"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--compute-capabilities", nargs="+", default=["8.6"], help="for --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="count and build with TensorRT-RTX, measure nothing")
    for name in ("fp32", "fp16", "int8"):
        parser.add_argument(f"--peak-{name}", type=float, help="10^12 operations per second of the device")
    parser.add_argument("--peak-bandwidth", type=float, help="GB/s of the device")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    precisions = list(dict.fromkeys(variant.precision for variant in bundle.manifest.variants))
    on_gpu = not options.dry_run and any(device_of(name) == "cuda" for name in options.backends)
    machine = vars(find_machine()) if on_gpu else {"gpu": None, "platform": platform_name()}
    print(f"{bundle.manifest.name}, {', '.join(map(str, machine.values()))}, load {os.getloadavg()[0]:.1f}")
    tables = {"Counted from the graphs": count(bundle, precisions, options.batches)}
    print_rows(*next(iter(tables.items())))
    if options.dry_run or "tensorrt" in options.backends:
        tables["Engines"] = build(bundle, precisions, options)
        print_rows("Engines", tables["Engines"])
    if options.dry_run:
        choices = [(b, p, n) for b in options.backends for p in precisions for n in options.batches]
        print(f"\nOn a GPU, {options.rounds} rounds of these would be measured, with {', '.join(POSTS)} grouping:")
        print("\n".join(f"- {backend}, {precision}, batch {batch}" for backend, precision, batch in choices))
    else:
        tables["Measured"] = measure(bundle, precisions, options)
        print_rows("Measured", tables["Measured"])
    if options.out is not None:
        options.out.write_text(json.dumps({"machine": machine, **tables}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
