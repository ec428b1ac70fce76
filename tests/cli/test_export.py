"""``cl4wsis export``, run as a user runs it."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="export needs the extra 'export'")
pytest.importorskip("onnxruntime", reason="verification needs the extra 'cpu'")

import torch
import typer
from safetensors.torch import save_file
from tiny import tiny_plan
from typer.testing import CliRunner, Result

from cl4wsis.bundle import open_bundle
from cl4wsis.cli.export import export
from cl4wsis.errors import BackendError, BundleError, ConfigError, RunError
from cl4wsis.steps import WEIGHTS_FILE, ClassInfo, InputRule, StepInfo, file_sha256, step_folder, write_step_info
from cl4wsis.tasks import class_color
from cl4wsis_export import pack
from cl4wsis_train.models.network import InstanceSegmenter


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Leave a run folder behind, as training steps 0 and 1 would."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    plan = tiny_plan()
    torch.manual_seed(0)
    for step in (0, 1):
        split = plan.split(step)
        counts = tuple(len(names) for names in plan.steps[: step + 1])
        network = InstanceSegmenter(plan.recipe.network, counts)
        path = step_folder(folder, step)
        path.mkdir(parents=True)
        save_file(network.state_dict(), path / WEIGHTS_FILE)
        classes = (ClassInfo(name=n, step_added=step, color=class_color(i)) for i, n in enumerate(split.seen_names))
        info = StepInfo(
            plan=plan,
            step=step,
            classes=tuple(classes),
            class_counts=counts,
            network=plan.recipe.network,
            input=InputRule(size=plan.recipe.input_size, mean=network.mean, std=network.std),
            weights_sha256=file_sha256(path / WEIGHTS_FILE),
            parent_sha256=None,
            seconds={},
        )
        write_step_info(path, info)
    return folder


def call(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_newest_step_is_exported_beside_the_steps(run: Path) -> None:
    answer = call("--run", run, "--json", "--set", "grouping.max_instances=9", "--set", "verification_images=2")
    assert answer.exit_code == 0, answer.output
    path = run / "shapes-step1.cl4wsis"
    result = json.loads(answer.stdout)
    assert result["bundle"] == str(path)
    assert result["step"] == 1
    assert "verifying the graph on 2 images" in answer.stderr
    assert open_bundle(path).manifest.grouping.max_instances == 9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--step", "7"], RunError, "step 7 is not trained; trained are 0, 1"),
        (["--set", "grouping.profil=fast"], ConfigError, r"did you mean 'grouping\.profile'"),
        (["--set", "grouping.profile=paper"], ConfigError, "runs on the host only"),
        (["--format", "trt"], BackendError, r"--format onnx .*trtexec --onnx=model\.onnx.*images:1x64x64x3"),
    ],
)
def test_mistakes_are_explained(run: Path, arguments: list[str], error: type[Exception], message: str) -> None:
    answer = call("--run", run, *arguments)
    assert isinstance(answer.exception, error)
    with pytest.raises(error, match=message):
        raise answer.exception


def test_step_of_another_plan_is_refused(run: Path, tmp_path: Path) -> None:
    """The plan that is named must be the step's; later checks show that one with the step's classes is accepted."""
    plan = tmp_path / "mine.toml"
    steps = json.dumps(tiny_plan().steps)
    for content, error, message in (
        ('extends = "shapes"', RunError, "was trained on another plan: it knows disc, square, .*has star, cross"),
        (f'extends = "shapes"\nsteps = {steps}', ConfigError, r"did you mean 'grouping\.profile'"),
    ):
        plan.write_text(content)
        answer = call("--run", run, "--config", plan, "--set", "grouping.profil=fast")
        assert isinstance(answer.exception, error)
        with pytest.raises(error, match=message):
            raise answer.exception


def test_images_are_sought_where_the_named_plan_has_them(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "export_step", stop)
    plan = tmp_path / "moved.toml"
    old = '{images = "old", instances = "old.json"}'
    plan.write_text(
        f"""
        name = "shapes"
        steps = {json.dumps(tiny_plan().steps)}
        [data]
        kind = "coco"
        root = "{tmp_path}/now"
        train = {old}
        val = {old}
        steps.1 = {{images = "new", tags = "t.json"}}
        """
    )
    answer = call("--run", run, "--config", plan, "--precision", "int8")
    for purpose in ("verifying", "calibrating"):
        assert f"{purpose} on drawn shapes, since the plan's images are not at hand" in answer.stderr
    assert str(tmp_path / "now" / "old.json") in answer.stderr


@pytest.mark.parametrize(
    ("format", "taken", "message"),
    [
        ("onnx", "photo.jpg", "exists and is no bundle"),
        ("openvino", "photo.jpg", "exists and holds something else than model.xml"),
        ("triton", "shapes/photo.jpg", "exists and is no Triton model"),
    ],
)
def test_a_place_that_is_taken_is_found_out_before_the_work(
    run: Path, tmp_path: Path, format: str, taken: str, message: str
) -> None:
    if format == "openvino":
        pytest.importorskip("openvino", reason="the format needs the extra 'openvino'")
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).touch()
    answer = call("--run", run, "--format", format, "--out", tmp_path)
    assert isinstance(answer.exception, BundleError)
    assert message in str(answer.exception)
    assert "exporting" not in answer.stderr


def test_tensorrt_names_what_is_missing(run: Path) -> None:
    if torch.cuda.is_available() and importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("nothing is missing on this machine")
    answer = call("--run", run, "--format", "trt")
    missing = "tensorrt is not installed" if importlib.util.find_spec("tensorrt") is None else "none is usable"
    assert missing in str(answer.exception)


def test_an_empty_run_says_what_to_do(tmp_path: Path) -> None:
    answer = call("--run", tmp_path / "nothing")
    assert isinstance(answer.exception, RunError)
    assert "cl4wsis train-step" in str(answer.exception)


def test_compute_capability_needs_its_format(run: Path) -> None:
    answer = call("--run", run, "--compute-capability", "8.6")
    assert answer.exit_code == 2
    assert "belongs to --format trt-rtx" in answer.output


@pytest.mark.slow
@pytest.mark.trt
def test_trt_rtx_puts_an_engine_into_the_bundle(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building engines needs the extra 'trt-rtx'")
    out = tmp_path / "x.cl4wsis"
    options = ("--step", 0, "--out", out, "--format", "trt-rtx", "--compute-capability", "8.6")
    answer = call("--run", run, *options, "--compute-capability", "8.9")
    assert answer.exit_code == 0, answer.output
    [engine] = open_bundle(out).manifest.engines
    assert engine.compute_capabilities == ("8.6", "8.9")
    assert engine.file in answer.stdout


def test_precisions_are_written_and_listed(run: Path, tmp_path: Path) -> None:
    """The step is exported on the images of its plan, drawn shapes."""
    out = tmp_path / "x.cl4wsis"
    few = ("verification_images=1", "precision_images=2", "calibration_images=2", "grouping.max_instances=9")
    loose = ("limits.float16.matched=0", "limits.int8.matched=0")  # random weights
    options = [part for setting in (*few, *loose) for part in ("--set", setting)]
    answer = call("--run", run, "--out", out, "--precision", "int8", "--precision", "fp16", *options)
    assert answer.exit_code == 0, answer.output
    assert [variant.file for variant in open_bundle(out).manifest.variants] == [
        "model.onnx",
        "network.onnx",
        "model-fp16.onnx",
        "network-fp16.onnx",
        "model-int8.onnx",
        "network-int8.onnx",
    ]
    assert "making the int8 graph" in answer.stderr
    shown = " ".join(answer.stdout.split())
    assert "model-int8.onnx (int8, post=graph" in shown


def test_an_unknown_precision_names_the_known_ones(run: Path) -> None:
    answer = call("--run", run, "--precision", "fp8")
    assert answer.exit_code == 2
    assert all(name in answer.output for name in ("fp8", "fp32", "fp16", "int8"))
