"""One line for one error under torchrun, which ends all processes when one has failed and reports each whose status is not 0."""

import json
import os
import signal
import sys
import time
from contextlib import suppress

from plumbing.signals import StopRequest

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun for each process: what its report shows of an error
PATIENCE = 10.0  # seconds; enough for torchrun to notice that a process has ended, and to end the others


def let_another_speak(always: bool) -> None:
    """In a process that has an error: end in silence if torchrun ends this process within PATIENCE, for then another one has failed.

    Returns at once without torchrun and, unless `always`, in a machine's first process: what all find wrong is said by that one.
    """
    if ERROR_FILE not in os.environ or (os.environ["LOCAL_RANK"] == "0" and not always):
        return

    def end(*_):
        sys.exit(0)  # torchrun would report any other status as one more failure

    if StopRequest.last in (signal.SIGTERM, signal.SIGINT):  # it has told us already
        end()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    waited_until = time.monotonic() + PATIENCE
    while time.monotonic() < waited_until:
        time.sleep(0.05)


def report(line: str) -> None:
    """Have torchrun show `line` at the end of its report, as this process's error."""
    if ERROR_FILE in os.environ:
        shown = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(os.environ[ERROR_FILE], "w") as file:
            json.dump({"message": {"message": line, "extraInfo": shown}}, file)
