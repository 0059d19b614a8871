"""What every script needs and no reader of the method must open: command line, processes, the run, its files, log and pictures."""

import signal
import sys
from pathlib import Path

# Scripts import this first of all: in the seconds that importing torch takes, Ctrl-C then ends them without a traceback. `run_script`
# undoes it. Whatever else imports this package (a notebook, a test, somebody's own program) keeps its signals.
_main = getattr(sys.modules["__main__"], "__file__", None)
_run_as_script = _main and Path(_main).resolve().parent == Path(__file__).resolve().parent.parent and "torch" not in sys.modules
if _run_as_script and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
