"""How a script begins and ends: mistakes of the user become one line, and nothing half-made is left behind."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import distributed

from plumbing import torchrun


class UserError(Exception):
    """A mistake that the user can mend: one line with the value, the constraint and the fix. Scripts exit with status 2."""


@contextmanager
def value_errors_are_the_users() -> Iterator[None]:
    """A ValueError of the method's own checks, inside the block, becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


_last_calls: list[Callable[[], None]] = []


def call_at_end(call: Callable[[], None]) -> None:
    """Have `run_script` call this in the end, however the script ends; an OSError of it is ignored."""
    _last_calls.append(call)


def run_script(main: Callable[[argparse.Namespace], None], get_args: Callable[[], argparse.Namespace]) -> None:
    """Call `main(get_args())`; a UserError becomes one line on standard error and exit status 2, an interrupt status 130.

    An exception that has an attribute `checkpoint`, a path, was raised in a run which has come so far.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # so plumbing/__init__.py left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(AttributeError):  # a notebook's standard output has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # of file and class names that the terminal's lacks
    try:
        main(get_args())
    except UserError as error:
        exit_with(2, str(error).rsplit("UserError: ")[-1])  # what a loader's worker raises has its traceback in front
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one, perhaps torchrun's, ends what is left to do
        exit_with(130, "interrupted" + _last_checkpoint(error))
    except BrokenPipeError:  # who reads the output, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)  # as of a process that SIGPIPE ended
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            exit_with(2, "out of memory; lower --batch_size (--update_freq can make up for it), --input_size or the model's size")
        if distributed.is_initialized() and _tells_of_a_lost_process(error):
            line = f"process {distributed.get_rank()} lost contact with another one, which has ended or cannot be reached ({error})"
            exit_with(1, line.splitlines()[0] + _last_checkpoint(error), of_another=True)
        torchrun.let_another_speak(always=False)
        torchrun.report(one_line(f"{type(error).__name__}: {error}"))
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        while _last_calls:
            with suppress(OSError):
                _last_calls.pop()()


def _tells_of_a_lost_process(error: Exception) -> bool:
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _last_checkpoint(error: BaseException) -> str:
    path = getattr(error, "checkpoint", None)
    return f"; the last checkpoint is {path}" if path else ""


def exit_with(status: int, message: str, of_another: bool = False) -> None:
    """One line on standard error, behind the script's name, and the end of the process: of_another, because another one failed."""
    line = f"{Path(sys.argv[0]).name}: {one_line(message.strip())}"
    torchrun.let_another_speak(always=of_another)
    torchrun.report(line)
    print(line, file=sys.stderr)
    sys.exit(status)


@cache
def remark(line: str) -> None:
    """Print a line in the main process alone, and only once, however often what it tells of is met."""
    if os.environ.get("RANK", "0") == "0":
        print(one_line(line))


def one_line(text: str | Path) -> str:
    """A message or a file's name, which may hold line breaks, on one line."""
    return re.sub(r"\s*[\n\r]\s*", " ", str(text))


def counted(count: int, noun: str) -> str:
    """1, "image" -> "1 image"; 1234, "class" -> "1,234 classes"."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"
