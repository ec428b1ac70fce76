"""Time of target encoding, synthesis and self-refinement per crop. Run by hand: python tests/bench/bench_pseudo.py.

One crop holds ten ellipses of two tagged classes, some of them touching, and heatmaps and offsets with some noise, as a
partly trained instance branch gives them.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from cl4wsis.recipe import PeakSettings, RefineSettings
from cl4wsis.tasks import ClassSplit
from cl4wsis_train.data.targets import encode_instance_targets
from cl4wsis_train.models.affinity import PixelAdaptiveRefinement
from cl4wsis_train.pseudo.instance import find_peaks, semantic_map_from_logits, synthesize_targets
from cl4wsis_train.pseudo.refine import merge_targets, refine_targets


def draw_instances(size: int, count: int, split: ClassSplit, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (H, W) and labels (N,) of ellipses of two new classes, on a jittered grid."""
    tagged = rng.choice(np.arange(split.num_old_classes, split.num_classes), 2, replace=False)
    ids = np.zeros((size, size), dtype=np.int32)
    rows, columns = np.mgrid[:size, :size]
    grid = int(np.ceil(np.sqrt(count)))
    for index in range(count):
        cell = size / grid
        center = (np.array(divmod(index, grid)) + 0.5 + rng.uniform(-0.2, 0.2, 2)) * cell
        axes = rng.uniform(0.3, 0.55, 2) * cell
        ids[((rows - center[0]) / axes[0]) ** 2 + ((columns - center[1]) / axes[1]) ** 2 < 1] = index + 1
    return ids, tagged[rng.integers(0, 2, count)]


def measure(name: str, function: Callable[[], object], repeats: int) -> float:
    """Print best time, median and 95th percentile in milliseconds; return the median."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    median, late = np.percentile(times, (50, 95))
    print(f"{name:<28} best {min(times):7.2f} ms   p50 {median:7.2f} ms   p95 {late:7.2f} ms")
    return float(median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--instances", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size, scale = arguments.size, arguments.size / 512
    split = ClassSplit(
        step=1, old_names=tuple(f"old{i}" for i in range(15)), new_names=tuple(f"new{i}" for i in range(5))
    )
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    ids, labels = (torch.from_numpy(array)[None] for array in draw_instances(size, arguments.instances, split, rng))
    image_labels = torch.zeros(1, split.num_classes).index_fill_(1, labels.unique(), 1.0)

    # Maps of a network that is nearly right.
    encoded = encode_instance_targets(ids, labels, split.num_classes, 6 * scale)
    grid = size // 16
    classes = F.pad(labels + 1, (1, 0)).gather(1, ids.long().flatten(1)).view_as(ids)
    logits = 6 * F.one_hot(classes[:, 8::16, 8::16], split.num_classes + 1).permute(0, 3, 1, 2).float()
    logits = logits + 0.5 * torch.randn_like(logits)
    activation = F.one_hot(classes, split.num_classes + 1).permute(0, 3, 1, 2)[:, split.semantic_new].float()
    activation = F.adaptive_avg_pool2d(activation, grid)
    activation = activation / activation.amax((2, 3), keepdim=True).clamp(min=1e-5)
    heatmap = 0.9 * encoded.center_target + 0.02 * torch.rand_like(encoded.center_target)
    offsets = encoded.offset_target + 2.0 * torch.randn_like(encoded.offset_target)

    shape = (size, size)
    peak_settings, refine_settings, sigma = PeakSettings(), RefineSettings(), 6 * scale
    semantic = semantic_map_from_logits(logits, logits.flip(3), image_labels, split, shape)
    peaks = find_peaks(activation, image_labels, split, peak_settings, shape, scale)
    arguments_of_synthesis = (semantic.semantic_map, peaks, image_labels, split, peak_settings, scale, sigma)
    synthesized = synthesize_targets(*arguments_of_synthesis)
    probs, regions = semantic.new_class_probs, synthesized.regions
    arguments_of_refinement = (heatmap, offsets, probs, regions, split, refine_settings, scale, sigma)
    refined = refine_targets(*arguments_of_refinement)
    print(
        f"{size} px, {arguments.instances} instances, {len(regions)} regions, "
        f"{int(synthesized.num_isolated[0])} isolated, {len(peaks.labels)} peaks, "
        f"{len(regions.pixels) / size**2:.0%} of pixels, one thread"
    )

    measure(
        "encode (masks, step 0)",
        lambda: encode_instance_targets(ids, labels, split.num_classes, 8 * scale),
        arguments.repeats,
    )
    total = [
        measure(
            "semantic map",
            lambda: semantic_map_from_logits(logits, logits.flip(3), image_labels, split, shape),
            arguments.repeats,
        ),
        measure(
            "peaks",
            lambda: find_peaks(activation, image_labels, split, peak_settings, shape, scale),
            arguments.repeats,
        ),
        measure("isolated instances", lambda: synthesize_targets(*arguments_of_synthesis), arguments.repeats),
        measure("self-refinement", lambda: refine_targets(*arguments_of_refinement), arguments.repeats),
        measure("merge", lambda: merge_targets(synthesized.targets, refined), arguments.repeats),
    ]
    print(f"{'phase 2, sum':<28} {'':15}   p50 {sum(total):7.2f} ms")
    refinement = PixelAdaptiveRefinement()
    images = torch.rand(1, 3, size, size)
    for side in (grid, size // 4):
        maps = torch.rand(1, 3, side, side)
        measure(f"PAMR, 3 channels at {side}x{side}", lambda maps=maps: refinement(images, maps), arguments.repeats)


if __name__ == "__main__":
    main()
