"""What all tests share."""

import os
from functools import partial

import pytest

# Before torch is imported, and for the processes that tests start too: networks this small gain nothing from a second
# thread, and lose much where the cores are busy, as with `pytest -n`.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from matplotlib.figure import Figure

from model import MODELS, ConvNeXt

# Where torch.export comes before the first backward pass, processes forked later can make none.
torch.zeros(1, requires_grad=True).backward()
SAVE = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def sketched():
    """Write empty files for plots, which take longer to draw than these short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: open(path, "wb").close())
        yield


@pytest.fixture
def drawn(sketched, monkeypatch):
    """Draw plots after all."""
    monkeypatch.setattr(Figure, "savefig", SAVE)


@pytest.fixture
def small_models(monkeypatch):
    """Replace every size by a network that tests can afford."""
    for name in MODELS:
        shape = (1, 1, 1, 1), (8, 8, 16, 16)
        monkeypatch.setitem(MODELS, name, partial(ConvNeXt, *shape, version=2 - ("v2" not in name)))
