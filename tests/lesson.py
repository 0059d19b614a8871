"""Run lesson.ipynb from top to bottom and keep its outputs: `python tests/lesson.py`, minutes.

With the two runs that its sixth section names in runs/, the figures of that section and the next are of those.

The notebook keeps a digest of the code cells that its outputs are of, and a test compares it. It does not cover the
files that the cells call; a slow test runs the notebook's own assertions against those.
"""

import hashlib
import json
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PATH = ROOT / "lesson.ipynb"


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of all code cells, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def execute(notebook: nbformat.NotebookNode, directory: Path, timeout: float = 900) -> None:
    """Run all cells in place, in a fresh kernel that works in `directory`, each in at most `timeout` seconds."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    options = dict(coalesce_streams=True, record_timing=False)  # of a progress bar the last line alone; no times
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", **options)
    client.resources = {"metadata": {"path": str(directory)}}
    client.execute(env=os.environ | {"PYTHONPATH": path})


def main() -> None:
    notebook = nbformat.read(PATH, as_version=4)
    execute(notebook, ROOT)
    metadata = dict(language_info={"name": "python"}, outputs_of=digest(notebook))
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]} | metadata
    nbformat.write(notebook, PATH)
    print(f"executed {PATH}, {PATH.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
