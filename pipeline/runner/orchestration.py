"""Carries a run out as a Prefect flow. Prefect helps; no run fails because of it.

The flow runs in a thread of its own, so that Ctrl-C is heard while Prefect waits for a server. When the server is lost,
another flow run takes over with a temporary one: the stages are the run's, and do not notice. Without any server, the
stages are made all the same.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import Unreachable
from pipeline.runner.run import BEGUN, Run
from pipeline.runner.server import SILENT_SECONDS, ConfiguredServer, Server, TemporaryServer, set_defaults

BEGIN_SECONDS = 60.0  # for a flow to ask for its first stage
END_SECONDS = 60.0  # for a flow to end when all stages have
END_SECONDS_SILENT = 10.0  # where the configured server does not answer; a temporary one is then started again
END_SECONDS_STOPPED = 3.0  # where the run was asked to stop


def carry_out(run: Run, parameters: dict[str, Any], url: str, say: Callable[[str], None]) -> None:
    """Make what the run's plan says. Raises what went wrong with stages.

    url: of the server that the user has configured, or empty. say: shows a line about Prefect.
    """
    for server in _servers(run, url, say):
        flow = _Flow(run, parameters, server)
        flow.start()
        try:
            _follow(flow, run, server, say)
        finally:
            if isinstance(server, ConfiguredServer):
                server.close()
        if run.settled():
            break
        if flow.error:
            say(f"Prefect could not carry out the run: {_first_line(flow.error)}")
    run.make_rest()
    run.raise_failures()


def _servers(run: Run, url: str, say: Callable[[str], None]) -> Iterator[Server]:
    """Servers to try, one after the other."""
    if url:
        try:
            server = ConfiguredServer(url)
        except Unreachable as error:
            if run.plan.running():
                raise
            say(f"This run is not shown in Prefect. {error}")
            return
        server.watch()
        yield server
    for again in (False, True):
        if url or again:
            say("The run continues with a temporary Prefect server.")
        try:
            yield TemporaryServer.shared(say, lambda: run.maker.switch.asked)
        except (Unreachable, OSError) as error:
            say(f"{error}. The run continues without it.")
            return


class _Flow(threading.Thread):
    """The flow with this server. `error`: what it ended with, if anything."""

    def __init__(self, run: Run, parameters: dict[str, Any], server: Server):
        super().__init__(name="flow", daemon=True)
        self.begun, self.parameters, self.server = run, parameters, server
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            BEGUN.set(self.begun)
            _connect(self.server)
            from flows import chatmill

            chatmill(**self.parameters)
        except BaseException as error:  # also what failed stages have raised, which the run knows
            self.error = error


def _connect(server: Server) -> None:
    """Let Prefect in this process use the server, and be silent on the terminal, where the run has its own view."""
    if "PREFECT_LOGGING_LEVEL" not in os.environ:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        logging.raiseExceptions = False  # else logs that cannot be sent are reported on the terminal
    set_defaults()
    os.environ["PREFECT_API_URL"] = server.url
    from prefect.context import refresh_global_settings_context
    from prefect.events.clients import PrefectEventsClient
    from prefect.events.worker import EventsWorker, emit_events_to_cloud

    refresh_global_settings_context()
    if not emit_events_to_cloud():  # else events would still go to an earlier server of this process
        EventsWorker.set_client_override(PrefectEventsClient, api_url=server.url)


def _follow(flow: _Flow, run: Run, server: Server, say: Callable[[str], None]) -> None:
    """Return when the flow has ended, or is given up."""
    silent, begun, settled = False, time.monotonic(), 0.0
    configured = isinstance(server, ConfiguredServer)
    while flow.is_alive():
        flow.join(0.1)
        now = time.monotonic()
        if run.settled():
            settled = settled or now
            if isinstance(server, TemporaryServer):
                server.patience = END_SECONDS_SILENT
            alone = END_SECONDS_SILENT if configured and server.silent_seconds else END_SECONDS
            if now - settled > (END_SECONDS_STOPPED if run.maker.switch.asked else alone):
                say(f"Prefect's server at {server.url} was not told how the run ended.")
                server.close()
                return
        elif configured:
            if server.silent_seconds > SILENT_SECONDS or (now - begun > BEGIN_SECONDS and not run.asked()):
                return
            if silent != (server.silent_seconds > 0):
                silent = not silent
                say(
                    f"Prefect's server at {server.url} does not answer. The stages continue; if it stays away for "
                    f"{SILENT_SECONDS:g} s, the run continues with a temporary server."
                    if silent
                    else f"Prefect's server at {server.url} answers again."
                )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
