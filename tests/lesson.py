"""Run lesson.ipynb from top to bottom and keep its outputs: `python tests/lesson.py`, minutes.

With two runs in runs/ (`python pretrain.py`; `python pretrain.py --model convnext_yocto --output_dir runs/pretrain_v1`)
the figures of its sixth and seventh sections are of those, as the text there says.

The notebook keeps a digest of the code cells that its outputs are of, and a test compares it. The digest does not cover the files that
the cells call: every comment changed in one of them would ask for a new execution, and it is the notebook's own assertions that say
whether what the text claims is still true. A slow test runs them against the code as it stands.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "lesson.ipynb"


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of all code cells, in order."""
    return hashlib.sha256(
        json.dumps([cell.source for cell in notebook.cells if cell.cell_type == "code"]).encode()
    ).hexdigest()


def execute(notebook: nbformat.NotebookNode, directory: Path, timeout: float = 900) -> None:
    """Run all cells, in place, in a fresh kernel that works in `directory`; nbclient's CellExecutionError names the cell that fails.

    timeout: of one cell, in seconds.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    client = NotebookClient(
        notebook, timeout=timeout, coalesce_streams=True, record_timing=False, kernel_name="python3"
    )
    client.resources = {"metadata": {"path": str(directory)}}
    client.execute(env=os.environ | {"PYTHONPATH": path})  # coalesced streams: of a progress bar its last line alone


def main() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    execute(notebook, ROOT)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)} | {
        "language_info": {"name": "python"},
        "outputs_of": digest(notebook),
    }
    nbformat.write(notebook, PATH)
    print(f"executed {PATH}, {PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    sys.exit(main())
