"""The HTTP API: the same conversations, as JSON.

GET  /api/models   [{"key", "label", "facts"}, ...], the default first
POST /api/chat     {"messages": [{"role", "content"}, ...], "model": KEY, "temperature": ..., "stream": true}
                   one JSON object a line as it is written, the last of type "end":
                   {"type": "text" | "tool_call" | "tool_output", "text"}
                   {"type": "end", "reason", "tokens", "seconds", "forgotten", "message": {"role", "content"}}
                   With "stream": false the last one alone.

Requests are sent as application/json with the header `Authorization: Bearer TOKEN` (see gate.py). Errors are answered
as {"error"}.
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
from pipeline.ui.sessions import Sessions

WAITING = 40  # requests that wait in a thread for their turn; others wait for a thread
KNOWN = ("messages", "model", "stream", *(f.name for f in dataclasses.fields(ChatSettings)))


def routes(sessions: Sessions) -> list[BaseRoute]:
    """What to hang into a FastAPI app."""

    watches: set[asyncio.Task[None]] = set()  # the event loop holds only weak references
    waiting = CapacityLimiter(WAITING)  # of their own: in the threads that all share they would starve who is answered

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
    """Return a function that tells if the client is gone, which nothing else notices before something is sent."""
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
    """Raises UserError for a malformed request, JSON that is nested too deeply included."""
    try:
        body = from_json(sent)
    except ValueError as error:
        raise UserError(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise UserError("send a JSON object with a list of messages")
    for name in body:
        if name not in KNOWN:
            raise typed.unknown(name[:100], list(KNOWN), "")
    if not isinstance(body.get("model"), str | None):
        raise UserError("is the key of a model, or left out", "model")
    return body


def _begin(sessions: Sessions, body: dict[str, Any], left: Callable[[], bool]) -> Generator[str]:
    """The lines of the answer. What is wrong with the request is raised here, before the first line is out."""
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
    """The lines, one by one; when the reader has gone the answer is ended, which frees the model for others."""
    with closing(lines):
        async for line in iterate_in_threadpool(lines):
            yield line


def _plain(event: Event, answer: Message) -> dict[str, Any]:
    if isinstance(event, End):
        return {"type": "end", **dataclasses.asdict(event), "message": answer}
    kind = "text" if isinstance(event, Text) else "tool_call" if isinstance(event, ToolCall) else "tool_output"
    return {"type": kind, "text": event.text}
