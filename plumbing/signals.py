"""Signals that ask a run to end: it finishes its update and writes a checkpoint first."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens to SIGTERM, SIGINT and SIGUSR1: `number` is that of the first to arrive, 0 before. A second ends the process at once.

    A signal that was ignored when the process began, as SIGINT is in the background of a script, stays ignored.
    `StopRequest.last` outlives the run: the number of the last that arrived in this process.
    """

    last = 0

    def __init__(self):
        self.number = 0
        self._set(self._receive)

    def _set(self, handler) -> None:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        if self.number:
            return
        self.number = StopRequest.last = number
        name = signal.Signals(number).name
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"{name}: ending after this update and a checkpoint; a second signal ends at once\n".encode())
        time.sleep(0.5)  # a scheduler's signal may also arrive by way of torchrun: that is no second one
        self._set(signal.SIG_DFL)


@contextmanager
def signals_restored() -> Iterator[None]:
    """After the block signals mean what they did before."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
