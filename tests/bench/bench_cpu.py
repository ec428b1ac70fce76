"""From the decoded image to instances on the CPU, against the eager PyTorch network alone; prints Markdown.

python tests/bench/bench_cpu.py [--encoders tf_efficientnet_lite0 resnet50] [--posts host] [--rounds 20] [--bundles DIR]

All rows of an encoder have the same random weights and take turns in one process: 512x512 px, batch 1, 20 classes.
*eager* is the Segmenter in PyTorch, from a uint8 tensor to its three maps, without any post-processing. The other rows
run ``Predictor.predict``: fitting, network, grouping, restoring. Nobody trained these weights, so with ``post`` = host
the maps are replaced, after the network has run, by those of a drawn scene with ten instances; the cost of the grouping
in a graph does not depend on what it sees.

*CPU* is the processor time of all threads: it means much the same on a machine that is shared with others, where
elapsed times do not. So that it counts work and not waiting, threads of PyTorch sleep between operators, as those of
the runtimes do here. All models of an encoder are in memory at once: a large encoder with all its graphs needs 16 GB,
``--posts host`` a fraction. A bundle that ``--bundles`` already holds is used as it is.
"""

import argparse
import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded

import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import NetworkScene, network_scene

from cl4wsis.bundle import open_bundle
from cl4wsis.checks import Limits
from cl4wsis.errors import Cl4wsisError
from cl4wsis.grouping import GroupingSpec, group_maps
from cl4wsis.recipe import NetworkSettings
from cl4wsis.steps import ClassInfo, InputRule, StepInfo
from cl4wsis.tasks import class_color, load_plan
from cl4wsis_export import ExportSpec, export_network
from cl4wsis_serve import Predictor, backend_status
from cl4wsis_serve.backends.base import MAP_NAMES, Backend, Outputs
from cl4wsis_train.models.network import InstanceSegmenter

SIZE = (512, 512)
CLASS_COUNTS = (15, 5)
NUM_INSTANCES = 10
PRECISIONS = ("float32", "float16", "int8")
BACKENDS = ("onnxruntime", "openvino")
_PAUSE_SECONDS = 0.05  # between two rows: threads that spin while they wait for work must not slow down the next one


@dataclass
class Row:
    """One way to the answer, and what each round of it cost in seconds."""

    name: tuple[str, str, str]
    call: Callable[[], tuple[float, float]]
    """Runs once; returns what came after the network: seconds elapsed, and of the processor."""
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    post: list[float] = field(default_factory=list)
    post_cpu: list[float] = field(default_factory=list)

    def measure(self, counts: bool) -> None:
        time.sleep(_PAUSE_SECONDS)
        wall, cpu = time.perf_counter(), time.process_time()
        post, post_cpu = self.call()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if counts:
            self.wall.append(wall)
            self.cpu.append(cpu)
            self.post.append(post)
            self.post_cpu.append(post_cpu)


class DrawnMaps:
    """Runs a graph, keeps the time, and answers with the maps of a drawn scene where the host is to group them."""

    def __init__(self, backend: Backend, scene: NetworkScene, post: str) -> None:
        self._backend = backend
        self._maps: Outputs | None = None
        if post == "host":
            self._maps = {name: getattr(scene, name)[None] for name in MAP_NAMES}
            real = backend.run(np.zeros((1, *SIZE, 3), np.uint8))
            for name, maps in self._maps.items():  # in memory as the backend has them
                self._maps[name] = np.empty_like(real[name])
                self._maps[name][:] = maps
        self.ended = self.ended_cpu = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, images: NDArray[np.uint8]) -> Outputs:
        outputs = self._backend.run(images)
        self.ended, self.ended_cpu = time.perf_counter(), time.process_time()
        return outputs if self._maps is None else self._maps


def drawn_scene() -> NetworkScene:
    """Draw a scene in which just ten instances are found."""
    for seed in range(100):
        scene = network_scene(seed, sum(CLASS_COUNTS), *SIZE, num_instances=NUM_INSTANCES + 1)
        found = group_maps(scene.semantic_logits, scene.center_heatmap, scene.offset_map, SIZE, GroupingSpec())
        if len(found) == NUM_INSTANCES:
            return scene
    raise RuntimeError(f"no scene of 100 has {NUM_INSTANCES} instances")


def build_network(encoder: str) -> InstanceSegmenter:
    torch.manual_seed(0)
    network = InstanceSegmenter(NetworkSettings(encoder=encoder, weights="none"), CLASS_COUNTS).eval()
    with torch.no_grad():
        for head in network.semantic_branch.classifier.parameters():
            head.mul_(20)  # untrained logits are so flat that one class would fill the image
    return network


def export_bundle(network: InstanceSegmenter, folder: Path) -> Path:
    """Export with checks so loose that any precision passes: answers of random weights say nothing."""
    encoder = network.settings.encoder
    destination = folder / f"{encoder}.cl4wsis"
    if destination.exists():
        return destination
    plan = load_plan("shapes", [f"recipe.input_size=[{SIZE[0]}, {SIZE[1]}]", f"recipe.network.encoder={encoder}"])
    names = [f"class {number}" for number in range(network.num_classes)]
    info = StepInfo(
        plan=plan,
        step=1,
        classes=tuple(ClassInfo(name=name, step_added=0, color=class_color(i)) for i, name in enumerate(names)),
        class_counts=CLASS_COUNTS,
        network=network.settings,
        input=InputRule(size=SIZE, mean=network.mean, std=network.std),
        weights_sha256="0" * 64,
        parent_sha256=None,
        seconds={},
    )
    anything = Limits(golden_pixels=1, differing_pixels=1, matched=0, mask_iou=0)
    spec = ExportSpec(
        grouping=GroupingSpec(),
        verification_images=1,
        precision_images=1,
        calibration_images=2,
        golden_images=0,
        precisions=PRECISIONS,
        limits=dict.fromkeys(PRECISIONS, anything),
    )
    return export_network(network, info, destination, spec)


def eager_row(network: InstanceSegmenter, image: NDArray[np.uint8]) -> Row:
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()

    @torch.inference_mode()
    def call() -> tuple[float, float]:
        network(network.normalize(planes))
        return 0.0, 0.0

    return Row(("PyTorch, network alone", "float32", "none"), call)


def predictor_row(predictor: Predictor, scene: NetworkScene, image: NDArray[np.uint8]) -> Row:
    backend = predictor.backend
    timed = DrawnMaps(backend, scene, predictor.post)
    predictor.backend = timed

    def call() -> tuple[float, float]:
        predictor.predict(image)
        return time.perf_counter() - timed.ended, time.process_time() - timed.ended_cpu

    arithmetic = getattr(backend, "arithmetic", "")
    half = f" ({arithmetic})" if predictor.precision == "float16" and arithmetic else ""
    return Row((backend.name, predictor.precision + half, predictor.post), call)


def open_rows(path: Path, scene: NetworkScene, image: NDArray[np.uint8], posts: list[str], threads: int) -> list[Row]:
    rows = []
    ready = [name for name, reason in backend_status().items() if reason is None and name in BACKENDS]
    variants = [variant for variant in open_bundle(path).manifest.variants if variant.post in posts]
    for variant in variants:
        for name in ready:
            try:
                predictor = Predictor.open(path, name, precision=variant.precision, post=variant.post, threads=threads)
            except Cl4wsisError as error:
                print(f"left out: {name}, {variant.precision}, {variant.post}: {error}", file=sys.stderr)
                continue
            rows.append(predictor_row(predictor, scene, image))
    return rows


def measure(encoder: str, folder: Path, posts: list[str], threads: int, rounds: int) -> list[Row]:
    network = build_network(encoder)
    path = export_bundle(network, folder)
    gc.collect()
    scene = drawn_scene()
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    rows = [eager_row(network, image), *open_rows(path, scene, image, posts, threads)]
    gc.disable()
    for number in range(rounds + 2):
        for row in rows:
            row.measure(counts=number >= 2)
    gc.enable()
    return rows


def print_table(encoder: str, rows: list[Row]) -> None:
    eager = rows[0]
    print(f"\n### {encoder}\n")
    columns = ("p50 ms", "p95 ms", "of eager", "CPU ms", "of eager", "post ms", "share", "post CPU ms", "share")
    print(f"| backend | precision | post | {' | '.join(columns)} |")
    print(f"| --- | --- | --- |{' ---: |' * len(columns)}")
    for row in rows:
        p50, p95 = np.percentile(row.wall, (50, 95)) * 1000
        cpu, post, post_cpu = (1000 * float(np.median(values)) for values in (row.cpu, row.post, row.post_cpu))
        ratio = float(np.median(np.array(row.wall) / np.array(eager.wall)))  # of the same round: load changes slowly
        cpu_ratio = float(np.median(row.cpu) / np.median(eager.cpu))
        share = float(np.median(np.array(row.post) / np.array(row.wall)))
        print(
            f"| {' | '.join(row.name)} | {p50:.1f} | {p95:.1f} | {ratio:.2f} | {cpu:.1f} | {cpu_ratio:.2f} | "
            f"{post:.1f} | {share:.1%} | {post_cpu:.1f} | {post_cpu / cpu:.1%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", nargs="+", default=["tf_efficientnet_lite0", "resnet50"])
    parser.add_argument("--posts", nargs="+", choices=["graph", "host"], default=["graph", "host"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--bundles", type=Path, help="folder in which exported bundles are kept for the next run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before; "
        f"{SIZE[1]}x{SIZE[0]} px, batch 1, {options.threads} threads, {options.rounds} rounds, "
        f"torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.bundles or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for encoder in options.encoders:
            print_table(encoder, measure(encoder, folder, options.posts, options.threads, options.rounds))
    if hasattr(os, "getloadavg"):
        print(f"\nload {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
