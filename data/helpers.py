"""Work distributed over helper processes, which end with the process that started them, however that ends."""

import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from data.errors import HelperDied

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[Any], None]


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

    Uses up to `workers` processes; a single one is this process. What the function reports, which it should do about
    once a second, is passed to on_report here. Raises what the function raises, and HelperDied.
    """
    if min(workers, len(items)) > 1:
        return _run(function, items, min(workers, len(items)), on_report, should_stop)

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
    context = get_context("spawn")  # a fork would copy the locks of running threads
    results: dict[int, Result] = {}
    waiting = deque(range(len(items)))
    busy: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    try:
        for _ in range(workers):
            connection, theirs = context.Pipe()
            process = context.Process(target=_help, args=(function, theirs), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            busy[connection] = waiting.popleft()
            connection.send(items[busy[connection]])
        while busy:
            if should_stop():
                return None
            for connection in [c for c in wait(list(busy), timeout=0.3) if isinstance(c, Connection)]:
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
        for started in processes:
            started.kill()
        for started in processes:
            started.join()
    return [results[i] for i in range(len(items))]


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise HelperDied(
            "a helper process was killed from outside, as the system does when memory is short. "
            "Lower launch.workers and run the same command again; finished work is kept."
        ) from None


def _help(function: Callable[[Any, Report], Any], connection: Connection) -> None:
    """One helper: receives items, sends reports and results, until the other end is closed."""
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
