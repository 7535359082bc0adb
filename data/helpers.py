"""Work spread over helper processes, which end with the process that started them, however that ends."""

import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[Any], None]


class HelperDied(Exception):
    """A helper process was ended from outside."""

    cause = "oom"


class _Stop(Exception):
    pass


def run_in_helpers(
    function: Callable[[Item, Report], Result],
    items: Sequence[Item],
    workers: int,
    on_report: Report,
    should_stop: Callable[[], bool],
) -> list[Result] | None:
    """function(item, report) of each item, in order; None if stopped before all were done.

    Up to `workers` processes; one needs no process of its own. What the function reports, which it should do every
    second or so, reaches on_report here. Raises what the function raises, and HelperDied.
    """
    workers = min(workers, len(items))
    if workers > 1:
        return _run(function, items, workers, on_report, should_stop)

    def report(value: Any) -> None:
        on_report(value)
        if should_stop():
            raise _Stop

    try:
        return [function(item, report) for item in items]
    except _Stop:
        return None


def _run(
    function: Callable[[Item, Report], Result],
    items: Sequence[Item],
    workers: int,
    on_report: Report,
    should_stop: Callable[[], bool],
) -> list[Result] | None:
    results: dict[int, Result] = {}
    waiting = deque(range(len(items)))
    busy: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    try:
        for _ in range(workers):
            connection = _start(function, processes)
            busy[connection] = waiting.popleft()
            connection.send(items[busy[connection]])
        while busy:
            if should_stop():
                return None
            for connection in _ready(busy):
                kind, value = _receive(connection)
                if kind == "report":
                    on_report(value)
                    continue
                if kind == "error":
                    raise value
                results[busy.pop(connection)] = value
                if waiting:
                    busy[connection] = waiting.popleft()
                    connection.send(items[busy[connection]])
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    return [results[i] for i in range(len(items))]


def _start(function: Callable[[Any, Report], Any], processes: list[BaseProcess]) -> Connection:
    context = get_context("spawn")  # a fork would copy the locks of running threads
    here, there = context.Pipe()
    process = context.Process(target=_help, args=(function, there), daemon=True)
    process.start()
    there.close()
    processes.append(process)
    return here


def _ready(busy: dict[Connection, int]) -> list[Connection]:
    return [connection for connection in wait(list(busy), timeout=0.3) if isinstance(connection, Connection)]


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise HelperDied(
            "a helper process was killed from outside, as the system does when memory is short. "
            "Lower launch.workers and run the same again; what is done is kept."
        ) from None


def _help(function: Callable[[Any, Report], Any], connection: Connection) -> None:
    """One helper: items in, reports and results out, until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one decides
    try:
        while True:
            item = connection.recv()
            try:
                connection.send(("result", function(item, lambda value: connection.send(("report", value)))))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                error.add_note(traceback.format_exc())
                connection.send(("error", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
