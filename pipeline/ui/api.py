"""The HTTP API: the same conversations, as JSON.

GET  /api/models   [{"key", "label", "facts"}, ...], the default first
POST /api/chat     {"messages": [{"role", "content"}, ...], "model": KEY, "temperature": ..., "stream": true}
                   answered by one JSON object per line as it is generated, the last of type "end":
                   {"type": "text" | "tool_call" | "tool_output", "text"}
                   {"type": "end", "reason", "tokens", "seconds", "forgotten", "message": {"role", "content"}}
                   With "stream": false only the last one.

Requests are sent as application/json with the header `Authorization: Bearer TOKEN` (see gate.py). Errors are
{"error": ...}.
"""

import asyncio
import dataclasses
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import closing
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.routing import BaseRoute

from data.errors import DataError
from model.errors import ModelError
from pipeline import typed
from pipeline.errors import UserError
from pipeline.ui.chat import ChatSettings, Draft, End, Event, Message, Text, ToolCall
from pipeline.ui.models import Sessions

WAITING = 40  # threads in which requests wait for the model
KNOWN = ("messages", "model", "stream", *(f.name for f in dataclasses.fields(ChatSettings)))


def routes(sessions: Sessions) -> list[BaseRoute]:
    """The routes of the API, for a FastAPI app."""

    watches: set[asyncio.Task[None]] = set()  # the event loop holds only weak references
    waiting = CapacityLimiter(WAITING)  # not the shared threads, which the running answer needs

    def models() -> list[dict[str, str]]:
        return [{"key": m.key, "label": m.label, "facts": m.facts} for m in sessions.models]

    async def chat(request: Request) -> Response:
        try:
            body = _check(await request.body())
            lines = await to_thread.run_sync(_begin, sessions, body, _left(request, watches), limiter=waiting)
        except (UserError, DataError, ModelError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        if body.get("stream", True):
            return StreamingResponse(_until_left(lines), media_type="application/x-ndjson")
        *_, last = await run_in_threadpool(list, lines)
        return Response(last, media_type="application/json")

    return [
        APIRoute("/api/models", models, methods=["GET"], response_model=None),
        APIRoute("/api/chat", chat, methods=["POST"], response_model=None),
    ]


def _left(request: Request, watches: set[asyncio.Task[None]]) -> Callable[[], bool]:
    """A function that returns True once the client is gone, which is otherwise noticed only when something is sent."""
    gone = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    task = asyncio.create_task(watch())
    watches.add(task)
    task.add_done_callback(watches.discard)
    return gone.is_set


def _check(sent: bytes) -> dict[str, Any]:
    """The body as an object. Raises UserError for a malformed request, including JSON that is nested too deeply."""
    try:
        body = from_json(sent)
    except ValueError as error:
        raise UserError(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise UserError("the request is not a JSON object with a list of messages")
    for name in body:
        if name not in KNOWN:
            raise typed.unknown(name[:100], list(KNOWN), "")
    if not isinstance(body.get("model"), str | None):
        raise UserError("is not a string", "model", "Send the key of a model, or leave it out.")
    return body


def _begin(sessions: Sessions, body: dict[str, Any], left: Callable[[], bool]) -> Generator[str]:
    """The lines of the answer. Errors in the request are raised here, before the first line is sent."""
    settings = typed.build(ChatSettings, {k: body[k] for k in body.keys() & ChatSettings.__dataclass_fields__.keys()})
    events = sessions.get(body.get("model")).reply(body["messages"], settings, left)
    return _lines(next(events), events)


def _lines(first: Event, rest: Generator[Event]) -> Generator[str]:
    draft = Draft()
    with closing(rest):
        for event in itertools.chain([first], rest):
            draft.add(event)
            yield json.dumps(_plain(event, draft.message)) + "\n"


async def _until_left(lines: Generator[str]) -> AsyncIterator[str]:
    """The lines, one by one. When the reader leaves, the answer ends, which frees the model for others."""
    with closing(lines):
        async for line in iterate_in_threadpool(lines):
            yield line


def _plain(event: Event, answer: Message) -> dict[str, Any]:
    if isinstance(event, End):
        return {"type": "end", **dataclasses.asdict(event), "message": answer}
    kind = "text" if isinstance(event, Text) else "tool_call" if isinstance(event, ToolCall) else "tool_output"
    return {"type": kind, "text": event.text}
