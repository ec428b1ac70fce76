"""Building engines: what is built, what is read back from it, and what is said when it cannot be."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import write_color_bundle
from typed import TYPES, typed_model, write_typed_bundle

from cl4wsis.bundle import open_bundle
from cl4wsis.engines import CACHE_VARIABLE, Machine, add_engine, find_built, is_trusted
from cl4wsis.errors import BackendError, BundleError, ConfigError
from cl4wsis_export.engines import (
    TENSORRT,
    TENSORRT_RTX,
    EngineSpec,
    build_engine,
    check_version,
    describe_engine,
    explain_failure,
)
from cl4wsis_export.from_bundle import add_engines
from cl4wsis_export.inspection import (
    check_built_types,
    check_types,
    inspector_types,
    network_types,
    program_types,
)
from cl4wsis_export.refit import check_refit, load_engine
from cl4wsis_export.tensorrt import require_tensorrt, timing_cache_path, write_timing_cache

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")

pytestmark = pytest.mark.trt

CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
SPEC = EngineSpec(max_batch=4, compute_capabilities=("8.6",))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def has_gpu() -> bool:
    from cuda.bindings import runtime

    return runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess


def rtx_build(content: bytes, spec: EngineSpec = SPEC, stated: dict[str, int] | None = None) -> bytes:
    return build_engine(TENSORRT_RTX, tensorrt_rtx, content, spec, stated).content


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_engine_computes_in_the_arithmetic_of_its_graph(precision: str, capability: str) -> None:
    spec = EngineSpec(max_batch=4, opt_batch=2, compute_capabilities=(capability,))
    content = typed_model(precision).SerializeToString()
    built = build_engine(TENSORRT_RTX, tensorrt_rtx, content, spec, TYPES[precision])
    assert built.types == program_types(built.content)
    assert {name for name, count in built.types.items() if count} >= set(TYPES[precision])
    assert built.timing_cache is None


def test_one_engine_serves_several_gpus() -> None:
    spec = EngineSpec(compute_capabilities=CAPABILITIES)
    engine = rtx_build(typed_model("float16").SerializeToString(), spec)
    targets = b" ".join(re.findall(rb"accelerators=\{([^}]*)\}", engine)).split()
    assert {b"sm80", b"sm86", b"sm89", b"sm120"} <= set(targets)


def test_precision_that_the_graph_does_not_hold_is_refused() -> None:
    with pytest.raises(BackendError, match="states 2 float16, 1 float32 layers, but TensorRT read 3 float32"):
        rtx_build(typed_model("float32").SerializeToString(), stated=TYPES["float16"])


@pytest.mark.parametrize("precision", TYPES)
def test_layers_of_the_network_definition_are_counted(precision: str) -> None:
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder = tensorrt_rtx.Builder(logger)
    network = builder.create_network(1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt_rtx.OnnxParser(network, logger)
    assert parser.parse(typed_model(precision).SerializeToString())
    assert network_types(network) == TYPES[precision]


@pytest.mark.parametrize(
    ("built", "stated", "message"),
    [
        ({"float32": 3}, {"float16": 2, "float32": 1}, "has no float16 layer"),
        ({"float16": 3}, {"int8": 2, "float16": 1}, "has no int8 layer"),
        ({"float16": 1, "float32": 2}, {"float32": 3}, "has unasked float16 layer"),
    ],
)
def test_engine_of_another_precision_is_not_kept(built: dict[str, int], stated: dict[str, int], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_built_types(built, stated, "model.onnx")


def test_what_cannot_be_read_proves_nothing() -> None:
    check_built_types(program_types(b"no engine"), {"float16": 1}, "model.onnx")
    check_types({"float32": 2}, {}, "model.onnx")
    assert inspector_types("no json") == {}


INSPECTIONS = {
    "TensorRT 10": (
        '{"Layers": [{"Name": "a", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x", "Format/Datatype": '
        '"Thirty-two wide channel vectorized row major Int8 format."}]}, {"Name": "b", "Inputs": [{"Name": "y", '
        '"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]}, {"Name": "c", "Inputs": []}]}',
        {"int8": 1, "float16": 1},
    ),
    "TensorRT 11": (
        '{"Layers": [{"Name": "a", "Inputs": [{"Name": "x", "DataType": "Float", "Format": "kLINEAR"}]}, '
        '{"Name": "b", "Inputs": [{"Name": "y", "DataType": "Half"}]}]}',
        {"float32": 1, "float16": 1},
    ),
    "names alone": ('{"Layers": ["a", "b"]}', {}),
}


@pytest.mark.parametrize(("text", "expected"), INSPECTIONS.values(), ids=INSPECTIONS)
def test_the_inspector_is_understood(text: str, expected: dict[str, int]) -> None:
    assert inspector_types(text) == dict(sorted(expected.items()))


def test_an_unknown_gpu_is_refused_before_the_build() -> None:
    with pytest.raises(ConfigError, match=r"9\.9: TensorRT-RTX .* builds for .*8\.6"):
        rtx_build(typed_model("float32").SerializeToString(), EngineSpec(compute_capabilities=("9.9",)))


def test_a_foreign_file_is_explained() -> None:
    with pytest.raises(BackendError, match="cannot read the graph"):
        rtx_build(b"no graph")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hardware_level": "ampere-plus"}, "belong to --format trt"),
        ({"version_compatible": True}, "belong to --format trt"),
    ],
)
def test_options_of_the_other_library_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rtx_build(typed_model("float32").SerializeToString(), SPEC.model_copy(update=changes))


@pytest.mark.skipif(has_gpu(), reason="a GPU is there, and the build succeeds")
def test_a_refittable_engine_asks_for_a_gpu() -> None:
    with pytest.raises(BackendError, match=r"--refittable needs a GPU .* build without --refittable"):
        rtx_build(typed_model("float32").SerializeToString(), SPEC.model_copy(update={"refittable": True}))


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (["[x] OutOfMemory (Requested size was 9 bytes)", "no tactic"], r"ran out of memory.*--max-batch \(now 4\)"),
        (["Error Code 2: OutOfMemory"], r"--workspace \(now 64 MiB\)"),
        (["no implementation"], "no implementation; the ONNX bundle runs without it"),
        ([], "no reason was given"),
    ],
)
def test_failed_builds_say_what_to_do(errors: list[str], message: str) -> None:
    spec = SPEC.model_copy(update={"workspace_mib": 64})
    with pytest.raises(BackendError, match=message):
        raise BackendError(explain_failure(TENSORRT, "11.4.0", errors, spec))


@pytest.mark.parametrize("version", ["8.6.1", "10.11.0.33", "9.3"])
def test_an_old_version_is_refused(version: str) -> None:
    with pytest.raises(BackendError, match=rf"TensorRT {version} is installed, but at least 10\.12 is needed"):
        check_version(TENSORRT, version)


@pytest.mark.parametrize("version", ["10.12.0.36", "10.16.1.11", "11.4.0.106"])
def test_a_known_version_is_accepted(version: str) -> None:
    check_version(TENSORRT, version)


def test_falling_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches must not fall: min 1, opt 9, max 4"):
        EngineSpec(opt_batch=9, max_batch=4)


@pytest.mark.skipif(has_gpu(), reason="a GPU is there")
def test_everything_that_tensorrt_lacks_is_said_at_once() -> None:
    with pytest.raises(BackendError, match=r"none is usable: CUDA failed.*trtexec .*images:4x32x48x3"):
        require_tensorrt((32, 48), SPEC)


@pytest.mark.skipif(has_gpu(), reason="a GPU is there, and the engine loads")
def test_an_engine_that_cannot_be_loaded_is_explained() -> None:
    from cl4wsis_export.engines import Log

    with pytest.raises(BackendError, match=r"TensorRT-RTX .* cannot load the engine: .*CUDA"):
        load_engine(
            TENSORRT_RTX, tensorrt_rtx, rtx_build(typed_model("float32").SerializeToString()), Log(tensorrt_rtx)
        )


def test_progress_is_told() -> None:
    seen: dict[str, int] = {}
    build_engine(
        TENSORRT_RTX,
        tensorrt_rtx,
        typed_model("float32").SerializeToString(),
        SPEC,
        progress=lambda phase, done, total: seen.update({phase: done}),
    )
    assert len(seen) > 3
    assert seen["Building engine"] > 1


INTERRUPTED = """
import os, signal, sys, threading
from pathlib import Path
from cl4wsis_export.engines import TENSORRT_RTX
from cl4wsis_export.engines import EngineSpec
from cl4wsis_export.from_bundle import add_engines
told = threading.Event()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored from the start in background jobs of some shells

def progress(phase, done, total):
    if not told.is_set():
        told.set()
        os.kill(os.getpid(), signal.SIGINT)

try:
    spec = EngineSpec(compute_capabilities=("8.6",))
    add_engines(Path(sys.argv[1]), TENSORRT_RTX, ["float32"], spec, progress=progress)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_stops_the_build_and_nothing_is_written(tmp_path: Path) -> None:
    bundle = write_typed_bundle(tmp_path / "x.cl4wsis")
    before = (bundle / "manifest.json").read_bytes()
    answer = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(bundle)], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.strip() == "interrupted", answer.stderr
    assert answer.returncode == 0  # the builder has ended before the interpreter does
    assert (bundle / "manifest.json").read_bytes() == before
    assert not (bundle / "engines").exists()


def test_an_engine_is_added_to_a_bundle_and_used_again(tmp_path: Path, cache: Path) -> None:
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    [engine] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC)
    manifest = open_bundle(path).manifest
    assert manifest.engines == (engine.info,)
    assert manifest.files[engine.info.file] == engine.sha256
    assert is_trusted(engine.sha256)
    assert engine.info.graph_sha256 == manifest.files["model.onnx"]
    told: list[str] = []
    [again] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC, progress=lambda *step: told.append(step[0]))
    assert again == engine
    assert told == []
    [other] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC.model_copy(update={"max_batch": 2}))
    assert [info.max_batch for info in open_bundle(path).manifest.engines] == [4, 2]
    assert other.path != engine.path


def test_an_engine_of_a_graph_that_was_replaced_meanwhile_is_not_added(tmp_path: Path) -> None:
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    [engine] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC, in_cache=True)
    before = open_bundle(path)
    write_color_bundle(path)
    with pytest.raises(BundleError, match="was exported again while the engine was built"):
        add_engine(before, engine.info, b"engine")
    assert open_bundle(path).manifest.engines == ()
    assert list((path / "engines").iterdir()) == []


def test_a_damaged_engine_of_the_bundle_is_refused_and_of_the_cache_built_again(tmp_path: Path) -> None:
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    [cached] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC, in_cache=True)
    assert open_bundle(path).manifest.engines == ()
    cached.path.write_bytes(cached.path.read_bytes()[:1000])
    with pytest.raises(BackendError, match="is damaged or changed"):
        cached.read()
    [again] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC, in_cache=True)
    assert again.path.stat().st_size > 1000
    [own] = add_engines(path, TENSORRT_RTX, ["float32"], SPEC.model_copy(update={"max_batch": 3}))
    own.path.write_bytes(own.path.read_bytes()[:1000])
    with pytest.raises(BundleError, match="is not the file that was exported"):
        open_bundle(path)


def test_engines_of_a_lone_graph_go_into_the_cache(tmp_path: Path, cache: Path) -> None:
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    [engine] = add_engines(path / "model.onnx", TENSORRT_RTX, ["float32"], SPEC)
    assert cache in engine.path.parents
    assert find_built(open_bundle(path), engine.info) == engine  # the same graph, opened otherwise
    assert [file.name for file in cache.rglob(".*")] == []


def test_the_key_tells_builds_apart() -> None:
    machine = Machine("NVIDIA A10", "8.6", "580.1 (CUDA 13.0)", "linux-x86_64")
    spec = EngineSpec(workspace_mib=512, hardware_level="ampere-plus", version_compatible=True)
    info = describe_engine(TENSORRT, tensorrt_rtx, "ab" * 32, spec, machine)
    assert (info.gpu, info.compute_capabilities, info.driver) == ("NVIDIA A10", ("8.6",), "580.1 (CUDA 13.0)")
    assert (info.workspace_mib, info.hardware_level, info.version_compatible) == (512, "ampere-plus", True)
    rtx = describe_engine(TENSORRT_RTX, tensorrt_rtx, "ab" * 32, SPEC, None)
    assert (rtx.gpu, rtx.driver, rtx.platform, rtx.compute_capabilities) == (None, None, "", ("8.6",))


def test_the_timing_cache_is_of_one_gpu_and_version(cache: Path) -> None:
    path = timing_cache_path("11.4.0.106", Machine("NVIDIA RTX A6000", "8.6", "1", "linux-x86_64"))
    assert path == cache / "timing" / "tensorrt-11.4.0.106-nvidia-rtx-a6000.cache"
    write_timing_cache(path, b"times")
    assert path.read_bytes() == b"times"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken.cache").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "taken.cache", tmp_path / "file" / "a.cache"):
        write_timing_cache(path, b"times")
        assert "the next build will measure again" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, r"their step differ \(1 and 2\)"),
        ({"grouping": {"min_area": 7, "max_instances": 4}}, "their grouping differ"),
    ],
)
def test_weights_go_into_engines_of_the_same_graph_alone(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    old = open_bundle(write_typed_bundle(tmp_path / "old.cl4wsis"))
    new = open_bundle(write_typed_bundle(tmp_path / "new.cl4wsis", **changes))
    with pytest.raises(BundleError, match=message):
        check_refit(old, new, new.variant())
    assert check_refit(old, old, old.variant()) == old.variant()


def test_refitting_needs_a_refittable_engine(tmp_path: Path) -> None:
    old, new = (write_typed_bundle(tmp_path / f"{name}.cl4wsis") for name in ("old", "new"))
    add_engines(old, TENSORRT_RTX, ["float32"], SPEC)
    spec = SPEC.model_copy(update={"refittable": True, "max_batch": 3})
    with pytest.raises(BackendError, match="holds no refittable TensorRT-RTX engine"):
        add_engines(new, TENSORRT_RTX, ["float32"], spec, refit_from=old)


def test_building_loads_neither_torch_nor_onnx(tmp_path: Path) -> None:
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    code = (
        "import sys\nfrom cl4wsis.cli.main import app\n"
        "app(['export', '--format', 'trt-rtx', '--from', sys.argv[1], '--compute-capability', '8.6'],"
        " standalone_mode=False)\n"
        "print([name for name in ('torch', 'onnx', 'onnx_ir', 'onnxruntime', 'cl4wsis_train') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr
    assert len(open_bundle(path).manifest.engines) == 1
