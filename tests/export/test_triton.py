"""Triton model repositories: the configuration is read back by a parser of its text form."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import SIZE, SLOTS, write_color_bundle

from cl4wsis.bundle import EngineInfo, TensorInfo, open_bundle
from cl4wsis.engines import CACHE_VARIABLE, FoundEngine, add_engine, engine_at
from cl4wsis.errors import BundleError
from cl4wsis.images import read_image
from cl4wsis_export.triton import render_config, write_repository

_TOKEN = re.compile(r'\s+|(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\]:,])|(?P<word>[^\s{}\[\]:,"]+)')


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def parse(text: str) -> dict[str, list[Any]]:
    """Read the text form of a protobuf message: every field is a list of its values, messages are dicts."""
    position = 0
    tokens: list[str] = []
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None, text[position : position + 40]
        if match.lastgroup is not None:
            tokens.append(match.group())
        position = match.end()
    return _message(iter(tokens), None)


def _message(tokens: Iterator[str], end: str | None) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    for name in tokens:
        if name == end:
            return fields
        assert re.fullmatch(r"[a-z_]+", name), name
        mark = next(tokens)
        if mark == "{":
            fields.setdefault(name, []).append(_message(tokens, "}"))
            continue
        assert mark == ":", (name, mark)
        value = next(tokens)
        fields.setdefault(name, []).extend(_list(tokens) if value == "[" else [_scalar(value)])
    assert end is None
    return fields


def _list(tokens: Iterator[str]) -> Iterator[Any]:
    for token in tokens:
        if token == "]":
            return
        if token != ",":
            yield _scalar(token)


def _scalar(token: str) -> Any:
    if token.startswith('"'):
        return json.loads(token)
    return int(token) if re.fullmatch(r"-?\d+", token) else token


def test_a_step_is_served_as_the_next_version(tmp_path: Path) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis", num_golden=2))
    folder = write_repository(bundle, bundle.variant(), tmp_path / "repository")
    assert folder == tmp_path / "repository" / "colors"
    assert (folder / "2" / "model.onnx").read_bytes() == bundle.path_of(bundle.variant()).read_bytes()
    assert (folder / "labels.txt").read_text() == "red\nblue\n"
    config = parse((folder / "config.pbtxt").read_text())
    assert config["name"] == ["colors"]
    assert config["platform"] == ["onnxruntime_onnx"]
    assert config["max_batch_size"] == [8]
    assert config["version_policy"] == [{"latest": [{"num_versions": [2]}]}]
    assert config["dynamic_batching"][0]["preferred_batch_size"] == [2, 4, 8]
    assert config["input"] == [{"name": ["images"], "data_type": ["TYPE_UINT8"], "dims": [*SIZE, 3]}]
    outputs = {output["name"][0]: (output["data_type"][0], output["dims"]) for output in config["output"]}
    assert outputs == {
        "instance_ids": ("TYPE_UINT8", [*SIZE]),
        "labels": ("TYPE_INT32", [SLOTS]),
        "scores": ("TYPE_FP32", [SLOTS]),
        "areas": ("TYPE_INT32", [SLOTS]),
        "boxes": ("TYPE_FP32", [SLOTS, 4]),
    }
    [names, plan] = config["parameters"]
    assert plan == {"key": ["plan"], "value": [{"string_value": ["colors"]}]}
    assert names["key"] == ["class_names"]
    assert json.loads(names["value"][0]["string_value"][0]) == ["red", "blue"]


def test_the_model_is_warmed_up_with_the_golden_inputs(tmp_path: Path) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis", num_golden=2))
    folder = write_repository(bundle, bundle.variant(), tmp_path / "repository")
    warmup = parse((folder / "config.pbtxt").read_text())["model_warmup"]
    assert sorted((sample["batch_size"][0]) for sample in warmup) == [1, 1, 2, 2, 4, 4, 8, 8]
    assert len({sample["name"][0] for sample in warmup}) == len(warmup)
    for sample in warmup:
        [entry] = sample["inputs"]
        [value] = entry["value"]
        assert entry["key"] == ["images"]
        assert (value["data_type"], value["dims"]) == (["TYPE_UINT8"], [*SIZE, 3])
        raw = (folder / "warmup" / value["input_data_file"][0]).read_bytes()
        golden = [read_image(bundle.path / case.image).tobytes() for case in bundle.manifest.golden]
        assert raw in golden


def test_steps_share_a_model(tmp_path: Path) -> None:
    for step in (0, 1):
        bundle = open_bundle(write_color_bundle(tmp_path / f"{step}.cl4wsis", step=step))
        folder = write_repository(bundle, bundle.variant(), tmp_path / "repository")
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "config.pbtxt", "labels.txt", "warmup"]


def test_an_earlier_step_leaves_class_names_and_configuration_of_a_later_one(tmp_path: Path) -> None:
    later = open_bundle(write_color_bundle(tmp_path / "later.cl4wsis", num_golden=1, step=9))
    first = later.manifest.classes[:1]
    earlier = open_bundle(write_color_bundle(tmp_path / "earlier.cl4wsis", step=1, classes=first, maps=()))
    folder = write_repository(later, later.variant(), tmp_path / "repository")
    shared = {name: (folder / name).read_bytes() for name in ("config.pbtxt", "labels.txt")}
    write_repository(earlier, earlier.variant(), tmp_path / "repository")
    assert (folder / "2" / "model.onnx").read_bytes() == earlier.path_of(earlier.variant()).read_bytes()
    assert {name: (folder / name).read_bytes() for name in shared} == shared
    write_repository(later, later.variant(), tmp_path / "repository")
    assert {name: (folder / name).read_bytes() for name in shared} == shared
    assert sorted(path.name for path in folder.iterdir()) == ["10", "2", "config.pbtxt", "labels.txt", "warmup"]


def test_versions_with_other_tensors_are_refused(tmp_path: Path) -> None:
    first, second = (open_bundle(write_color_bundle(tmp_path / f"{step}.cl4wsis", step=step)) for step in (0, 1))
    folder = write_repository(first, first.variant(), tmp_path / "repository")
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [ 32, 48 ]", "dims: [ 64, 48 ]"))
    with pytest.raises(BundleError, match="all versions share one configuration"):
        write_repository(second, second.variant(), tmp_path / "repository")
    assert not (folder / "2").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    bundle = open_bundle(write_color_bundle(tmp_path / "x.cl4wsis"))
    (tmp_path / "repository" / "colors").mkdir(parents=True)
    (tmp_path / "repository" / "colors" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is no Triton model"):
        write_repository(bundle, bundle.variant(), tmp_path / "repository")


def engine_in(path: Path, runtime: str, max_batch: int = 4) -> FoundEngine:
    bundle = open_bundle(path)
    info = EngineInfo(
        file="engines/none",
        runtime=runtime,
        compute_capabilities=("8.6",),
        max_batch=max_batch,
        graph_sha256=bundle.manifest.files["model.onnx"],
    )
    return add_engine(bundle, info, b"engine")


def test_an_engine_is_served_as_a_plan(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    added = engine_in(path, "tensorrt 11.4.0")
    bundle = open_bundle(path)
    folder = write_repository(bundle, bundle.variant(), tmp_path / "repository", engine_at(bundle, added.path))
    assert (folder / "2" / "model.plan").read_bytes() == b"engine"
    config = parse((folder / "config.pbtxt").read_text())
    assert (config["platform"], config["max_batch_size"]) == (["tensorrt_plan"], [4])
    with pytest.raises(BundleError, match="other inputs, outputs or platform"):
        write_repository(bundle, bundle.variant(), tmp_path / "repository")


def test_an_engine_of_an_earlier_step_must_take_the_batches_of_a_later_one(tmp_path: Path) -> None:
    folders = {}
    for step in (1, 0):
        path = write_color_bundle(tmp_path / f"{step}.cl4wsis", step=step)
        added = engine_in(path, "tensorrt 11.4.0")
        folders[step] = open_bundle(path), added.path
    bundle, engine = folders[1]
    folder = write_repository(bundle, bundle.variant(), tmp_path / "repository", engine_at(bundle, engine))
    config = folder / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 4", "max_batch_size: 8"))
    bundle, engine = folders[0]
    with pytest.raises(BundleError, match=r"batches of up to 8, and this engine takes 4; build it with --max-batch 8"):
        write_repository(bundle, bundle.variant(), tmp_path / "repository", engine_at(bundle, engine))
    assert not (folder / "1").exists()


def test_a_later_step_takes_no_larger_batches_than_the_engine_of_an_earlier_one(tmp_path: Path) -> None:
    batches = []
    for step in (0, 1):
        path = write_color_bundle(tmp_path / f"{step}.cl4wsis", step=step)
        added = engine_in(path, "tensorrt 11.4.0", max_batch=4 + 12 * step)
        bundle = open_bundle(path)
        folder = write_repository(bundle, bundle.variant(), tmp_path / "repository", engine_at(bundle, added.path))
        batches.append(parse((folder / "config.pbtxt").read_text())["max_batch_size"])
    assert batches == [[4], [4]]


@pytest.mark.parametrize("is_later", [True, False])
def test_steps_of_different_plans_are_not_put_together(tmp_path: Path, is_later: bool) -> None:
    first = open_bundle(write_color_bundle(tmp_path / "first.cl4wsis", step=4, plan="col:ors"))
    folder = write_repository(first, first.variant(), tmp_path / "repository")
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    step = 5 if is_later else 3
    others = tuple(info.model_copy(update={"name": f"no {info.name}"}) for info in first.manifest.classes)
    for changes in ({"plan": "col_ors"}, {"plan": "col:ors", "classes": others}):
        other = open_bundle(write_color_bundle(tmp_path / "other.cl4wsis", step=step, maps=(), **changes))
        with pytest.raises(BundleError, match="all versions of a model are steps of one"):
            write_repository(other, other.variant(), tmp_path / "repository")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held


def test_only_engines_of_tensorrt_run_in_triton(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis")
    engine = engine_in(path, "tensorrt-rtx 1.7.1")
    bundle = open_bundle(path)
    with pytest.raises(BundleError, match="Triton runs those of TensorRT alone"):
        write_repository(bundle, bundle.variant(), tmp_path / "repository", engine)
    with pytest.raises(BundleError, match=r"is no engine of .*; its engines are: .*tensorrt-rtx"):
        engine_at(bundle, tmp_path / "other.engine")


def test_names_are_quoted() -> None:
    image = TensorInfo(name="images", dtype="uint8", shape=("batch", 4, 4, 3), meaning="")
    config = parse(render_config('a "b" \\', "onnxruntime_onnx", 1, [image], [image], ['sea "lion"', "Bär"], [], "b"))
    assert config["name"] == ['a "b" \\']
    assert json.loads(config["parameters"][0]["value"][0]["string_value"][0]) == ['sea "lion"', "Bär"]
    assert "preferred_batch_size" not in config["dynamic_batching"][0]


def test_the_command_writes_a_repository_without_torch(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "x.cl4wsis", num_golden=1)
    code = (
        "import sys\nfrom cl4wsis.cli.main import app\n"
        "app(['export', '--format', 'triton', '--from', sys.argv[1]], standalone_mode=False)\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'cl4wsis_train') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr
    assert (tmp_path / "triton" / "colors" / "2" / "model.onnx").is_file()
