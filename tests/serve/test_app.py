"""The HTTP server with a real graph: what the protocol says, what it answers, and what it turns away."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SIZE, SLOTS, color_image, write_color_bundle
from pycocotools import mask as coco_mask

from cl4wsis.images import encode_png
from cl4wsis_serve import Predictor

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("httpx2", reason="needs what starlette's test client is made of")
from fastapi.testclient import TestClient
from starlette.requests import Request

from cl4wsis_serve.app import RequestError, ServerLimits, _Queue, _read_body, build_app

MODEL = "/v2/models/colors-step1"
JSON_LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(params=["graph", "host"])
def predictor(tmp_path: Path, request: pytest.FixtureRequest) -> Predictor:
    path = write_color_bundle(tmp_path / "colors.cl4wsis")
    return Predictor.open(path, "onnxruntime", post=request.param, threads=1)


@pytest.fixture
def client(predictor: Predictor) -> Iterator[TestClient]:
    app = build_app(predictor, ServerLimits(max_body_bytes=200_000, max_batch=2))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def frame(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)


def infer_request(frames: np.ndarray, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "images", "shape": list(frames.shape), "datatype": "UINT8", "data": frames.reshape(-1).tolist()}
    return {"inputs": [{**tensor, **changes}]}


def test_health_and_metadata(client: TestClient) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get(f"{MODEL}/ready").json() == {"ready": True}
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    metadata = client.get(f"{MODEL}/versions/2").json()
    assert metadata["versions"] == ["2"]
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, *SIZE, 3]}]
    outputs = {output["name"]: (output["datatype"], output["shape"]) for output in metadata["outputs"]}
    assert outputs["instance_ids"] == ("UINT8", [-1, *SIZE])
    assert outputs["boxes"] == ("FP32", [-1, SLOTS, 4])


def test_infer_gives_the_graph_s_arrays_wherever_pixels_are_grouped(client: TestClient, tmp_path: Path) -> None:
    frames = np.stack([color_image(*SIZE), np.zeros((*SIZE, 3), np.uint8)])
    answer = client.post(f"{MODEL}/infer", json={"id": "17", **infer_request(frames)}).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("17", "colors-step1", "2")
    outputs = {o["name"]: np.reshape(o["data"], o["shape"]) for o in answer["outputs"]}
    of_graph = Predictor.open(tmp_path / "colors.cl4wsis", "onnxruntime", post="graph").backend.run(frames)
    for name in ("instance_ids", "labels", "areas"):
        np.testing.assert_array_equal(outputs[name], of_graph[name], err_msg=name)
    np.testing.assert_allclose(outputs["scores"], of_graph["scores"], rtol=1e-6)
    assert outputs["boxes"].shape == (2, SLOTS, 4)
    np.testing.assert_array_equal(outputs["boxes"][1], 0)


def test_nested_data_is_the_same_as_flat(client: TestClient) -> None:
    frames = frame()[None]
    flat = client.post(f"{MODEL}/infer", json=infer_request(frames))
    nested = client.post(f"{MODEL}/infer", json=infer_request(frames, data=frames.tolist()))
    assert flat.status_code == nested.status_code == 200
    assert flat.json()["outputs"] == nested.json()["outputs"]


def test_binary_tensors_in_and_out(client: TestClient) -> None:
    frames = frame()[None]
    as_json = client.post(f"{MODEL}/infer", json=infer_request(frames)).json()
    tensor = {"name": "images", "shape": list(frames.shape), "datatype": "UINT8"}
    header = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": frames.size}}],
            "outputs": [{"name": "scores"}, {"name": "instance_ids", "parameters": {"binary_data": True}}],
        }
    ).encode()
    answer = client.post(f"{MODEL}/infer", content=header + frames.tobytes(), headers={JSON_LENGTH: str(len(header))})
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[JSON_LENGTH])
    scores, ids = json.loads(answer.content[:length])["outputs"]
    expected = {output["name"]: output for output in as_json["outputs"]}
    assert scores["data"] == expected["scores"]["data"]
    assert ids["parameters"] == {"binary_data_size": SIZE[0] * SIZE[1]}
    assert list(answer.content[length:]) == expected["instance_ids"]["data"]


def test_all_outputs_are_binary_when_the_request_says_so(client: TestClient) -> None:
    request = {**infer_request(frame()[None]), "parameters": {"binary_data_output": True}}
    answer = client.post(f"{MODEL}/infer", json=request)
    length = int(answer.headers[JSON_LENGTH])
    sizes = [output["parameters"]["binary_data_size"] for output in json.loads(answer.content[:length])["outputs"]]
    assert sizes == [SIZE[0] * SIZE[1], SLOTS * 4, SLOTS * 4, SLOTS * 4, SLOTS * 16]
    assert len(answer.content) == length + sum(sizes)


def test_predict_answers_in_pixels_of_the_image(client: TestClient) -> None:
    answer = client.post("/predict", content=encode_png(color_image(64, 96))).json()
    assert (answer["height"], answer["width"]) == (64, 96)
    red, blue = answer["instances"]
    assert (red["label"], red["name"], red["category_id"]) == (0, "red", 1)
    assert red["bbox"] == [12, 8, 36, 24]
    assert red["area"] == 36 * 24 == coco_mask.area(red["segmentation"])
    assert red["score"] == pytest.approx(0.9)
    assert blue["name"] == "blue"
    confident = client.post("/predict?min_score=0.7", content=encode_png(color_image())).json()
    assert [instance["name"] for instance in confident["instances"]] == ["red"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "image"}, "the model has one input, 'images'"),
        ({"datatype": "FP32"}, "must be UINT8, found 'FP32'"),
        ({"shape": [1, 64, 64, 3]}, r"must have shape [batch, 32, 48, 3]"),
        ({"shape": [0, *SIZE, 3]}, "1 to 2 images, found 0"),
        ({"shape": [3, *SIZE, 3]}, "1 to 2 images, found 3"),
        ({"shape": [True, *SIZE, 3]}, "must have shape"),
        ({"shape": "large"}, "must have shape"),
        ({"data": [1, 2, 3]}, "must hold 4608 whole numbers, found 3"),
        ({"data": [0.5] * 4608}, "whole numbers, found 4608 of type float64"),
        ({"data": [256] * 4608}, "must lie in 0..255, found 256..256"),
        ({"data": [[1], [2, 3]]}, "is no array of numbers"),
        ({"data": None}, "must hold 4608"),
        ({"parameters": {"binary_data_size": 4608}}, "binary_data_size says 4608, and 0 bytes follow"),
    ],
)
def test_wrong_tensors_are_refused_by_name(client: TestClient, changes: dict[str, Any], message: str) -> None:
    answer = client.post(f"{MODEL}/infer", json=infer_request(frame()[None], **changes))
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "message"),
    [
        ("GET", "/v2/models/dogs", b"", {}, 404, "there is no model 'dogs'; this server has 'colors-step1'"),
        ("GET", f"{MODEL}/versions/7", b"", {}, 404, "has no version '7'; it has '2'"),
        ("GET", "/v3", b"", {}, 404, "there are GET /v2"),
        ("GET", "/predict", b"", {}, 405, "Method Not Allowed"),
        ("POST", f"{MODEL}/infer", b"{", {}, 400, "is no JSON"),
        ("POST", f"{MODEL}/infer", b"[" * 100_000, {}, 400, "is no JSON"),
        ("POST", f"{MODEL}/infer", b"[]", {}, 400, "must be a JSON object"),
        ("POST", f"{MODEL}/infer", b"{}", {}, 400, "'inputs' must be a list of one tensor"),
        ("POST", f"{MODEL}/infer", b"{}", {JSON_LENGTH: "9"}, 400, "but the body has 2 bytes"),
        ("POST", f"{MODEL}/infer", b"{}", {JSON_LENGTH: "-1"}, 400, "but the body has 2 bytes"),
        ("POST", "/predict", b"no image", {}, 400, "the request's body: is not an image"),
        ("POST", "/predict", b"", {}, 400, "the request's body: is empty"),
        ("POST", "/predict?min_score=2", b"", {}, 400, "parameter 'min_score'"),
        ("POST", "/predict", b"x" * 200_001, {}, 413, "larger than 200000 bytes"),
    ],
)
def test_errors_are_sentences(
    client: TestClient, method: str, path: str, content: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    answer = client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_unknown_outputs_are_refused(client: TestClient) -> None:
    request = {**infer_request(frame()[None]), "outputs": [{"name": "masks"}]}
    answer = client.post(f"{MODEL}/infer", json=request)
    assert answer.status_code == 400
    assert "the model has no output 'masks'; it has instance_ids" in answer.json()["error"]


def test_a_full_queue_turns_requests_away_and_recovers(predictor: Predictor) -> None:
    entered, release = threading.Event(), threading.Event()
    run = predictor.backend.run

    def slow_run(images: np.ndarray) -> Any:
        entered.set()
        assert release.wait(20)
        return run(images)

    predictor.backend.run = slow_run  # type: ignore[method-assign]
    image = encode_png(color_image())
    with TestClient(build_app(predictor, ServerLimits(max_waiting=0))) as client:
        answers: list[int] = []
        first = threading.Thread(target=lambda: answers.append(client.post("/predict", content=image).status_code))
        first.start()
        assert entered.wait(20)
        refused = client.post("/predict", content=image)
        assert client.get("/v2/health/ready").status_code == 200
        release.set()
        first.join(20)
        assert answers == [200]
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "try again" in refused.json()["error"]
        assert client.post("/predict", content=image).status_code == 200


def test_a_closed_queue_finishes_what_runs() -> None:
    async def story() -> list[str]:
        queue, started, log = _Queue(max_waiting=1), threading.Event(), []

        def work() -> None:
            started.set()
            threading.Event().wait(0.05)
            log.append("worked")

        running = asyncio.create_task(queue.run(work))
        await asyncio.to_thread(started.wait, 20)
        await asyncio.to_thread(queue.close)
        await running
        assert not queue.is_open
        return log

    assert asyncio.run(story()) == ["worked"]


def test_a_place_is_given_back_after_an_error() -> None:
    queue = _Queue(max_waiting=0)
    with pytest.raises(ZeroDivisionError), queue.place():
        raise ZeroDivisionError
    with queue.place(), pytest.raises(RequestError, match="try again"), queue.place():
        pass
    queue.close()


def test_a_length_of_thousands_of_digits_is_a_bad_request(client: TestClient) -> None:
    answer = client.post(f"{MODEL}/infer", content=b"{}", headers={JSON_LENGTH: "9" * 5000})
    assert answer.status_code == 400
    assert len(answer.text) < 300


def test_a_client_that_goes_away_is_no_error_of_the_server() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(RequestError, match="went away"):
        asyncio.run(_read_body(request, 10))
