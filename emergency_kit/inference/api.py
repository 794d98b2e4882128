"""API: the routes of `emergency-kit serve` and their OpenAPI document.

In: HTTP. Out: /answer (ours), /v1/chat/completions and /v1/models (as in the OpenAI API), /cards, /health,
/metrics, /openapi.json, and the page. Every error has the form of the OpenAI API. What every request must pass
first stands in `admission.py`.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, AsyncIterator, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from emergency_kit import __version__
from emergency_kit.errors import DataError, KitError, ModelError, UsageError
from emergency_kit.inference.answer import Asked
from emergency_kit.inference.admission import Admission, Limits
from emergency_kit.inference.questions import ChatRequest, Question
from emergency_kit.inference.schemas import (
    AnswerOut, Completion, CompletionChoice, ErrorOut, Health, Knowledge, Line, ModelList, ModelOut, Reply, Usage)
from emergency_kit.inference.service import Service, Waiting, say_failure, sse
from emergency_kit.inference.slots import AnswerFailed, QueueFull

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
              ".svg": "image/svg+xml", ".png": "image/png", ".webmanifest": "application/manifest+json"}
NO_TOKEN_NEEDED = frozenset({"/health", "/openapi.json"})
RETRY_SECONDS = 2
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorOut, "description": "The request is not as the document says, or does not fit the model."},
    401: {"model": ErrorOut, "description": "The token is missing or wrong."},
    403: {"model": ErrorOut, "description": "The Host or Origin is not allowed."},
    408: {"model": ErrorOut, "description": "The body took too long."},
    413: {"model": ErrorOut, "description": "The body is too large."},
    429: {"model": ErrorOut, "description": "Too many requests from this address."},
    503: {"model": ErrorOut, "description": "Too many requests wait already."},
}
READING = {status: ERRORS[status] for status in (401, 403)}


def _asking(event_names: list[str]) -> dict[int | str, dict[str, Any]]:
    properties: dict[str, Any] = {"data": {"type": "string", "description": "JSON"}} | ({"event": {"enum": event_names}} if event_names else {})
    return ERRORS | {200: {"content": {"text/event-stream": {"schema": {"type": "object", "properties": properties, "required": ["data"]}}}}}




def page_files() -> dict[str, Path]:
    """Files of the page by path; `/` is its document."""
    files = {f"/{path.name}": path for path in sorted(PAGE.iterdir()) if path.suffix in PAGE_TYPES}
    return files | {"/": PAGE / "index.html"}


def build_app(service: Service, limits: Limits) -> Admission:
    """The application behind its gate."""
    files = page_files()
    limits = replace(limits, public=NO_TOKEN_NEEDED | files.keys(), page=frozenset(files))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="AI Emergency Kit", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan,
                  description="Answers to emergencies beside checked guidance. Not a doctor; call your local emergency number first.")
    _add_errors(app, service)
    _add_answers(app, service)
    _add_completions(app, service)
    _add_reading(app, service)
    for path, file in files.items():
        headers = {"service-worker-allowed": "/"} if file.name == "service_worker.js" else None
        app.add_api_route(path, _sender(file, headers), include_in_schema=False, methods=["GET", "HEAD"])
    _describe(app, with_token=bool(limits.token))
    return Admission(app, limits, service.metrics)


def _sender(file: Path, headers: dict[str, str] | None) -> Any:
    async def send() -> FileResponse:
        return FileResponse(file, media_type=PAGE_TYPES[file.suffix], headers=headers)

    return send


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/answer", response_model=AnswerOut, responses=_asking(["cards", "waiting", "line", "done", "error"]), summary="Answer a situation")
    async def answer(question: Question, request: Request) -> Response:
        """Sections, checked cards, checks and provenance; with `stream` as events: `cards`, `waiting`, `line`, then `done` or `error`."""
        client = _client(request, question.user)
        asked = await service.ask(client, situation=question.situation, country=question.country, card_ids=question.cards,
                                  max_tokens=question.max_tokens, temperature=question.temperature, seed=question.seed)
        if question.stream:
            return _event_stream(_answer_events(service, client, asked))
        whole = await service.whole(request, client, asked)
        return Response(status_code=499) if whole is None else Response(whole.model_dump_json(), media_type="application/json")


async def _answer_events(service: Service, client: str, asked: Asked) -> AsyncIterator[bytes]:
    yield sse("cards", asked.found)
    async with contextlib.aclosing(service.stream(client, asked)) as items:
        try:
            async for item in items:
                if isinstance(item, Waiting):
                    yield sse("waiting", item)
                elif isinstance(item, Line):
                    yield sse("line", item)
                elif isinstance(item, AnswerOut):
                    yield sse("done", item)
                elif item is None:
                    yield b": still there\n\n"
        except (KitError, QueueFull, AnswerFailed) as error:
            yield sse("error", _error_of(error)[1])


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=Completion, responses=_asking([]), summary="Chat completion, as in the OpenAI API")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The user's turns are answered as a situation, with the cards that fit; `emergency_kit` in the reply holds what /answer returns."""
        client = _client(request, body.user or "")
        asked = await service.ask(client, situation=body.situation, country=body.country, instruction=body.instruction, max_tokens=body.limit,
                                  temperature=body.temperature, seed=body.seed, stop=body.stop_texts, as_json=body.response_format is not None and body.response_format.type == "json_object")
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return _event_stream(_completion_chunks(service, client, asked, usage))
        whole = await service.whole(request, client, asked)
        if whole is None:
            return Response(status_code=499)
        completion = Completion(id=f"chatcmpl-{secrets.token_hex(12)}", created=whole.created, model=service.answerer.model_id, usage=_usage(whole),
                                choices=[CompletionChoice(message=Reply(content=whole.text), finish_reason=_finish(whole))], emergency_kit=whole)
        return Response(completion.model_dump_json(), media_type="application/json")


async def _completion_chunks(service: Service, client: str, asked: Asked, usage: bool) -> AsyncIterator[bytes]:
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": "chat.completion.chunk", "created": int(time.time()), "model": service.answerer.model_id}

    def chunk(delta: dict[str, str], finish: str | None = None, **more: Any) -> bytes:
        return sse("", head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more)

    yield chunk({"role": "assistant", "content": ""})
    async with contextlib.aclosing(service.stream(client, asked)) as items:
        try:
            async for item in items:
                if isinstance(item, str):
                    yield chunk({"content": item})
                elif isinstance(item, AnswerOut):
                    yield chunk({}, _finish(item), emergency_kit=item.model_dump())
                    if usage:
                        yield sse("", head | {"choices": [], "usage": _usage(item).model_dump()})
                    yield sse("", "[DONE]")
                elif not isinstance(item, Line):
                    yield b": still there\n\n"
        except (KitError, QueueFull, AnswerFailed) as error:
            yield sse("", _error_of(error)[1])


def _add_reading(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    @app.get("/v1/models", response_model=ModelList, responses=READING, summary="The one model, as in the OpenAI API")
    async def models() -> ModelList:
        return ModelList(data=[ModelOut(id=service.answerer.model_id, created=started)])

    knowledge = service.answerer.knowledge().model_dump_json()

    @app.get("/cards", response_model=Knowledge, responses=READING, summary="All cards and emergency numbers")
    async def cards() -> Response:
        """What a page keeps, to help without the server."""
        return Response(knowledge, media_type="application/json")

    @app.get("/health", response_model=Health, responses={403: ERRORS[403]}, summary="Whether the server can answer")
    async def health() -> Health:
        return Health(status="ok", version=__version__, running=service.slots.running_now, waiting=service.slots.waiting_now, slots=service.slots.size)

    @app.get("/metrics", responses=READING | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}, response_class=Response, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = first["msg"].removeprefix("Value error, ")
        return JSONResponse(_error_body(f"{place or 'body'}: {message}", "invalid_request_error", place or None, "invalid"), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_error_body(str(error.detail), "invalid_request_error", None, None), error.status_code, headers=error.headers)

    async def known(_: Request, error: Exception) -> JSONResponse:
        status, body = _error_of(error)
        if status == 503:
            service.metrics.refused.labels("queue").inc()
        return JSONResponse(body, status, headers={"retry-after": str(RETRY_SECONDS)} if status == 503 else None)

    for kind in (KitError, QueueFull, AnswerFailed):
        app.add_exception_handler(kind, known)

    @app.exception_handler(500)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        say_failure(error)
        return JSONResponse(_error_of(error)[1], 500)


def _error_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of an error that a request can cause."""
    if isinstance(error, QueueFull):
        return 503, _error_body(f"too many requests wait already; try again in {RETRY_SECONDS} s", "server_error", None, "queue")
    if isinstance(error, (DataError, UsageError, ModelError)):
        code = "context_length_exceeded" if isinstance(error, ModelError) else "invalid"
        return 400, _error_body(str(error), "invalid_request_error", None, code)
    return 500, _error_body("the server failed on this request; its log says more", "server_error", None, "failed")


def _error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message.encode("utf-8", "replace").decode(), "type": kind, "param": param, "code": code}}


def _client(request: Request, user: str) -> str:
    return f"{request.client.host if request.client else ''} {user}"


def _finish(answer: AnswerOut) -> Literal["stop", "length"]:
    return "stop" if answer.checks.ended else "length"


def _usage(answer: AnswerOut) -> Usage:
    read, written = answer.provenance.prompt_tokens, answer.provenance.completion_tokens
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"})


def _describe(app: FastAPI, with_token: bool) -> None:
    """Take FastAPI's own 422 out of the document, since a wrong request is a 400 here; name the token where one is needed."""
    document = app.openapi()
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    document["components"]["schemas"].pop("HTTPValidationError", None)
    document["components"]["schemas"].pop("ValidationError", None)
    if with_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health"]["get"]["security"] = []
