"""TensorRT-RTX engines within an export: built ahead of time on the CPU, before the bundle is written."""

import logging
from collections.abc import Iterable
from hashlib import sha256

from cl4wsis.bundle import EngineInfo, VariantInfo
from cl4wsis.engines import Machine, name_engine, platform_name, trust_engine
from cl4wsis_export.engines import TENSORRT_RTX, EngineSpec, build_engine, describe_engine, load_library

logger = logging.getLogger(__name__)

DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


def rtx_version() -> str:
    """Return the version of TensorRT-RTX.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed but cannot be loaded.
    """
    version: str = load_library(TENSORRT_RTX).__version__
    return version


def build_rtx_engines(
    graphs: Iterable[tuple[VariantInfo, bytes]], spec: EngineSpec
) -> tuple[tuple[EngineInfo, ...], dict[str, bytes]]:
    """Build one engine per graph, each for all compute capabilities; this user will trust them.

    Args:
        graphs: descriptions and contents of graphs that hold their weights themselves.
        spec: settings of the build.

    Returns:
        Descriptions of the engines, and their contents by path within the bundle.

    Raises:
        ConfigError: TensorRT-RTX knows no such compute capability.
        MissingExtraError: TensorRT-RTX is not installed.
        BackendError: TensorRT-RTX cannot be loaded, does not accept a graph, or did not honour its precision.
    """
    trt = load_library(TENSORRT_RTX)
    machine = Machine(None, None, None, platform_name())
    infos, files = [], {}
    for variant, content in graphs:
        capabilities = ", ".join(spec.compute_capabilities)
        logger.info("building a TensorRT-RTX engine of %s for compute capability %s", variant.file, capabilities)
        info = describe_engine(TENSORRT_RTX, trt, sha256(content).hexdigest(), spec, machine)
        built = build_engine(TENSORRT_RTX, trt, content, spec, variant.types)
        digest = sha256(built.content).hexdigest()
        named = info.model_copy(update={"types": built.types})
        named = named.model_copy(update={"file": f"engines/{name_engine(named, digest)}"})
        trust_engine(digest)
        infos.append(named)
        files[named.file] = built.content
    return tuple(infos), files
