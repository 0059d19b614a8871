"""Claims about lesson.ipynb: its outputs are those of its code, and what it asserts holds on the code as it stands."""

import re
from pathlib import Path

import lesson
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
ANSWERS = ROOT / "docs" / "lesson_answers.md"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(lesson.PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_committed_outputs_are_of_the_committed_code(notebook):
    fix = "lesson.ipynb was changed after it was executed; run `python tests/lesson.py`"
    assert notebook.metadata.outputs_of == lesson.digest(notebook), fix
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, 1 + len(code_cells(notebook))))
    assert not [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "error"]
    assert lesson.PATH.stat().st_size <= 2e6


@pytest.mark.parametrize("change", [lambda cells: cells[3].update(source="pass"), lambda cells: cells.reverse()])
def test_digest_notices_changed_cells_and_their_order(notebook, change):
    before, cells = lesson.digest(notebook), code_cells(notebook)
    change(cells)
    notebook.cells = cells
    assert lesson.digest(notebook) != before


def test_every_picture_has_a_caption(notebook):
    pictures = sum("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)
    captions = re.findall(r"^\*\*Figures? (\d+)(?: and (\d+))?\.\*\*", text_of(notebook), re.MULTILINE)
    assert [int(number) for caption in captions for number in caption if number] == list(range(1, pictures + 1))


def test_links_lead_somewhere_and_every_exercise_has_an_answer(notebook):
    for path in re.findall(r"\]\((?!http)([^)#]+)", text_of(notebook)):
        assert (ROOT / path).exists(), path
    exercises = re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", text_of(notebook), re.MULTILINE)
    answers = re.findall(r"^## (\d+)\. (.+)$", ANSWERS.read_text(), re.MULTILINE)
    assert len(exercises) == 8 and exercises == answers


@pytest.mark.slow
def test_the_lesson_and_the_answers_run_in_a_fresh_kernel(notebook, tmp_path):
    """Where there is no runs/, so the networks are trained on the way; a failed assertion raises."""
    answers = re.findall(r"^```python\n(.+?)^```", ANSWERS.read_text(), re.MULTILINE | re.DOTALL)
    assert len(answers) == 8
    notebook.cells += [nbformat.v4.new_code_cell(answer) for answer in answers]
    lesson.execute(notebook, tmp_path)
    assert (tmp_path / "runs" / "lesson_v1" / "encoder.pth").exists()
