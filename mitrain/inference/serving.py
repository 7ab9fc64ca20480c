"""A run behind HTTP: a page to try it, ``/predict``, and ``/v1/chat/completions`` as OpenAI's clients speak it."""

import itertools
import json
import logging
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive

from mitrain.core.errors import ConfigError, UserError
from mitrain.inference.chats import Chats, decoded
from mitrain.inference.service import WAITING, Service, ServiceLimits
from mitrain.training.runs import Run

log = logging.getLogger(__name__)


def bounded(receive: Receive, most: int) -> Receive:
    """A request's body up to ``most`` bytes; HTTPException 413 beyond."""
    got = 0

    async def take() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise HTTPException(413, f"the request is larger than {most / 1e6:g} MB: send less, or raise --max-mb")
        return message

    return take


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request."""
    try:
        value = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise ConfigError("the request's body is not JSON") from None
    if not isinstance(value, dict):
        raise ConfigError("the request's body is not a JSON object")
    return value


async def asked(request: Request) -> tuple[dict[str, bytes], str, list[str], bool]:
    """A request's files by input, its text, its candidates, and whether the inputs are infused."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await asked_by_form(request)
    body = await body_of(request)
    if unknown := body.keys() - {"inputs", "text", "candidates", "infused"}:
        raise ConfigError(f"{min(unknown)[:40]!r} is no key of a request: give inputs, text, candidates, infused")
    inputs, text, choices = body.get("inputs") or {}, body.get("text") or "", body.get("candidates") or []
    infused = body.get("infused", True)
    texts = isinstance(text, str) and isinstance(choices, list) and all(isinstance(c, str) for c in choices)
    if not (texts and isinstance(inputs, dict) and isinstance(infused, bool)):
        raise ConfigError("give inputs={NAME: base64}, text as a string, candidates as a list of them, infused as a bool")
    return {name: decoded(value) for name, value in inputs.items()}, text, choices, infused


async def asked_by_form(request: Request) -> tuple[dict[str, bytes], str, list[str], bool]:
    try:
        async with request.form(max_files=16, max_fields=1000) as form:
            files = {n: await v.read() for n, v in form.multi_items() if not isinstance(v, str)}
            words = {n: [v for v in form.getlist(n) if isinstance(v, str)] for n in form}
    except MultiPartException as error:
        raise ConfigError(f"the form cannot be read ({error.message})") from None
    choices = [choice for choice in words.get("candidates", []) if choice.strip()]
    text, infused = (words.get("text") or [""])[0], (words.get("infused") or ["true"])[0]
    return files, text, choices, infused.lower() not in ("false", "0", "off")


def app_of(run: Run, limits: ServiceLimits) -> Starlette:
    """The application; `Starlette` runs it under any ASGI server."""
    from starlette.concurrency import run_in_threadpool

    service = Service(run, limits)
    chats = Chats(service)

    async def predict(request: Request) -> Any:
        return await run_in_threadpool(service.predict, *await asked(request))

    async def chat(request: Request) -> Any:
        body = await body_of(request)
        if not chats.streams(body):
            return await run_in_threadpool(chats.answer, body)
        events = chats.events(body)
        first = await run_in_threadpool(next, events)  # a fault before the first word has a status of its own
        return StreamingResponse(itertools.chain([first], events), media_type="text/event-stream")

    async def about(request: Request) -> Any:
        return service.about()

    async def health(request: Request) -> Any:
        return {"status": "ok", "run": run.config.name, "step": run.saved.step}

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics())

    def answering(respond: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Every fault as one line of JSON, never a traceback."""

        async def responded(request: Request) -> Response:
            bound = Request(request.scope, bounded(request.receive, int(limits.megabytes * 1e6)))
            try:
                found = await respond(bound)
                response = found if isinstance(found, Response) else JSONResponse(found)
            except Exception as error:
                response = failed(error)
            service.batcher.counts[f'{{path="{request.url.path}",status="{response.status_code}"}}'] += 1
            return response

        return responded

    gets = {"/": page, "/run": about, "/health": health, "/metrics": metrics}
    routes = [Route(path, answering(respond), methods=["GET"]) for path, respond in gets.items()]
    posts = {"/predict": predict, "/v1/chat/completions": chat}
    routes += [Route(path, answering(respond), methods=["POST"]) for path, respond in posts.items()]
    return Starlette(routes=routes, exception_handlers={HTTPException: missing})


async def page(request: Request) -> Response:
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
    headers = {"Content-Security-Policy": f"{policy}; img-src data: blob:; media-src blob:"}
    return FileResponse(Path(__file__).with_name("page.html"), headers=headers)


async def missing(request: Request, error: Exception) -> Response:
    return fault(error.status_code, f"{request.method} {request.url.path[:80]!r}: {error.detail}")


def failed(error: Exception) -> JSONResponse:
    if isinstance(error, UserError):
        return fault(400, str(error))
    if isinstance(error, HTTPException):
        return fault(error.status_code, error.detail)
    if isinstance(error, queue.Full):
        return fault(503, f"{WAITING} requests are waiting already: ask again later")
    if isinstance(error, ClientDisconnect):
        return fault(400, "the request ended before it was whole")
    log.error("a request failed", exc_info=error)
    return fault(500, "the server has failed at this request: its log says more")


def fault(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": " ".join(message.split()), "type": kind}}, status)
