"""The HTTP server: Open Inference Protocol v2 for programs, ``POST /predict`` for an image file as it is.

``/v2`` speaks of tensors: a batch of frames that were fitted into the network input already goes in, the five arrays of
the graph come out, as JSON numbers or through the protocol's binary extension. ``/predict`` takes the bytes of any
image file and answers in pixels of that image, with COCO boxes and RLE masks. The version of a model is its step + 1,
as versions begin with 1.

One thread runs the model, in order of arrival; the next request is decoded and the last one's answer encoded in others
meanwhile. A bounded number of requests waits, as bytes; further ones are turned away with 503, and so are all that wait
when the server stops. Every error is ``{"error": sentence}``. Health and metadata wait for nothing.

Source: Open Inference Protocol, version 2, HTTP/REST, with the binary tensor data extension.
"""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cl4wsis import __version__
from cl4wsis.bundle import Manifest, TensorInfo
from cl4wsis.errors import BackendError, DataError, require
from cl4wsis.images import decode_image
from cl4wsis.instances import Instances
from cl4wsis_serve.predictor import Predictor

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)

_DATATYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32"}
_JSON_LENGTH = "Inference-Header-Content-Length"
_MAX_DIGITS = 12
"""Of a number of bytes; Python refuses to read numbers of thousands of digits."""
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGE_BODY = {"requestBody": {"required": True, "content": {"image/*": _BINARY}}}
_INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["inputs"]}},
            "application/octet-stream": _BINARY,
        },
    }
}
"""Bodies that routes read themselves, as the OpenAPI document describes them."""
_EXTENSIONS = ("binary_tensor_data",)
_SHUTDOWN_SECONDS = 30
_AT_WORK = 2
"""Requests that are decoded, run or described at the same time: one ahead of the one that runs."""
_DISCARDED_BYTES, _DISCARDED_SECONDS = 256 * 2**20, 30
"""How much of a body is read after its request has been refused."""

Tensors = dict[str, NDArray[Any]]
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class ServerLimits:
    """What one request may cost, and how many may wait."""

    max_body_bytes: int = 32 * 2**20
    max_batch: int = 8
    """Images in one request."""
    max_waiting: int = 16
    """Requests that wait while another is answered."""
    max_arriving: int = 16
    """Requests whose bodies arrive at the same time, beyond as many as may wait."""
    body_seconds: float = 60
    """Time in which the body of a request must arrive."""


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status code.
        sentence: what is wrong and what to do, for the client.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence


def serve(predictor: Predictor, host: str, port: int, limits: ServerLimits, started: Callable[[str], None]) -> None:
    """Answer requests until the process is told to stop (SIGINT, SIGTERM); running requests are finished first.

    Args:
        predictor: an open model.
        host: address to listen on.
        port: 0 for any that is free.
        limits: of one request and of the queue.
        started: called with the server's address when it listens.

    Raises:
        BackendError: the address cannot be used.
        MissingExtraError: fastapi or uvicorn is not installed.
    """
    require("serve")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise BackendError(f"cannot listen on {host}:{port}: {reason}; choose others with --host and --port") from error
    with listener:
        server = build_server(predictor, limits)
        name = f"[{host}]" if family == socket.AF_INET6 else host
        started(f"http://{name}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def build_server(predictor: Predictor, limits: ServerLimits = ServerLimits()) -> "uvicorn.Server":
    """Build what listens; when it is told to stop, it turns away who waits and finishes what runs.

    Args:
        predictor: an open model.
        limits: of one request and of the queue.

    Raises:
        MissingExtraError: fastapi or uvicorn is not installed.
    """
    require("serve")
    import uvicorn

    app = build_app(predictor, limits)

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.queue.stop()
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS)
    )


def build_app(predictor: Predictor, limits: ServerLimits = ServerLimits()) -> "FastAPI":
    """Build the application.

    Args:
        predictor: an open model; the application is the only one to use it.
        limits: of one request and of the queue.

    Raises:
        MissingExtraError: fastapi is not installed.
    """
    require("serve")
    from fastapi import FastAPI

    queue = _Queue(limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        queue.close()

    app = FastAPI(title=predictor.manifest.name, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.queue = queue
    _add_error_handlers(app)
    _add_metadata_routes(app, predictor.manifest, queue)
    _add_infer_route(app, predictor, limits, queue)
    _add_predict_route(app, predictor, limits, queue)
    return app


class _Queue:
    """Who may come in, who is next, and the one thread that runs the model.

    A request passes three gates: few bodies arrive at the same time, few requests wait with theirs, and two are at
    work, one of which runs while the other is decoded, as a decoded image may be a thousand times as large as its
    bytes. Methods are called in the thread of the event loop.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._arriving = asyncio.Semaphore(limits.max_arriving + limits.max_waiting)
        self._waiting = asyncio.Semaphore(limits.max_waiting + 1)
        self._at_work = asyncio.Semaphore(_AT_WORK)
        self._model = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cl4wsis-run")
        self._deadlines: set[asyncio.Timeout] = set()
        self.is_open = True

    def arrival(self) -> AbstractAsyncContextManager[None]:
        """Let the body of a request arrive in a block, or turn the request away where too many do."""
        return _place(self._arriving)

    @asynccontextmanager
    async def turn(self, request: "Request") -> AsyncIterator[None]:
        """Wait for the turn of a request, or turn it away where too many wait; in the block it is at work."""
        async with _place(self._waiting):
            async with self.until(None):
                await self._at_work.acquire()
            try:
                await _check_client(request)
                yield
            finally:
                self._at_work.release()

    async def run(self, request: "Request", function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Call a function in the model's thread, after those who came before."""
        async with self.until(None):
            await self._model.acquire()
        try:
            await _check_client(request)
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except asyncio.CancelledError:
            self._check_open()  # it ran for longer than a server that stops waits for it
            raise
        finally:
            self._model.release()

    @asynccontextmanager
    async def until(self, seconds: float | None, sentence: str = "") -> AsyncIterator[None]:
        """Wait for something in a block, for so long, and no longer than until the server stops.

        Raises:
            RequestError: the time is over, which the sentence says, or the server stops.
        """
        self._check_open()
        try:
            async with asyncio.timeout(seconds) as deadline:
                self._deadlines.add(deadline)
                try:
                    yield
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError as error:
            self._check_open()
            raise RequestError(HTTPStatus.REQUEST_TIMEOUT, sentence) from error

    def stop(self) -> None:
        """Turn away all who wait, and who come from now on; the one that runs is finished."""
        self.is_open = False
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0)

    def close(self) -> None:
        """Finish what is running and take no more."""
        self.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _check_open(self) -> None:
        if not self.is_open:
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping; try again when it is back")


@asynccontextmanager
async def _place(places: asyncio.Semaphore) -> AsyncIterator[None]:
    """Hold one of a number of places, or turn the request away where none is free."""
    if places.locked():
        raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are waiting; try again in a moment")
    async with places:
        yield


async def _check_client(request: "Request") -> None:
    """Stop here where nobody is left to read the answer, which the log need not tell."""
    if await request.is_disconnected():
        raise _bad("the client went away before its request was answered")


# --- routes ---


def _add_metadata_routes(app: "FastAPI", manifest: Manifest, queue: _Queue) -> None:
    from fastapi.responses import JSONResponse

    def readiness() -> JSONResponse:
        status = HTTPStatus.OK if queue.is_open else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"ready": queue.is_open}, status)

    @app.head("/v2", include_in_schema=False)
    @app.get("/v2")
    async def server_metadata() -> dict[str, Any]:
        return {"name": "cl4wsis", "version": __version__, "extensions": list(_EXTENSIONS)}

    @app.head("/v2/health/live", include_in_schema=False)
    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.head("/v2/health/ready", include_in_schema=False)
    @app.get("/v2/health/ready")
    async def ready() -> JSONResponse:
        return readiness()

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
        _check_model(manifest, name, version)
        return {
            "name": manifest.name,
            "versions": [_version(manifest)],
            "platform": "onnx",
            "inputs": [_tensor_metadata(tensor) for tensor in manifest.inputs],
            "outputs": [_tensor_metadata(tensor) for tensor in manifest.outputs],
        }

    @app.head("/v2/models/{name}/ready", include_in_schema=False)
    @app.head("/v2/models/{name}/versions/{version}/ready", include_in_schema=False)
    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str | None = None) -> JSONResponse:
        _check_model(manifest, name, version)
        return readiness()


def _add_infer_route(app: "FastAPI", predictor: Predictor, limits: ServerLimits, queue: _Queue) -> None:
    from fastapi import Request
    from fastapi.responses import Response

    manifest = predictor.manifest

    @app.post("/v2/models/{name}/infer", openapi_extra=_INFER_BODY)
    @app.post("/v2/models/{name}/versions/{version}/infer", openapi_extra=_INFER_BODY)
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        _check_model(manifest, name, version)
        body = await _read_body(request, limits, queue)
        json_length = request.headers.get(_JSON_LENGTH)
        async with queue.turn(request):
            header, frames = await asyncio.to_thread(parse_infer_request, body, json_length, manifest, limits.max_batch)
            instances = await queue.run(request, predictor.predict_batch, list(frames))
            content, length = await asyncio.to_thread(build_infer_response, header, instances, manifest)
        if length is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={_JSON_LENGTH: str(length)})


def _add_predict_route(app: "FastAPI", predictor: Predictor, limits: ServerLimits, queue: _Queue) -> None:
    from fastapi import Query, Request

    names = [info.name for info in predictor.classes]

    @app.post("/predict", openapi_extra=_IMAGE_BODY)
    async def predict(request: Request, min_score: float = Query(0.0, ge=0.0, le=1.0)) -> dict[str, Any]:
        body = await _read_body(request, limits, queue)
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RequestError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "the request's body is a form; send the bytes of the image file themselves, as they are "
                "(curl --data-binary @photo.jpg)",
            )
        async with queue.turn(request):
            image = await asyncio.to_thread(decode_image, body, "the request's body")
            instances = await queue.run(request, predictor.predict, image)
            rows = await asyncio.to_thread(_instance_rows, instances, min_score, names)
        height, width = image.shape[:2]
        return {"model": predictor.manifest.name, "height": height, "width": width, "instances": rows}


def _instance_rows(instances: Instances, min_score: float, names: Sequence[str]) -> list[dict[str, Any]]:
    """Describe instances as COCO annotations do, with label and class name beside the category id (label + 1)."""
    kept = instances.select(instances.scores >= min_score)
    columns = zip(kept.to_coco(), kept.labels.tolist(), kept.areas.tolist(), strict=True)
    return [
        {
            "label": label,
            "name": names[label],
            "score": annotation["score"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": area,
            "segmentation": annotation["segmentation"],
        }
        for annotation, label, area in columns
    ]


async def _read_body(request: "Request", limits: ServerLimits, queue: _Queue) -> bytes:
    """Read a body that may lie about its length, that may never end, and that may be one of too many."""
    from starlette.requests import ClientDisconnect

    async with aclosing(request.stream()) as chunks:
        try:
            async with queue.arrival():
                return await _collect(request, chunks, limits, queue)
        except ClientDisconnect as error:
            raise _bad("the client went away before its request was complete") from error
        except RequestError as error:
            if error.status != HTTPStatus.REQUEST_TIMEOUT and "expect" not in request.headers:
                await _discard(chunks, queue)
            raise


async def _collect(
    request: "Request", chunks: AsyncGenerator[bytes, None], limits: ServerLimits, queue: _Queue
) -> bytes:
    too_large = RequestError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the request's body is larger than {limits.max_body_bytes} bytes; send a smaller image or fewer of them",
    )
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > _MAX_DIGITS or int(stated) > limits.max_body_bytes):
        raise too_large
    body = bytearray()
    late = f"the request's body did not arrive within {limits.body_seconds:g} s; send a smaller image, or try again"
    async with queue.until(limits.body_seconds, late):
        async for chunk in chunks:
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise too_large
    return bytes(body)


async def _discard(chunks: AsyncGenerator[bytes, None], queue: _Queue) -> None:
    """Read on for a while and keep nothing: most clients look for an answer only once they have sent everything.

    Those which look earlier say so with the header ``Expect``.
    """
    from starlette.requests import ClientDisconnect

    size = 0
    with suppress(ClientDisconnect, RequestError):
        async with queue.until(_DISCARDED_SECONDS):
            async for chunk in chunks:
                size += len(chunk)
                if size > _DISCARDED_BYTES:
                    return


# --- Open Inference Protocol ---


def parse_infer_request(
    body: bytes, json_length: str | None, manifest: Manifest, max_batch: int
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Read an inference request.

    Args:
        body: JSON, followed by the bytes of the input where the binary extension is used.
        json_length: value of the header that says how long the JSON is; none if it is all of the body.
        manifest: names and sizes of inputs and outputs.
        max_batch: images that one request may hold.

    Returns:
        The JSON object, with an ``outputs`` list that names only outputs there are; and the images, (B, H, W, 3) uint8.

    Raises:
        RequestError: with the field that is wrong.
    """
    header, rest = _split_body(body, json_length)
    inputs = header.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise _bad("'inputs' must be a list of one tensor")
    tensor = inputs[0]
    stated = manifest.inputs[0]
    if tensor.get("name") != stated.name:
        raise _bad(f"the model has one input, '{stated.name}'; found {tensor.get('name')!r}")
    if tensor.get("datatype") != _DATATYPES[stated.dtype]:
        raise _bad(f"input '{stated.name}' must be {_DATATYPES[stated.dtype]}, found {tensor.get('datatype')!r}")
    shape = _checked_shape(tensor.get("shape"), stated, max_batch)
    _check_requested_outputs(header, manifest)
    return header, _tensor_values(tensor, rest, shape)


def build_infer_response(
    request: Mapping[str, Any], instances: Sequence[Instances], manifest: Manifest
) -> tuple[bytes, int | None]:
    """Write the answer to an inference request.

    Args:
        request: its JSON object; says which outputs are wanted, and which of them as bytes.
        instances: one per image, in pixels of the network input.
        manifest: names and shapes of the outputs.

    Returns:
        The body; and the length of its JSON part if bytes of tensors follow it.
    """
    everything_binary = _parameters(request).get("binary_data_output") is True
    requested = request.get("outputs") or [{"name": tensor.name} for tensor in manifest.outputs]
    tensors = _slots_from_instances(instances, manifest)
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output in requested:
        array = tensors[output["name"]]
        entry = {"name": output["name"], "datatype": _DATATYPES[array.dtype.name], "shape": list(array.shape)}
        if _parameters(output).get("binary_data", everything_binary) is True:
            binary.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = array.reshape(-1).tolist()
        outputs.append(entry)
    answer = {"model_name": manifest.name, "model_version": _version(manifest), "outputs": outputs}
    if "id" in request:
        answer["id"] = request["id"]
    text = json.dumps(answer).encode()
    return text + b"".join(binary), len(text) if binary else None


def _split_body(body: bytes, json_length: str | None) -> tuple[dict[str, Any], bytes]:
    length = len(body)
    if json_length is not None:
        if not json_length.isdecimal() or len(json_length) > _MAX_DIGITS or int(json_length) > length:
            raise _bad(f"header {_JSON_LENGTH} is {json_length[: _MAX_DIGITS + 1]!r}, but the body has {length} bytes")
        length = int(json_length)
    try:
        header = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise _bad(f"the request is no JSON ({error}); an image file goes to /predict") from error
    if not isinstance(header, dict):
        raise _bad("the request must be a JSON object with 'inputs'")
    return header, body[length:]


def _checked_shape(shape: Any, stated: TensorInfo, max_batch: int) -> tuple[int, ...]:
    fixed = [side for side in stated.shape if isinstance(side, int)]
    is_fitting = (
        isinstance(shape, list)
        and len(shape) == len(stated.shape)
        and all(type(side) is int for side in shape)
        and shape[1:] == fixed
    )
    if not is_fitting:
        raise _bad(
            f"input '{stated.name}' must have shape [batch, {', '.join(map(str, fixed))}], found {shape}; "
            "fit images into that size first, or send image files to /predict"
        )
    if not 1 <= shape[0] <= max_batch:
        raise _bad(f"a request may hold 1 to {max_batch} images, found {shape[0]}")
    return tuple(shape)


def _check_requested_outputs(header: Mapping[str, Any], manifest: Manifest) -> None:
    requested = header.get("outputs") or []
    known = [tensor.name for tensor in manifest.outputs]
    if not isinstance(requested, list) or not all(isinstance(output, dict) for output in requested):
        raise _bad("'outputs' must be a list of objects with a 'name'")
    for output in requested:
        if output.get("name") not in known:
            raise _bad(f"the model has no output {output.get('name')!r}; it has {', '.join(known)}")


def _tensor_values(tensor: Mapping[str, Any], rest: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    expected, name = int(np.prod(shape)), tensor["name"]
    size = _parameters(tensor).get("binary_data_size")
    if size is not None:
        if size != expected or len(rest) != expected:
            raise _bad(
                f"input '{name}' of shape {list(shape)} has {expected} bytes; "
                f"binary_data_size says {size}, and {len(rest)} bytes follow the JSON"
            )
        return np.frombuffer(rest, np.uint8).reshape(shape)
    if rest:
        raise _bad(f"{len(rest)} bytes follow the JSON, but input '{name}' states no binary_data_size")
    try:
        values = np.asarray(tensor.get("data"))
    except ValueError as error:
        raise _bad(f"'data' of input '{name}' is no array of numbers ({error})") from error
    if values.size != expected or values.dtype.kind not in "iu":
        raise _bad(
            f"'data' of input '{name}' must hold {expected} whole numbers, found {values.size} of type {values.dtype}"
        )
    if values.min() < 0 or values.max() > 255:
        raise _bad(f"'data' of input '{name}' must lie in 0..255, found {values.min()}..{values.max()}")
    return values.astype(np.uint8).reshape(shape)


def _slots_from_instances(instances: Sequence[Instances], manifest: Manifest) -> Tensors:
    """Lay instances into the arrays of the graph's contract: one row of K slots per image, unused ones zero."""
    shapes = {tensor.name: tensor.shape for tensor in manifest.outputs}
    slots = int(shapes["labels"][1])
    count = len(instances)
    tensors: Tensors = {
        "instance_ids": np.stack([answer.instance_ids for answer in instances]).astype(np.uint8),
        "labels": np.zeros((count, slots), np.int32),
        "scores": np.zeros((count, slots), np.float32),
        "areas": np.zeros((count, slots), np.int32),
        "boxes": np.zeros((count, slots, 4), np.float32),
    }
    for row, answer in enumerate(instances):
        for name, values in (
            ("labels", answer.labels),
            ("scores", answer.scores),
            ("areas", answer.areas),
            ("boxes", answer.boxes),
        ):
            tensors[name][row, : len(answer)] = values
    return tensors


def _tensor_metadata(tensor: TensorInfo) -> dict[str, Any]:
    shape = [side if isinstance(side, int) else -1 for side in tensor.shape]
    return {"name": tensor.name, "datatype": _DATATYPES[tensor.dtype], "shape": shape}


def _check_model(manifest: Manifest, name: str, version: str | None) -> None:
    if name != manifest.name:
        raise RequestError(HTTPStatus.NOT_FOUND, f"there is no model '{name}'; this server has '{manifest.name}'")
    if version is not None and version != _version(manifest):
        raise RequestError(
            HTTPStatus.NOT_FOUND, f"model '{name}' has no version '{version}'; it has '{_version(manifest)}'"
        )


def _version(manifest: Manifest) -> str:
    return str(manifest.step + 1)


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = entry.get("parameters")
    return parameters if isinstance(parameters, dict) else {}


def _bad(sentence: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, sentence)


# --- errors ---


def _add_error_handlers(app: "FastAPI") -> None:
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def answer(status: int, sentence: str) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
        return JSONResponse({"error": sentence}, status, headers)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> JSONResponse:
        return answer(error.status, error.sentence)

    @app.exception_handler(DataError)
    async def unreadable(_: Request, error: DataError) -> JSONResponse:
        return answer(HTTPStatus.BAD_REQUEST, str(error))

    @app.exception_handler(BackendError)
    async def failed(_: Request, error: BackendError) -> JSONResponse:
        logger.error("%s", error)
        return answer(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(HTTPStatus.BAD_REQUEST, f"parameter '{first['loc'][-1]}': {first['msg']}")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        known = "GET /v2, POST /v2/models/<name>/infer and POST /predict"
        return answer(error.status_code, f"{request.method} {request.url.path}: {error.detail}; there are {known}")

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return answer(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request; its log says why")
