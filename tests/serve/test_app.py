"""The HTTP server with a real graph: what the protocol says, what it answers, and what it turns away."""

import asyncio
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SIZE, SLOTS, color_image, write_color_bundle
from pycocotools import mask as coco_mask

from cl4wsis.images import decode_image, encode_png
from cl4wsis.instances import Instances
from cl4wsis_serve import Predictor

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("httpx2", reason="needs what starlette's test client is made of")
from fastapi.testclient import TestClient
from starlette.requests import Request

from cl4wsis_serve.app import RequestError, ServerLimits, _Queue, _read_body, build_app, build_server

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


def request_from(*messages: dict[str, Any], headers: dict[str, str] | None = None) -> Request:
    """Make a request whose client sends these messages and then nothing more."""
    waiting = list(messages)

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return Request({"type": "http", "headers": pairs}, receive)


def test_a_closed_queue_finishes_what_runs() -> None:
    async def story() -> list[str]:
        queue, started, log = _Queue(ServerLimits()), threading.Event(), []

        def work() -> None:
            started.set()
            threading.Event().wait(0.05)
            log.append("worked")

        running = asyncio.create_task(queue.run(request_from(), work))
        await asyncio.to_thread(started.wait, 20)
        await asyncio.to_thread(queue.close)
        await running
        assert not queue.is_open
        return log

    assert asyncio.run(story()) == ["worked"]


def test_stopping_while_a_time_limit_ends_is_no_error() -> None:
    async def story() -> None:
        queue = _Queue(ServerLimits())
        async with queue.until(0.0, "too late"):
            try:
                await asyncio.Event().wait()
            finally:
                queue.stop()

    with pytest.raises(RequestError, match="the server is stopping"):
        asyncio.run(story())


def test_a_place_is_given_back_after_an_error() -> None:
    async def story() -> None:
        queue = _Queue(ServerLimits(max_waiting=0))
        with pytest.raises(ZeroDivisionError):
            async with queue.turn(request_from()):
                raise ZeroDivisionError
        async with queue.turn(request_from()):
            with pytest.raises(RequestError, match="try again"):
                async with queue.turn(request_from()):
                    pass
        queue.close()

    asyncio.run(story())


def test_a_form_is_refused_with_the_way_to_send_a_file(client: TestClient) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + encode_png(color_image()) + b"\r\n--x--"
    answer = client.post("/predict", content=form, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 415
    assert "curl --data-binary @photo.jpg" in answer.json()["error"]
    other = {"Content-Type": "application/x-www-form-urlencoded"}  # which curl says of --data-binary
    assert client.post("/predict", content=encode_png(color_image()), headers=other).status_code == 200


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live", "/v2/health/ready", f"{MODEL}/ready"])
def test_health_answers_head_requests(client: TestClient, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")


def test_the_openapi_document_describes_bodies(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert list(paths["/predict"]["post"]["requestBody"]["content"]) == ["image/*"]
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        body = paths[path]["post"]["requestBody"]
        assert body["required"]
        assert list(body["content"]) == ["application/json", "application/octet-stream"]


def test_instances_are_selected_outside_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    select, in_loop = Instances.select, []

    def select_and_note(instances: Instances, keep: np.ndarray) -> Instances:
        with suppress(RuntimeError):
            in_loop.append(asyncio.get_running_loop())
        return select(instances, keep)

    monkeypatch.setattr(Instances, "select", select_and_note)
    assert len(client.post("/predict?min_score=0.7", content=encode_png(color_image())).json()["instances"]) == 1
    assert in_loop == []


def test_a_length_of_thousands_of_digits_is_a_bad_request(client: TestClient) -> None:
    answer = client.post(f"{MODEL}/infer", content=b"{}", headers={JSON_LENGTH: "9" * 5000})
    assert answer.status_code == 400
    assert len(answer.text) < 300


def test_a_client_that_goes_away_is_no_error_of_the_server() -> None:
    async def story() -> None:
        request = request_from({"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"})
        await _read_body(request, ServerLimits(), _Queue(ServerLimits()))

    with pytest.raises(RequestError, match="went away"):
        asyncio.run(story())


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("expects", [True, False])
def test_a_body_that_is_too_large_is_read_to_its_end_unless_the_client_looks_earlier(
    stated: bool, expects: bool
) -> None:
    chunk = {"type": "http.request", "body": bytes(10), "more_body": True}
    messages = [chunk] * 5 + [{**chunk, "more_body": False}]
    headers = ({"Content-Length": "60"} if stated else {}) | ({"Expect": "100-continue"} if expects else {})
    left: list[int] = []

    async def story() -> None:
        request = request_from(*messages, headers=headers)
        receive = request._receive

        async def count() -> Any:
            left.append(1)
            return await receive()

        request._receive = count
        limits = ServerLimits(max_body_bytes=20)
        await _read_body(request, limits, _Queue(limits))

    with pytest.raises(RequestError, match="larger than 20 bytes"):
        asyncio.run(story())
    assert len(left) == ((0 if stated else 3) if expects else 6)


# --- a server that listens ---


class Gate:
    """Lets the model run when it is told to, and counts how often it has begun."""

    def __init__(self, predictor: Predictor) -> None:
        self.begun = threading.Semaphore(0)
        self.open = threading.Event()
        self.runs = 0
        self._run = predictor.backend.run
        predictor.backend.run = self.run  # type: ignore[method-assign]

    def run(self, images: np.ndarray) -> Any:
        self.runs += 1
        self.begun.release()
        assert self.open.wait(20)
        return self._run(images)


@contextmanager
def listening(predictor: Predictor, limits: ServerLimits | None = None) -> Iterator[tuple[Any, int]]:
    """Run a server in a thread; leaving the block tells it to stop."""
    server = build_server(predictor, limits or ServerLimits())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive()


def ask(port: int, path: str = "/predict", body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    with closing(connection):
        connection.request("GET" if body is None else "POST", path, body)
        answer = connection.getresponse()
        return answer.status, json.load(answer)


def send(port: int, body: bytes, length: int | None = None) -> socket.socket:
    """Send a request, or the beginning of one, and do not wait for the answer."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (length or len(body), body)
    )
    return connection


def answer_on(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    with connection:
        answer = http.client.HTTPResponse(connection, method="POST")
        answer.begin()
        return answer.status, json.load(answer)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def colors(tmp_path: Path) -> Predictor:
    return Predictor.open(write_color_bundle(tmp_path / "colors.cl4wsis"), "onnxruntime", threads=1)


IMAGE = encode_png(color_image())


def test_images_are_decoded_one_ahead_of_the_one_that_runs(colors: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def decode_and_note(content: bytes, name: str) -> np.ndarray:
        decoded.append(name)
        return decode_image(content, name)

    monkeypatch.setattr("cl4wsis_serve.app.decode_image", decode_and_note)
    gate = Gate(colors)
    with listening(colors) as (_, port), ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(ask, port, body=IMAGE) for _ in range(6)]
        wait_for(lambda: len(decoded) == 2)
        time.sleep(0.2)
        assert (len(decoded), gate.runs) == (2, 1)
        gate.open.set()
        assert [answer.result()[0] for answer in answers] == [200] * 6


def test_health_answers_however_many_connections_are_silent(colors: Predictor) -> None:
    with listening(colors) as (_, port), ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert ask(port, "/v2/health/live") == (200, {"live": True})
        assert ask(port, "/predict", IMAGE)[0] == 200


def test_bodies_that_stall_are_bounded_in_number_and_time(colors: Predictor) -> None:
    with listening(colors, ServerLimits(max_waiting=1, max_arriving=2, body_seconds=1)) as (server, port):
        stalled = [send(port, b"abc", 1000) for _ in range(3)]
        queue = server.config.app.state.queue
        wait_for(queue._arriving.locked)
        status, answer = ask(port, "/predict", IMAGE)
        assert (status, answer["error"]) == (503, "too many requests are waiting; try again in a moment")
        assert ask(port, "/v2/health/ready") == (200, {"ready": True})
        for connection in stalled:
            status, answer = answer_on(connection)
            assert status == 408
            assert "did not arrive within 1 s" in answer["error"]
        assert ask(port, "/predict", IMAGE)[0] == 200


def test_requests_whose_client_has_gone_are_not_run(colors: Predictor) -> None:
    gate = Gate(colors)
    with listening(colors) as (server, port), ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, port, body=IMAGE)
        assert gate.begun.acquire(timeout=20)
        queue = server.config.app.state.queue
        for connection in [send(port, IMAGE) for _ in range(5)]:
            connection.close()
        wait_for(lambda: queue._waiting._value == ServerLimits().max_waiting - 5)
        last = clients.submit(ask, port, body=IMAGE)
        gate.open.set()
        assert (first.result()[0], last.result()[0]) == (200, 200)
    assert gate.runs == 2


def test_a_server_that_stops_turns_away_who_waits_and_finishes_what_runs(
    colors: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(colors)
    with listening(colors) as (server, port), ThreadPoolExecutor(5) as clients:
        first = clients.submit(ask, port, body=IMAGE)
        assert gate.begun.acquire(timeout=20)
        queue = server.config.app.state.queue
        waiting = [clients.submit(ask, port, body=IMAGE) for _ in range(3)]
        arriving = send(port, b"abc", 1000)
        wait_for(lambda: queue._waiting._value == ServerLimits().max_waiting - 3)
        wait_for(lambda: queue._arriving._value == ServerLimits().max_arriving + ServerLimits().max_waiting - 1)
        server.should_exit = True
        for status, answer in [*(future.result() for future in waiting), answer_on(arriving)]:
            assert (status, answer["error"]) == (503, "the server is stopping; try again when it is back")
        assert not first.done()
        gate.open.set()
        assert first.result()[0] == 200
    assert gate.runs == 1
    assert caplog.text == ""


def test_what_runs_too_long_for_a_server_that_stops_is_told_so(
    colors: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cl4wsis_serve.app._SHUTDOWN_SECONDS", 0.1)
    gate = Gate(colors)
    with listening(colors) as (server, port), ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, port, body=IMAGE)
        assert gate.begun.acquire(timeout=20)
        server.should_exit = True
        threading.Timer(1, gate.open.set).start()
        status, answer = first.result()
        assert (status, answer["error"]) == (503, "the server is stopping; try again when it is back")
    assert "Traceback" not in caplog.text


def test_clients_that_send_everything_first_see_why_it_is_too_much(colors: Predictor) -> None:
    body = bytes(20_000_000)
    with listening(colors, ServerLimits(max_body_bytes=100_000)) as (_, port):
        for _ in range(3):
            status, answer = ask(port, "/predict", body)
            assert (status, answer["error"][:48]) == (413, "the request's body is larger than 100000 bytes; ")
            request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, method="POST")
            with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=20):
                pass
            with refused.value as error:
                assert (error.code, "larger than" in json.load(error)["error"]) == (413, True)
