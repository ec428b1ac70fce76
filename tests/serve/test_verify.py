"""The ladder with real graphs: what passes, what is caught, and what is written down."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import RED, color_image, write_color_bundle

from cl4wsis.bundle import open_bundle, update_manifest, write_bundle
from cl4wsis.checks import Agreement, Limits
from cl4wsis.errors import BackendError, BundleError
from cl4wsis.images import write_png
from cl4wsis.instances import Instances
from cl4wsis.metrics import GroupMeans
from cl4wsis.tasks import ClassSplit
from cl4wsis_serve import Predictor
from cl4wsis_serve.selftest import golden_agreement, golden_cases, run_self_test
from cl4wsis_serve.verify import (
    Choice,
    ImageSet,
    choose,
    find_problems,
    folder_images,
    golden_images,
    store_checks,
    verify_bundle,
)

GRAPH = Choice("float32", "graph", "onnxruntime")
HOST = Choice("float32", "host", "onnxruntime")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_color_bundle(tmp_path / "colors.cl4wsis", num_golden=2)


def add_variant(path: Path, precision: str, threshold: int) -> None:
    """Give a bundle a variant whose graph finds other areas, as a bad quantisation would."""
    bundle = open_bundle(path)
    model = onnx.load(bundle.path_of(bundle.variant()))
    next(v for v in model.graph.initializer if v.name == "threshold").CopyFrom(
        onnx.numpy_helper.from_array(np.uint8(threshold), "threshold")
    )
    info = bundle.variant().model_copy(update={"file": "other.onnx", "precision": precision})
    files = {name: (path / name).read_bytes() for name in bundle.manifest.files}
    files["other.onnx"] = model.SerializeToString()
    manifest = bundle.manifest.model_copy(update={"variants": (*bundle.manifest.variants, info)})
    write_bundle(path, manifest, files)


def test_both_placements_pass_on_golden_images(path: Path) -> None:
    bundle = open_bundle(path)
    result = verify_bundle(bundle, golden_images(bundle), [GRAPH, HOST], threads=1)
    assert result.passed
    assert not result.skipped
    for check, choice in zip(result.checks, (GRAPH, HOST), strict=True):
        assert (check.precision, check.post, check.backend) == choice
        assert check.golden is not None
        assert check.agreement is not None
        assert (check.golden.images, check.golden.instances) == (2, 4)
        assert (check.agreement.matched, check.agreement.differing_pixels) == (1, 0)
        assert check.ap50 is None
        assert "onnxruntime" in check.versions
    assert result.checks[0].sha256 == bundle.manifest.files["model.onnx"]
    assert result.checks[1].sha256 == bundle.manifest.files["network.onnx"]


def test_a_variant_that_answers_otherwise_fails_with_figures(path: Path) -> None:
    add_variant(path, "int8", threshold=230)  # red and blue lie below it: nothing is found
    bundle = open_bundle(path)
    result = verify_bundle(bundle, golden_images(bundle), [GRAPH, Choice("int8", "graph", "onnxruntime")], threads=1)
    good, bad = result.checks
    assert good.passed
    assert not bad.passed
    assert not result.passed
    assert bad.agreement is not None
    assert bad.agreement.matched == 0
    assert "100.00% of the foreground of the golden images differ (limit 25.00%)" in bad.problems
    assert "0.00% of the instances are matched (limit 80.00%, for 4 instances 40.00%)" in bad.problems


def test_limits_of_the_manifest_win(path: Path) -> None:
    add_variant(path, "int8", threshold=230)
    update_manifest(open_bundle(path), {"limits": {"int8": Limits()}})
    bundle = open_bundle(path)
    result = verify_bundle(bundle, golden_images(bundle), [Choice("int8", "graph", "onnxruntime")], threads=1)
    assert result.passed


def truth_of(image: np.ndarray) -> Instances:
    red = (image == RED).all(axis=2)
    return Instances.from_ids(red.astype(np.int32), [0] if red.any() else [], [1.0] if red.any() else [])


def test_ap50_is_told_apart_for_old_and_new_classes(path: Path) -> None:
    """Red is the old class and is found; no blue object is known, so the new class has no value."""
    images = [color_image(64, 96), color_image(40, 40)]
    split = ClassSplit(step=1, old_names=("red",), new_names=("blue",))
    known = ImageSet("two images", 2, images.__getitem__, lambda index: truth_of(images[index]), split)
    bundle = open_bundle(path)
    check = verify_bundle(bundle, known, [HOST], threads=1).checks[0]
    assert check.ap50 is not None
    assert check.ap50_reference is not None
    assert (check.ap50.old, check.ap50.new, check.ap50.all) == (1, None, 1)
    assert check.ap50_reference.old == 1


def test_a_graph_that_cannot_run_is_a_problem_not_a_crash(path: Path) -> None:
    add_variant(path, "float16", threshold=128)
    bundle = open_bundle(path)
    model = onnx.load(path / "other.onnx")
    model.graph.node[0].op_type = "Explode"
    (path / "other.onnx").write_bytes(model.SerializeToString())
    files = {name: (path / name).read_bytes() for name in bundle.manifest.files}
    bundle = open_bundle(write_bundle(path, bundle.manifest, files))
    check = verify_bundle(bundle, golden_images(bundle), [Choice("float16", "graph", "onnxruntime")], threads=1).checks[
        0
    ]
    assert not check.passed
    assert check.agreement is None
    assert "cannot load it" in check.problems[0]


def test_results_are_stored_and_replaced(path: Path) -> None:
    bundle = open_bundle(path)
    first = verify_bundle(bundle, golden_images(bundle), [GRAPH, HOST], threads=1).checks
    store_checks(bundle, first)
    assert open_bundle(path).manifest.checks == first
    other = first[1].model_copy(update={"checked": "later"})
    store_checks(bundle, [other])
    assert open_bundle(path).manifest.checks == (first[0], other)
    elsewhere = first[0].model_copy(update={"data": "my photographs"})
    store_checks(bundle, [elsewhere])
    assert open_bundle(path).manifest.checks == (first[0], other, elsewhere)


def test_choices_combine_variants_and_backends(path: Path) -> None:
    bundle = open_bundle(path)
    choices, skipped = choose(bundle)
    assert GRAPH in choices
    assert HOST in choices
    assert all(entry.reason for entry in skipped)
    assert {choice.backend for choice in choices}.isdisjoint(entry.what for entry in skipped)
    assert choose(bundle, ["onnxruntime"], posts=["host"]) == ([HOST], [])


def test_choices_that_are_impossible_are_explained(path: Path) -> None:
    bundle = open_bundle(path)
    with pytest.raises(BackendError, match="unknown backend 'abacus'; known: "):
        choose(bundle, ["abacus"])
    with pytest.raises(BundleError, match=r"holds no int8 graph.*--precision int8"):
        choose(bundle, precisions=["int8"])


def test_images_of_a_folder_are_spread_over_the_limit(tmp_path: Path) -> None:
    paths = []
    for number in range(7):
        paths.append(tmp_path / f"{number}.png")
        write_png(paths[-1], np.full((4, 4, 3), number, np.uint8))
    images = folder_images("seven", paths, limit=3)
    assert [int(images.image(index)[0, 0, 0]) for index in range(images.size)] == [0, 2, 4]
    assert folder_images("seven", paths).size == 7


AGREED = Agreement(images=1, instances=900, differing_pixels=0.01, matched=0.9, mask_iou=0.95, score_error=0.2)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), []),
        (
            Limits(
                differing_pixels=0.01, matched=0.9, mask_iou=0.95, score_error=0.2, golden_pixels=0.01, ap50_drop=0.06
            ),
            [],
        ),
        (
            Limits(differing_pixels=0.004),
            [
                "1.00% of the foreground belongs to another instance than with float32 "
                "(limit 0.40%, for 900 instances 0.82%)"
            ],
        ),
        (Limits(differing_pixels=0.009), []),
        (Limits(matched=0.92), ["90.00% of the instances are matched (limit 92.00%, for 900 instances 90.19%)"]),
        (Limits(matched=0.91), []),
        (Limits(matched=1), ["90.00% of the instances are matched (limit 100.00%)"]),
        (Limits(mask_iou=0.96), ["the mean mask IoU is 0.950 (limit 0.960)"]),
        (Limits(score_error=0.1), ["scores differ by up to 0.2 (limit 0.1)"]),
        (Limits(golden_pixels=0), ["1.00% of the foreground of the golden images differ (limit 0.00%)"]),
        (Limits(ap50_drop=0.01), ["AP50 of new classes falls by 5.00 points (limit 1.00)"]),
    ],
)
def test_each_limit_is_judged(limits: Limits, expected: list[str]) -> None:
    found, reference = GroupMeans(old=0.5, new=0.25, all=0.4), GroupMeans(old=None, new=0.3, all=0.4)
    assert find_problems(limits, AGREED, AGREED, found, reference) == expected


# --- self-test ---


def test_self_test_passes_on_the_bundle_s_own_graphs(path: Path) -> None:
    for post in ("graph", "host"):
        run_self_test(Predictor.open(path, "onnxruntime", post=post), open_bundle(path))


def test_self_test_refuses_a_backend_that_answers_nonsense(path: Path) -> None:
    predictor = Predictor.open(path, "onnxruntime", post="graph")
    run = predictor.backend.run
    predictor.backend.run = lambda images: run(images[:, ::-1].copy())  # type: ignore[method-assign]
    with pytest.raises(
        BackendError, match=r"self-test of float32 on onnxruntime: \d+\.\d% of the foreground of 2 golden"
    ):
        run_self_test(predictor, open_bundle(path))


def test_self_test_without_golden_inputs_is_refused(tmp_path: Path) -> None:
    path = write_color_bundle(tmp_path / "colors.cl4wsis")
    predictor = Predictor.open(path, "onnxruntime")
    assert golden_agreement(predictor, open_bundle(path)) is None
    with pytest.raises(BackendError, match="there are no golden inputs"):
        run_self_test(predictor, open_bundle(path))


def test_golden_files_that_make_no_sense_are_named(path: Path) -> None:
    bundle = open_bundle(path)
    np.savez(path / "golden/0.npz", labels=np.zeros(4, np.int32))
    with pytest.raises(BundleError, match=r"golden/0\.npz: is no golden output"):
        list(golden_cases(bundle))
    np.savez(path / "golden/0.npz", labels=np.array([{}], object))  # needs pickle, which is never loaded
    with pytest.raises(BundleError, match=r"golden/0\.npz: is no golden output"):
        list(golden_cases(bundle))
    write_png(path / "golden/0.png", np.zeros((8, 8, 3), np.uint8))
    (path / "golden/0.npz").write_bytes((path / "golden/1.npz").read_bytes())
    with pytest.raises(BundleError, match=r"must be of the network's size \(32, 48\)"):
        list(golden_cases(bundle))
