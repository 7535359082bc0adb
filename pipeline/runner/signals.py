"""Signals that ask to stop: Ctrl-C, SIGTERM, and SIGHUP when a connection drops."""

import os
import signal
import stat
import threading
from contextlib import suppress
from typing import Any


def stop_signals() -> list[signal.Signals]:
    """SIGTERM and SIGHUP; not SIGHUP where it was ignored from the start, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


class StopSwitch:
    """Stops a whole run: the first signal asks every stage to save and stop, the second ends them.

    Signals reach the main thread only: opened in another one, it hears none. A handler that somebody has set before
    keeps its signal, as Prefect's does in a run from a deployment: Prefect must hear that the run is cancelled.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._insisted = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSwitch":
        if threading.current_thread() is threading.main_thread():
            for sig in (signal.SIGINT, *stop_signals()):
                if signal.getsignal(sig) in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler):
                    self._before[sig] = signal.signal(sig, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler)

    def ask(self) -> None:
        """Ask to stop; a second time, to end at once."""
        (self._insisted if self._asked.is_set() else self._asked).set()

    def _on_signal(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
            self._asked.set()  # the shell and the kernel both send it: a second one is not a second request
        else:
            self.ask()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    @property
    def why_kill(self) -> str:
        """The reason why stages must end at once. Empty if they need not."""
        return "you asked twice" if self._insisted.is_set() else ""


def leave_terminal() -> None:
    """Point the standard streams at /dev/null if their terminal has hung up, since writing there fails from now on."""
    for fd in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(fd).st_mode) and not os.isatty(fd):
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)
