"""``cl4wsis export --from``: what is made out of a bundle, run as a user runs it."""

import json
from pathlib import Path

import pytest
import typer
from bundles import write_color_bundle
from pretended_gpu import has_gpu
from typed import write_typed_bundle
from typer.testing import CliRunner, Result

from cl4wsis.bundle import EngineInfo, open_bundle
from cl4wsis.cli.export import export
from cl4wsis.engines import CACHE_VARIABLE, add_engine, graph_sha256
from cl4wsis.errors import BackendError, BundleError, ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def call(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.trt
def test_engines_of_several_precisions_are_added(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    targets = ("--compute-capability", "8.6", "--compute-capability", "8.9")
    precisions = ("--precision", "fp16", "--precision", "int8")
    batches = ("--opt-batch", 2, "--max-batch", 4, "--workspace", 256)
    answer = call("--format", "trt-rtx", "--from", path, *targets, *precisions, *batches, "--json")
    assert answer.exit_code == 0, answer.output
    engines = open_bundle(path).manifest.engines
    assert json.loads(answer.stdout)["written"] == [str(path / engine.file) for engine in engines]
    assert [sorted(engine.types) for engine in engines] == [["float16", "float32"], ["float32", "int8"]]
    for engine in engines:
        assert engine.compute_capabilities == ("8.6", "8.9")
        assert (engine.opt_batch, engine.max_batch, engine.workspace_mib) == (2, 4, 256)


@pytest.mark.trt
def test_the_cache_takes_engines_instead_of_the_bundle(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    for source in (path, path / "model.onnx"):
        answer = call("--format", "trt-rtx", "--from", source, "--compute-capability", "8.6", "--engine-cache")
        assert answer.exit_code == 0, answer.output
    assert open_bundle(path).manifest.engines == ()
    assert len(list(cache.rglob("*.engine"))) == 1  # the second was built before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "trt-rtx", "--hardware-level", "ampere-plus"], "belong to --format trt"),
        (["--format", "trt", "--compute-capability", "8.6"], "belongs to --format trt-rtx"),
        (["--format", "triton", "--max-batch", "4", "--refittable"], "--max-batch, --refittable belongs to"),
        (["--format", "onnx"], "--from needs --format"),
        (["--format", "triton", "--step", "1"], "--step: for the export of a trained step"),
        (["--format", "triton", "--run", "x", "--preset", "ours"], "--run, --preset: for the export"),
        (["--format", "openvino", "--config", "voc/10-10"], "--config: for the export"),
        (["--format", "trt-rtx", "--out", "elsewhere"], "--out: engines go into the bundle of --from"),
        (["--format", "triton", "--precision", "fp16", "--precision", "int8"], "takes one --precision"),
        (["--format", "trt", "--engine", "x.engine"], "--engine belongs to"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    answer = call("--from", path, *arguments)
    assert answer.exit_code == 2
    assert message in " ".join(answer.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--format", "trt-rtx", "--precision", "int8"], BundleError, "holds no int8 graph"),
        (["--format", "trt-rtx", "--compute-capability", "1.0"], ConfigError, r"1\.0: TensorRT-RTX .* builds for"),
        (["--format", "trt-rtx", "--opt-batch", "9", "--max-batch", "4"], ConfigError, "batches must not fall"),
        (["--format", "triton", "--engine", "x.engine"], BundleError, "is no engine of"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, arguments: list[str], error: type[Exception], message: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    before = (path / "manifest.json").read_bytes()
    answer = call("--from", path, *arguments)
    assert isinstance(answer.exception, error), answer.output
    with pytest.raises(error, match=message):
        raise answer.exception
    assert (path / "manifest.json").read_bytes() == before


def test_what_is_made_of_a_bundle_lies_beside_it_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    path = write_color_bundle(tmp_path / "v1.0.cl4wsis")
    monkeypatch.chdir(path)
    for source in (".", "model.onnx"):
        for format, written in (("openvino", "v1.0-openvino"), ("triton", "triton/colors")):
            answer = call("--from", source, "--format", format, "--json")
            assert answer.exit_code == 0, answer.output
            assert json.loads(answer.stdout)["written"] == [str(tmp_path / written)]


def test_an_engine_is_served_in_its_own_precision(tmp_path: Path) -> None:
    path = write_typed_bundle(tmp_path / "x.cl4wsis")
    bundle = open_bundle(path)
    info = EngineInfo(
        file="engines/none",
        runtime="tensorrt 11.4.0",
        compute_capabilities=("8.6",),
        max_batch=4,
        graph_sha256=graph_sha256(bundle, bundle.variant("float16")),
    )
    engine = add_engine(bundle, info, b"engine").path
    arguments = ("--from", path, "--format", "triton", "--engine", engine)
    refused = call(*arguments, "--precision", "int8")
    assert "is an engine of the float16 graph; leave out --precision" in str(refused.exception)
    for precision in ((), ("--precision", "fp16")):
        answer = call(*arguments, *precision)
        assert answer.exit_code == 0, answer.output


def test_a_missing_bundle_is_explained(tmp_path: Path) -> None:
    answer = call("--from", tmp_path / "no.cl4wsis", "--format", "triton")
    assert isinstance(answer.exception, BundleError)
    assert "does not exist" in str(answer.exception)


@pytest.mark.skipif(has_gpu(), reason="a GPU is there")
def test_tensorrt_without_a_gpu_names_every_way_out(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    answer = call("--from", path, "--format", "trt", "--max-batch", 2)
    assert isinstance(answer.exception, BackendError)
    for part in (
        "none is usable",
        "--format onnx",
        "--format trt-rtx",
        "--from BUNDLE",
        "--maxShapes=images:2x32x48x3",
    ):
        assert part in str(answer.exception)
