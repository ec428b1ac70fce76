"""Engines as a cache: where they lie, for which machine they are, and whether this machine may load one.

An engine is compiled code. It runs where it was built for and nowhere else, and loading one is running a program: so it
is looked up by what it was built from and for, and loaded only if this user built it (a record of its hash lies in the
user's cache folder) or trusts it by name (``CL4WSIS_TRUST_ENGINES``). Machines exchange graphs, not engines.

Engines lie in ``engines/`` of a bundle and are listed in its manifest, or in the user's cache folder where the bundle
is a lone graph or may not be written.
"""

import json
import os
import platform
import re
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cl4wsis.bundle import PRECISION_OPTIONS, Bundle, EngineInfo, Manifest, VariantInfo, update_manifest
from cl4wsis.config import Settings
from cl4wsis.errors import BackendError, BundleError
from cl4wsis.steps import file_sha256, write_text_atomically

TRUST_VARIABLE = "CL4WSIS_TRUST_ENGINES"
"""Environment variable that holds SHA-256 values of engines to trust, separated by commas, or ``all``."""
CACHE_VARIABLE = "CL4WSIS_CACHE"
"""Environment variable that names another cache folder."""

FORMATS = {"tensorrt": "trt", "tensorrt-rtx": "trt-rtx"}
"""How ``cl4wsis export --format`` spells a runtime."""
_SLOWEST_WRITE = 600
"""Seconds after which a file that is being written is taken for a leftover."""


class EngineMissingError(BackendError):
    """No engine of the graph fits this machine; one can be built, and other backends need none."""


@dataclass(frozen=True)
class Machine:
    """What an engine depends on beside the runtime.

    Attributes:
        gpu: name of the GPU.
        compute_capability: of the GPU, such as ``8.6``.
        driver: version of its driver.
        platform: operating system and processor, such as ``linux-x86_64``.
    """

    gpu: str
    compute_capability: str
    driver: str
    platform: str


@dataclass(frozen=True)
class FoundEngine:
    """An engine that fits.

    Attributes:
        info: what it is.
        path: of its file.
        sha256: of its contents; the file had it when the engine was listed.
    """

    info: EngineInfo
    path: Path
    sha256: str

    def read(self) -> bytes:
        """Read the engine.

        Raises:
            BackendError: the file is missing, cut short or changed.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise BackendError(f"{self.path}: cannot be read: {error.strerror}; build the engine again") from error
        if sha256(content).hexdigest() != self.sha256:
            raise BackendError(
                f"{self.path}: is damaged or changed ({len(content)} bytes, its SHA-256 is not the one recorded when "
                "it was built); delete it and build the engine again"
            )
        return content


class _CachedEngine(Settings):
    """What lies beside an engine in the user's cache folder."""

    info: EngineInfo
    sha256: str


def find_machine() -> Machine:
    """Describe this machine, with the GPU that CUDA would use first.

    Raises:
        BackendError: cuda-python is missing, or CUDA finds no GPU; the message says why.
    """
    gpu, capability = _first_gpu()
    return Machine(gpu, capability, _driver_version(), platform_name())


def platform_name() -> str:
    """Return operating system and processor, such as ``linux-x86_64``: an engine for one does not load on another."""
    return f"{sys.platform}-{platform.machine().lower()}"


def cuda_runtime() -> Any:
    """Return the module of the CUDA runtime from cuda-python.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"cuda-python cannot be imported ({error}); run: pip install 'cl4wsis[trt]' on a machine with an NVIDIA GPU"
        ) from error
    return runtime


def check_cuda(runtime: Any, result: tuple[Any, ...], doing: str) -> Any:
    """Return what a call of the CUDA runtime gave beside its error code.

    Args:
        runtime: the module.
        result: of the call; the error code first.
        doing: what the call was for, for the message.

    Raises:
        BackendError: the call failed.
    """
    code, *values = result
    if int(code) != 0:
        text = runtime.cudaGetErrorString(code)[1].decode()
        way_out = (
            "use a smaller batch or another GPU, or close what else uses it"
            if int(code) == int(runtime.cudaError_t.cudaErrorMemoryAllocation)
            else "check the driver with nvidia-smi"
        )
        raise BackendError(f"CUDA failed to {doing}: {text} ({int(code)}); {way_out}")
    return values[0] if len(values) == 1 else tuple(values)


def cache_folder() -> Path:
    """Return the folder for what can be made again: that of the operating system, or the one the variable names."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cl4wsis"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cl4wsis"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cl4wsis"


def engine_key(info: EngineInfo) -> str:
    """Hash everything an engine depends on: runtime, machine, graph and settings of the build."""
    content = info.model_dump(mode="json", exclude={"file", "types"})
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def graph_sha256(bundle: Bundle, variant: VariantInfo) -> str:
    """Return the SHA-256 of a graph's file."""
    return bundle.manifest.files.get(variant.file) or file_sha256(bundle.path_of(variant))


def add_engine(bundle: Bundle, info: EngineInfo, content: bytes, in_cache: bool = False) -> FoundEngine:
    """Put an engine that was just built into its bundle, or into the user's cache folder, and trust it from now on.

    Readers see the bundle without the engine, or with it. An older engine with the same key is replaced.

    Args:
        bundle: an opened bundle.
        info: what was built; its file is named here.
        content: the engine.
        in_cache: leave the bundle as it is; so it is with a lone graph always.

    Raises:
        BundleError: the bundle cannot be written; the message says what to do.
        BackendError: the cache folder cannot be written.
    """
    digest = sha256(content).hexdigest()
    name = name_engine(info, digest)
    trust_engine(digest)
    if in_cache or not bundle.path.is_dir():
        return _add_to_cache(info, name, content, digest)
    return _add_to_bundle(bundle, info.model_copy(update={"file": f"engines/{name}"}), content, digest)


def name_engine(info: EngineInfo, digest: str) -> str:
    """Return the name of an engine's file, which tells runtime, GPU, key and contents apart.

    Args:
        info: of the engine.
        digest: SHA-256 of its contents.
    """
    name, version = info.runtime.split()
    capabilities = "-".join(capability.replace(".", "") for capability in info.compute_capabilities)
    return f"{name}-{version}-sm{capabilities}-{engine_key(info)[:8]}-{digest[:8]}.engine"


def trust_engine(digest: str) -> None:
    """Remember that this user has built an engine, so that it may be loaded.

    Args:
        digest: its SHA-256.

    Raises:
        BackendError: the cache folder cannot be written.
    """
    try:
        _records().mkdir(parents=True, exist_ok=True)
        (_records() / digest).touch()
    except OSError as error:
        raise _unwritable(error) from error


def engine_at(bundle: Bundle, path: Path) -> FoundEngine:
    """Return the engine of a bundle that lies in a file.

    Raises:
        BundleError: the bundle lists no such engine.
    """
    for info in bundle.manifest.engines:
        if (bundle.path / info.file).resolve() == path.resolve():
            return FoundEngine(info, bundle.path / info.file, bundle.manifest.files[info.file])
    held = ", ".join(str(bundle.path / info.file) for info in bundle.manifest.engines) or "none"
    raise BundleError(f"{path}: is no engine of {bundle.path}; its engines are: {held}")


def find_built(bundle: Bundle, info: EngineInfo) -> FoundEngine | None:
    """Return the engine with the key of this one, if it was built before and is still as it was."""
    for found in _engines(bundle):
        if engine_key(found.info) == engine_key(info) and is_trusted(found.sha256) and _is_whole(found):
            return found
    return None


def find_engine(bundle: Bundle, variant: VariantInfo, runtime: str, version: str, machine: Machine) -> FoundEngine:
    """Find the engine of a graph that fits this machine.

    Args:
        bundle: an opened bundle.
        variant: the graph.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the runtime.
        machine: this one.

    Raises:
        EngineMissingError: there is none; the message says what keeps each of those there are from being used.
    """
    digest = graph_sha256(bundle, variant)
    reasons = []
    for found in _engines(bundle):
        if found.info.graph_sha256 != digest or found.info.runtime.split()[0] != runtime:
            continue
        reason = why_unfit(found.info, version, machine) or _why_untrusted(found)
        if reason is None:
            return found
        reasons.append(f"{found.path.name} {reason}")
    command = f"cl4wsis export --format {FORMATS[runtime]} --from {bundle.path}"
    command += "" if variant.precision == "float32" else f" --precision {PRECISION_OPTIONS[variant.precision]}"
    if runtime == "tensorrt-rtx":
        command += f" --compute-capability {machine.compute_capability}"
    held = "; ".join(reasons) or f"none was built of its {variant.precision} graph with post={variant.post}"
    way_out = f"build one here: {command}" if variant.post == "graph" else "engines hold the grouping: use --post graph"
    raise EngineMissingError(f"{bundle.path}: no {runtime} engine fits this machine: {held}; {way_out}")


def why_unfit(info: EngineInfo, version: str, machine: Machine) -> str | None:
    """Say what keeps an engine from running with a runtime of this version on this machine; nothing where it can.

    Args:
        info: of the engine.
        version: of the runtime that is installed.
        machine: this one.
    """
    name, built = info.runtime.split()
    title = "TensorRT" if name == "tensorrt" else "TensorRT-RTX"
    if built != version and not (info.version_compatible and _numbers(built) <= _numbers(version)):
        return f"was built by {title} {built}, but {version} is installed"
    if info.platform and info.platform != machine.platform:
        return f"was built on {info.platform}, but this is {machine.platform}"
    if name == "tensorrt-rtx":
        if machine.compute_capability not in info.compute_capabilities:
            known = ", ".join(info.compute_capabilities)
            return f"is for compute capability {known}, but {machine.gpu} has {machine.compute_capability}"
        return None
    if info.driver != machine.driver:
        return f"was built with driver {info.driver}, but {machine.driver} is installed"
    return _why_other_gpu(info, machine)


def is_trusted(digest: str) -> bool:
    """Tell whether this user built an engine, or says by an environment variable that it may be loaded.

    Args:
        digest: its SHA-256.
    """
    named = {part.strip() for part in os.environ.get(TRUST_VARIABLE, "").split(",")}
    return digest in named or "all" in named or (_records() / digest).is_file()


def _first_gpu() -> tuple[str, str]:
    runtime = cuda_runtime()
    count = check_cuda(runtime, runtime.cudaGetDeviceCount(), "look for a GPU")
    if not count:
        raise BackendError("CUDA finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    properties = check_cuda(runtime, runtime.cudaGetDeviceProperties(0), "ask what the GPU is")
    return properties.name.decode().rstrip("\0"), f"{properties.major}.{properties.minor}"


def _driver_version() -> str:
    """Return the driver's own version where it tells it, and the CUDA version that it supports."""
    runtime = cuda_runtime()
    number = int(check_cuda(runtime, runtime.cudaDriverGetVersion(), "ask for the driver's version"))
    supported = f"CUDA {number // 1000}.{number % 1000 // 10}"
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return supported
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return f"{match[1]} ({supported})" if match else supported


def _why_other_gpu(info: EngineInfo, machine: Machine) -> str | None:
    if info.hardware_level == "ampere-plus":
        if _numbers(machine.compute_capability) >= (8, 0):
            return None
        return f"is for GPUs from Ampere on, but {machine.gpu} has compute capability {machine.compute_capability}"
    if info.hardware_level == "same-compute-capability":
        if machine.compute_capability in info.compute_capabilities:
            return None
        known = ", ".join(info.compute_capabilities)
        return f"is for compute capability {known}, but {machine.gpu} has {machine.compute_capability}"
    return None if info.gpu == machine.gpu else f"was built on {info.gpu}, but this machine has {machine.gpu}"


def _why_untrusted(found: FoundEngine) -> str | None:
    if is_trusted(found.sha256):
        return None
    return (
        "was not built by this user, and loading an engine runs its code (if you trust where it comes from, set "
        f"{TRUST_VARIABLE}={found.sha256})"
    )


def _engines(bundle: Bundle) -> Iterator[FoundEngine]:
    """Yield the engines of a bundle, then those of the user's cache folder."""
    for info in bundle.manifest.engines:
        yield FoundEngine(info, bundle.path / info.file, bundle.manifest.files[info.file])
    for path in sorted(_cache().glob("*.json")):
        try:
            entry = _CachedEngine.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            continue  # an entry of another version of cl4wsis: the engine is built again
        yield FoundEngine(entry.info, path.parent / entry.info.file, entry.sha256)


def _is_whole(found: FoundEngine) -> bool:
    return found.path.is_file() and file_sha256(found.path) == found.sha256


def _add_to_cache(info: EngineInfo, name: str, content: bytes, digest: str) -> FoundEngine:
    folder = _cache()
    named = info.model_copy(update={"file": name})
    entry = _CachedEngine(info=named, sha256=digest)
    old = [found for found in _cached_with_key(engine_key(info)) if found.path.name != name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / name, content)
        write_text_atomically(folder / f"{engine_key(info)}.json", entry.model_dump_json(indent=1) + "\n")
        for found in old:
            found.path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    return FoundEngine(named, folder / name, digest)


def _cached_with_key(key: str) -> list[FoundEngine]:
    path = _cache() / f"{key}.json"
    try:
        entry = _CachedEngine.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [FoundEngine(entry.info, path.parent / entry.info.file, entry.sha256)]


def _add_to_bundle(bundle: Bundle, info: EngineInfo, content: bytes, digest: str) -> FoundEngine:
    path = bundle.path / info.file
    try:
        path.parent.mkdir(exist_ok=True)
        _write_atomically(path, content)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written: {error.strerror}; pass --engine-cache to put the engine into {cache_folder()}"
        ) from error
    replaced: list[str] = []

    def add(current: Manifest) -> dict[str, Any]:
        if info.graph_sha256 not in current.files.values():
            path.unlink(missing_ok=True)
            raise BundleError(
                f"{bundle.path}: was exported again while the engine was built, which is of the graph before; build it "
                "again"
            )
        same = [other for other in current.engines if engine_key(other) == engine_key(info) and other.file != info.file]
        replaced.extend(other.file for other in same)
        kept = [other for other in current.engines if other not in same and other.file != info.file]
        files = {name: value for name, value in current.files.items() if name not in replaced}
        return {"engines": (*kept, info), "files": {**files, info.file: digest}}

    update_manifest(bundle, add)
    for file in replaced:
        (bundle.path / file).unlink(missing_ok=True)
    return FoundEngine(info, path, digest)


def _cache() -> Path:
    return cache_folder() / "engines"


def _records() -> Path:
    return _cache() / "built"


def _unwritable(error: OSError) -> BackendError:
    return BackendError(
        f"{cache_folder()}: cannot be written: {error.strerror}; set {CACHE_VARIABLE} to a folder that can"
    )


def _write_atomically(path: Path, content: bytes) -> None:
    """Write an engine so that it is there complete or not at all; what a killed build of it left is removed."""
    for leftover in path.parent.glob(f".{path.name.rpartition('-')[0]}-*.tmp"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _SLOWEST_WRITE:  # else another process may be writing it
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
