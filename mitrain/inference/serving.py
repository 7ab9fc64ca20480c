"""A run behind HTTP: a page to try it, ``/predict``, and ``/v1/chat/completions`` as OpenAI's clients speak it.

Requests of all connections wait in one queue; one thread answers them in batches. What is sent are bytes, which are written
to a folder of their own and read as any file of a sample: no request can name a file of this machine.
"""

import base64
import binascii
import io
import json
import logging
import queue
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive

from mitrain.core.errors import ConfigError, UserError
from mitrain.core.version import __version__
from mitrain.data.formats.conversations import asked_behind
from mitrain.data.images import open_image
from mitrain.data.sources import limit
from mitrain.inference.export import SUFFIXES
from mitrain.inference.scoring import Asked, ask_all, masked_input
from mitrain.tasks import figures
from mitrain.tasks.base import Answer
from mitrain.tasks.language import told_to_speak
from mitrain.training.build import resolve_data
from mitrain.training.runs import Run

log = logging.getLogger(__name__)

WAITING = 256  # requests in the queue; more are turned away
GALLERY = 200  # texts of the data that a retrieval run finds matches among
NEAREST = 10
IGNORED = ("model", "messages", "user", "metadata")  # of a chat request: change no answer
FIXED = {"stream": False, "n": 1}
SPOKEN = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
SPOKEN |= {name: name for name in ("temperature", "top_p")}
"""What a chat request may set, and the setting of the task that it is."""
How = tuple[bool, tuple[tuple[str, Any], ...]]
"""Whether the inputs are infused, and the settings by which the model speaks: alike for all samples of a batch."""


@dataclass(frozen=True)
class Limits:
    """``megabytes`` of a request; a batch has at most ``batch`` samples and waits ``milliseconds`` for more.
    ``generation``: settings of the task by which it speaks, in place of the run's."""

    megabytes: float = 64
    batch: int = 8
    milliseconds: float = 10
    generation: Mapping[str, Any] = field(default_factory=dict)


class Batcher:
    """One thread that answers what any thread asks, several samples together."""

    def __init__(self, run: Run, limits: Limits):
        self.run, self.limits = run, limits
        self.waiting: queue.Queue[tuple[Asked, How, Future[Answer]]] = queue.Queue(WAITING)
        self.counts: Counter[str] = Counter()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, asked: Asked, how: How) -> Answer:
        """The answer; raises what asking does, and `queue.Full` where too many wait."""
        future: Future[Answer] = Future()
        self.waiting.put_nowait((asked, how, future))
        return future.result()

    def _work(self) -> None:
        while True:
            batch, until = [self.waiting.get()], time.monotonic() + self.limits.milliseconds / 1000
            while len(batch) < self.limits.batch:
                try:
                    batch.append(self.waiting.get(timeout=max(until - time.monotonic(), 0)))
                except queue.Empty:
                    break
            for how in dict.fromkeys(how for _, how, _ in batch):
                self._answer([one for one in batch if one[1] == how], *how)

    def _answer(
        self, batch: Sequence[tuple[Asked, How, Future[Answer]]], infused: bool, generation: tuple[tuple[str, Any], ...]
    ) -> None:
        begun = time.monotonic()
        try:
            found: list[Any] = ask_all(self.run, [asked for asked, _, _ in batch], infused, dict(generation))
        except BaseException as error:  # the asking threads raise it again; this one goes on
            found = [error] * len(batch)
        self.counts.update(batches=1, samples=len(batch))
        self.counts["seconds"] += time.monotonic() - begun
        for (_, _, future), answer in zip(batch, found, strict=True):
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)


class Service:
    """What the routes do; they run in threads of the server's pool, but for the reading of requests."""

    def __init__(self, run: Run, limits: Limits):
        told_to_speak(run.model.task, limits.generation)  # or say what is wrong before anybody asks
        self.run, self.limits, self.batcher = run, limits, Batcher(run, limits)
        self.task = run.config.task.section_name
        self.takes = {part.input: part.takes for part in reversed(run.config.model.encoders.values())}
        self.gallery = self._texts() if self.task == "retrieve" else []

    def _texts(self) -> list[str]:
        try:
            samples = self.run.config.data.read(resolve_data(self.run.config.data), "val")
        except UserError as error:
            log.warning("the data cannot be read, so that matches are found among a request's candidates alone: %s", error)
            return []
        return limit(list(dict.fromkeys(sample.text for sample in samples)), GALLERY)

    def about(self) -> dict[str, Any]:
        """What the page shows of the run."""
        data, task = self.run.config.data, self.run.model.task
        inputs = {name: {"takes": self.takes[name], "may_lack": name in data.may_lack} for name in data.inputs}
        return {
            "name": self.run.config.name,
            "task": self.task,
            "step": self.run.saved.step,
            "inputs": inputs,
            "asks": task.asks,
            "needs_text": not task.reads_no_text,
            "candidates": self.task in ("answer", "retrieve"),
            "version": __version__,
        }

    def predict(
        self,
        contents: Mapping[str, bytes],
        text: str,
        candidates: Sequence[str],
        infused: bool,
        turns: tuple[str, ...] = (),
        generation: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The JSON values of an answer. UserError for what cannot be asked."""
        how = infused, tuple(sorted({**self.limits.generation, **(generation or {})}.items()))
        if self.task == "retrieve" and not candidates:
            candidates = self.gallery
        with tempfile.TemporaryDirectory() as folder:
            files = {name: self._written(Path(folder), name, content) for name, content in contents.items()}
            try:
                answer = self.batcher.ask(Asked(files, text, tuple(candidates) or None, turns), how)
            except UserError as error:  # the folder's name means nothing to those who ask
                raise type(error)(str(error).replace(f" in '{folder}'", "").replace(f"{folder}/", "")) from None
            values = {name: value for name, value in answer.values.items() if name not in files}
            if answer.mask is not None:
                picture = open_image(Path(folder), files[masked_input(self.run)].name, self.run.config.data.max_pixels)
                values["mask"] = as_uri(Image.fromarray(answer.mask.astype(np.uint8) * 255))
                values["overlay"] = as_uri(figures.overlay(picture, answer.mask))
        if "scores" in values:
            values["scores"] = dict(list(values["scores"].items())[:NEAREST])
        return values

    def _written(self, folder: Path, name: str, content: bytes) -> Path:
        if name not in self.takes:
            raise ConfigError(f"{name[:40]!r} is none of this run's inputs: it reads {', '.join(self.takes)}")
        path = folder / f"{name}{SUFFIXES[self.takes[name]]}"
        path.write_bytes(content)
        return path

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """An answer as OpenAI's API has it."""
        if self.task not in ("answer", "caption"):
            raise ConfigError(f"this run's task is {self.task!r}, which does not speak: ask /predict")
        contents, said, generation = self._conversation(body)
        text, turns = asked_behind(said)
        asked = text or ("?" if self.task == "caption" else "")
        values = self.predict(contents, asked, (), True, turns, generation)
        said = values.get("answer", values.get("caption"))
        counts = [len(self.run.model.text.plain(words)) for words in (text, said)]
        usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        made = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
        return {**made, "model": self.run.config.name, "choices": [choice], "usage": usage, "mitrain": values}

    def _conversation(self, body: Mapping[str, Any]) -> tuple[dict[str, bytes], list[str], dict[str, Any]]:
        """A chat request's files, its turns up to the question now, and the settings by which the model is to speak."""
        generation = {}
        for name, value in body.items():
            if name in SPOKEN and value is not None:
                generation[SPOKEN[name]] = value
            elif name not in IGNORED and not (name in (*FIXED, *SPOKEN) and value in (FIXED.get(name), None)):
                raise ConfigError(f"{name[:40]!r} cannot be set by a request, the run's configuration says it: leave it out")
        messages, contents = body.get("messages"), {}
        roles = ("user", "assistant")
        if not (
            isinstance(messages, list)
            and len(messages) % 2
            and all(is_a(m, "role", roles[i % 2]) for i, m in enumerate(messages))
        ):
            raise ConfigError(
                "give messages=[{role: user, content: …}], the user's and the assistant's in turn, the user's last; a system"
                " prompt is the run's (task.system)"
            )
        return contents, [self._text(message, contents) for message in messages], generation

    def _text(self, message: Mapping[str, Any], contents: dict[str, bytes]) -> str:
        """What a message says; its files go into ``contents``."""
        parts, texts = message.get("content"), []
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        for part in parts if isinstance(parts, list) else [None]:
            if is_a(part, "type", "text") and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif is_a(part, "type", "image_url") and isinstance(part.get("image_url"), dict):
                contents[self._free("image", contents)] = decoded(part["image_url"].get("url"), uri=True)
            elif is_a(part, "type", "input_audio") and isinstance(part.get("input_audio"), dict):
                contents[self._free("audio", contents)] = decoded(part["input_audio"].get("data"))
            else:
                raise ConfigError("content is text, or a list of parts of the types text, image_url and input_audio")
        return "\n".join(texts).strip()

    def _free(self, takes: str, given: Mapping[str, bytes]) -> str:
        """The run's next input for a file of a kind."""
        free = [name for name, kind in self.takes.items() if kind == takes and name not in given]
        if not free:
            raise ConfigError(f"this run has no input for this {takes}: it reads {', '.join(self.takes)}")
        return free[0]

    def metrics(self) -> str:
        """Counts in Prometheus' text format."""
        counts = self.batcher.counts
        values = {name: counts[name] for name in ("samples", "batches", "seconds")}
        lines = [f"# TYPE mitrain_{n}_total counter\nmitrain_{n}_total {v}" for n, v in values.items()]
        lines += ["# TYPE mitrain_waiting gauge", f"mitrain_waiting {self.batcher.waiting.qsize()}"]
        lines.append("# TYPE mitrain_requests_total counter")
        lines += [f"mitrain_requests_total{n} {c}" for n, c in sorted(counts.items()) if n.startswith("{")]
        return "\n".join(lines) + "\n"


def is_a(value: Any, key: str, wanted: str) -> bool:
    return isinstance(value, dict) and value.get(key) == wanted


def as_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def decoded(value: Any, uri: bool = False) -> bytes:
    """The bytes that base64, or a data: URI, stands for."""
    if not isinstance(value, str) or (uri and not value.startswith("data:")):
        raise ConfigError("files come with the request, as base64 or data: URIs; nothing is fetched, and no path is read")
    try:
        return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"a file is not valid base64 ({error})") from None


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


def app_of(run: Run, limits: Limits) -> Starlette:
    """The application; `Starlette` runs it under any ASGI server."""
    from starlette.concurrency import run_in_threadpool

    service = Service(run, limits)

    async def predict(request: Request) -> Any:
        return await run_in_threadpool(service.predict, *await asked(request))

    async def chat(request: Request) -> Any:
        return await run_in_threadpool(service.chat, await body_of(request))

    async def about(request: Request) -> Any:
        return service.about()

    async def health(request: Request) -> Any:
        return {"status": "ok", "run": run.config.name, "step": run.saved.step}

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics())

    async def page(request: Request) -> Response:
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": f"{policy}; img-src data: blob:; media-src blob:"}
        return FileResponse(Path(__file__).with_name("page.html"), headers=headers)

    def answering(respond: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Every fault as one line of JSON, never a traceback."""

        async def responded(request: Request) -> Response:
            bound = Request(request.scope, bounded(request.receive, int(limits.megabytes * 1e6)))
            try:
                found = await respond(bound)
                response = found if isinstance(found, Response) else JSONResponse(found)
            except UserError as error:
                response = fault(400, str(error))
            except HTTPException as error:
                response = fault(error.status_code, error.detail)
            except queue.Full:
                response = fault(503, f"{WAITING} requests are waiting already: ask again later")
            except ClientDisconnect:
                response = fault(400, "the request ended before it was whole")
            except Exception:
                log.exception("a request failed")
                response = fault(500, "the server has failed at this request: its log says more")
            service.batcher.counts[f'{{path="{request.url.path}",status="{response.status_code}"}}'] += 1
            return response

        return responded

    gets = {"/": page, "/run": about, "/health": health, "/metrics": metrics}
    routes = [Route(path, answering(respond), methods=["GET"]) for path, respond in gets.items()]
    posts = {"/predict": predict, "/v1/chat/completions": chat}
    routes += [Route(path, answering(respond), methods=["POST"]) for path, respond in posts.items()]
    return Starlette(routes=routes, exception_handlers={HTTPException: missing})


async def missing(request: Request, error: Exception) -> Response:
    return fault(error.status_code, f"{request.method} {request.url.path[:80]!r}: {error.detail}")


def fault(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": " ".join(message.split()), "type": kind}}, status)
