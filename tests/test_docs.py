"""Claims about README and docs: every command in them parses, links lead somewhere, and Python examples run."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]
SCRIPT = re.compile(r"(?:python|torchrun)(?: --\S+)* (?:-m (experiments\.\w+)|(\w+)\.py)(.*)")


def commands():
    """Page, module and arguments of every command that runs one of our scripts."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ").replace("\\|", "|")
        lines = [line for line in text.split("\n") if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            for part in re.split(r"&&|;", line.split("   #")[0]):
                if match := SCRIPT.match(part.strip()):
                    yield page.name, match[1] or match[2], *shlex.split(match[3].replace("SEED", "0"), comments=True)


COMMANDS = list(dict.fromkeys(commands()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    _page, name, *words = command
    parse = argparse.ArgumentParser.parse_args

    def parse_once(*args):
        parse(*args)
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_once)
    with pytest.raises(StopIteration):
        importlib.import_module(name).get_args(words)


def test_there_are_commands_for_every_script_and_links_lead_to_files():
    assert {name for _, name, *_ in COMMANDS} >= {"pretrain", "finetune", "detect", "segment", "analyze", "weights"}
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`|^    .*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_readme_example_runs():
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(import.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        names = {}
        exec(block, names)
        assert names["pred"].shape == (2, 49, 3072) and names["mask"].dtype == torch.bool
