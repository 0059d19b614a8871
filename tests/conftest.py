"""What all tests share."""

import json
import os
import signal
from functools import partial

import pytest

# Before torch is imported, and for the processes that tests start too. Networks this small gain nothing from a second thread,
# and lose much where the cores are busy with something else, as with `pytest -n`; and a process with OpenMP's threads cannot be
# forked, as tests do, whatever the user's own setting.
os.environ["OMP_NUM_THREADS"] = "1"

import stress

import detect
import finetune
import pretrain
import segment
from maps import draw_segmentation
from model import MODELS, ConvNeXt
from plumbing import scores
from plumbing.files import write_atomically
from plumbing.signals import STOP_SIGNALS
from scenes import draw_detections

DRAW = {module: module.draw for module in (pretrain, finetune, detect, segment)}
DRAW_CONFUSION = scores.draw_confusion
PICTURES = {
    pretrain: ("reconstructions.png", "loss.png"),
    finetune: ("accuracy.png",),
    detect: ("scores.png",),
    segment: ("scores.png",),
}


@pytest.fixture(scope="session", autouse=True)
def sketched():
    """Training in the tests' own process writes its log where its pictures belong: drawing takes longer than these short runs."""

    def sketch(module):
        def draw(path, *args):
            text = json.dumps(stress.untimed(args[-1]))
            for name in PICTURES[module]:
                write_atomically(path.with_name(name), lambda file: file.write_text(text))

        return draw

    with pytest.MonkeyPatch.context() as patch:
        for module in DRAW:
            patch.setattr(module, "draw", sketch(module))
        patch.setattr(
            scores, "draw_confusion", lambda path, content: write_atomically(path, lambda file: file.write_text(str(content)))
        )
        patch.setattr(detect, "draw_detections", lambda path, scenes, found: path.write_text(json.dumps(found)))
        patch.setattr(segment, "draw_segmentation", lambda path, maps, found: path.write_text(str(found)))
        yield


@pytest.fixture
def drawn(sketched, monkeypatch):
    """Pictures are drawn after all."""
    for module, draw in DRAW.items():
        monkeypatch.setattr(module, "draw", draw)
    monkeypatch.setattr(scores, "draw_confusion", DRAW_CONFUSION)
    monkeypatch.setattr(detect, "draw_detections", draw_detections)
    monkeypatch.setattr(segment, "draw_segmentation", draw_segmentation)


@pytest.fixture
def at_a_terminal():
    """Signals as a process has them at a terminal, and afterwards as they were. In the background of a shell's script SIGINT is ignored from the start."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_models(monkeypatch):
    """Networks that tests can afford."""
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, partial(ConvNeXt, (1, 1, 1, 1), (8, 8, 16, 16), version=2 - ("v2" not in name)))
