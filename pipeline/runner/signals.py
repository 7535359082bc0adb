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

    Only the main thread gets signals: in another one, nothing happens. A handler that was there before, as Prefect's in
    a run from a deployment, gets the signal when the stages have stopped.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._insisted = threading.Event()
        self._before: dict[int, Any] = {}
        self._number = 0

    def __enter__(self) -> "StopSwitch":
        if threading.current_thread() is threading.main_thread():
            for sig in (signal.SIGINT, *stop_signals()):
                self._before[sig] = signal.signal(sig, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler)
        before = self._before.get(self._number)
        if callable(before) and before is not signal.default_int_handler:
            before(self._number, None)

    def _on_signal(self, number: int, _: object) -> None:
        self._number = number
        if number == signal.SIGHUP:
            leave_terminal()
            self._asked.set()  # the shell and the kernel both send it: a second one is not a second request
        else:
            (self._insisted if self._asked.is_set() else self._asked).set()

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
