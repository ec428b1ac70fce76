"""What TensorRT needs of a machine, and the cache of its measurements.

TensorRT builds for the GPU at hand: an engine is made on the machine that runs it, from a bundle, without torch.
"""

import logging
import re
from pathlib import Path
from typing import Any

from cl4wsis.engines import CACHE_VARIABLE, Machine, cache_folder, find_machine
from cl4wsis.errors import BackendError, DataError, MissingExtraError
from cl4wsis.images import write_bytes_atomically
from cl4wsis_export.engines import TENSORRT, EngineSpec, load_library

logger = logging.getLogger(__name__)


def require_tensorrt(input_size: tuple[int, int], spec: EngineSpec) -> tuple[Any, Machine]:
    """Return TensorRT and this machine, or say in one sentence all that is missing and what to do instead.

    Args:
        input_size: (height, width) of the network input, px.
        spec: settings of the build, for the command that does it elsewhere.

    Raises:
        BackendError: TensorRT is not installed, too old or cannot be loaded, or CUDA finds no GPU.
    """
    missing = []
    trt = machine = None
    try:
        trt = load_library(TENSORRT)
    except (MissingExtraError, BackendError) as error:
        missing.append(str(error).replace("this needs tensorrt, which", "tensorrt"))
    try:
        machine = find_machine()
    except BackendError as error:
        missing.append(f"TensorRT builds only for the GPU at hand, and none is usable: {error}")
    if trt is not None and machine is not None:
        return trt, machine
    raise BackendError(
        f"cannot build a TensorRT engine: {'; '.join(missing)}. Export with --format onnx (runs with ONNX Runtime on "
        "CPU and GPU) or --format trt-rtx (engines for RTX GPUs, built on any machine), and on the GPU's machine run "
        f"'cl4wsis export --format trt --from BUNDLE', or, without cl4wsis: {trtexec_command(input_size, spec)}"
    )


def trtexec_command(input_size: tuple[int, int], spec: EngineSpec) -> str:
    """Return the command line of TensorRT's own tool that builds such an engine; it is only ever shown."""
    frame = "x".join(map(str, (*input_size, 3)))
    shapes = " ".join(
        f"--{kind}Shapes=images:{batch}x{frame}"
        for kind, batch in (("min", spec.min_batch), ("opt", spec.opt_batch), ("max", spec.max_batch))
    )
    return f"trtexec --onnx=model.onnx {shapes} --stronglyTyped --saveEngine=model.engine"


def timing_cache_path(version: str, machine: Machine) -> Path:
    """Return where the measurements of builds on this machine lie: times are of one GPU and one TensorRT."""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine.gpu.lower()).strip("-")
    return cache_folder() / "timing" / f"tensorrt-{version}-{gpu}.cache"


def read_timing_cache(path: Path) -> bytes | None:
    """Read the measurements of earlier builds; none if there are none."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write_timing_cache(path: Path, content: bytes) -> None:
    """Write the measurements for the next build; where that fails, the engine of this one is not lost to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(path, content)
    except (OSError, DataError) as error:
        logger.warning("the next build will measure again: %s; set %s to another folder", error, CACHE_VARIABLE)
