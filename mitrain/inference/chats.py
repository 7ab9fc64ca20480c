"""Chat requests in OpenAI's form, and their answers: whole, or streamed as server-sent events."""

import base64
import binascii
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mitrain.core.errors import ConfigError, UserError
from mitrain.data.formats.conversations import asked_behind
from mitrain.inference.service import Service

log = logging.getLogger(__name__)

IGNORED = ("model", "messages", "user", "metadata", "stream", "stream_options")  # change no answer
FIXED = {"n": 1}
SPOKEN = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
SPOKEN |= {name: name for name in ("temperature", "top_p")}
"""What a chat request may set, and the setting of the task that it is."""


class Chats:
    """``service`` asked in OpenAI's form."""

    def __init__(self, service: Service):
        self.service = service

    def streams(self, body: Mapping[str, Any]) -> bool:
        """Whether the answer is wanted piece by piece."""
        wanted, options = body.get("stream"), body.get("stream_options")
        if not isinstance(wanted, bool | None) or not isinstance(options, dict | None):
            raise ConfigError("stream is true or false, stream_options an object: correct them")
        return bool(wanted)

    def answer(self, body: Mapping[str, Any], hear: Callable[[str], None] | None = None) -> dict[str, Any]:
        """The whole answer; ``hear`` is told its pieces as they come, where the model says it word by word."""
        service = self.service
        if not service.run.model.task.speaks:
            name = service.run.config.task.section_name
            raise ConfigError(f"this run's task is {name!r}, which does not speak: ask /predict")
        contents, said, generation = self._conversation(body)
        text, turns = asked_behind(said)
        values = service.predict(contents, text, (), True, turns, generation, hear)
        said = values.get("answer", values.get("caption"))
        counts = [len(service.run.model.text.plain(words)) for words in (text, said)]
        usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage, "mitrain": values}

    def events(self, body: Mapping[str, Any]) -> Iterator[str]:
        """The answer as events, each a piece of it; raises what asking does, while nothing has been said."""
        heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            try:
                heard.put(self.answer(body, heard.put))
            except BaseException as error:  # the reading thread raises it again
                heard.put(error)

        head = self._head("chat.completion.chunk")
        threading.Thread(target=work, daemon=True).start()
        told = ""
        while isinstance(said := heard.get(), str):
            yield event(head, {"content": said} if told else {"role": "assistant", "content": said})
            told += said
        if isinstance(said, BaseException):
            if not told:
                raise said
            log.error("a streamed answer broke off", exc_info=said)
            words = str(said) if isinstance(said, UserError) else "the server has failed at this request"
            yield f"data: {json.dumps({'error': {'message': words, 'type': 'server_error'}})}\n\n"
            return
        rest = said["choices"][0]["message"]["content"].removeprefix(told)  # all of what is chosen, not said word by word
        if rest or not told:
            yield event(head, {"content": rest} if told else {"role": "assistant", "content": rest})
        yield event(head, {}, "stop")
        if (body.get("stream_options") or {}).get("include_usage"):
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': said['usage']})}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.service.run.config.name}

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
        free = [name for name, kind in self.service.takes.items() if kind == takes and name not in given]
        if not free:
            raise ConfigError(f"this run has no input for this {takes}: it reads {', '.join(self.service.takes)}")
        return free[0]


def is_a(value: Any, key: str, wanted: str) -> bool:
    return isinstance(value, dict) and value.get(key) == wanted


def decoded(value: Any, uri: bool = False) -> bytes:
    """The bytes that base64, or a data: URI, stands for."""
    if not isinstance(value, str) or (uri and not value.startswith("data:")):
        raise ConfigError("files come with the request, as base64 or data: URIs; nothing is fetched, and no path is read")
    try:
        return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"a file is not valid base64 ({error})") from None


def event(head: Mapping[str, Any], delta: Mapping[str, Any], ended: str | None = None) -> str:
    """A server-sent event with a piece of the answer."""
    return f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': ended}]})}\n\n"
