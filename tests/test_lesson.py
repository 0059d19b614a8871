"""Claims about lesson.ipynb: its outputs are those of its code, and what it asserts holds on the code as it stands."""

import re

import lesson
import nbformat
import pytest

ANSWERS = lesson.ROOT / "docs" / "lesson_answers.md"
NOTEBOOK = nbformat.read(lesson.PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
TEXT = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")


def test_committed_outputs_are_of_the_committed_code():
    fix = "lesson.ipynb was changed after it was executed; run `python tests/lesson.py`"
    assert NOTEBOOK.metadata.outputs_of == lesson.digest(NOTEBOOK), fix
    assert [cell.execution_count for cell in CODE] == list(range(1, 1 + len(CODE)))
    assert not [output for output in OUTPUTS if output.output_type == "error"]
    assert lesson.PATH.stat().st_size <= 2e6


def test_every_picture_has_a_caption_every_exercise_an_answer_and_links_lead_somewhere():
    pictures = sum("image/png" in output.get("data", {}) for output in OUTPUTS)
    captions = re.findall(r"^\*\*Figures? (\d+)(?: and (\d+))?\.\*\*", TEXT, re.MULTILINE)
    assert [int(number) for caption in captions for number in caption if number] == list(range(1, pictures + 1))
    for path in re.findall(r"\]\((?!http)([^)#]+)", TEXT):
        assert (lesson.ROOT / path).exists(), path
    exercises = re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", TEXT, re.MULTILINE)
    answers = re.findall(r"^## (\d+)\. (.+)$", ANSWERS.read_text(), re.MULTILINE)
    assert len(exercises) == 8 and exercises == answers


@pytest.mark.slow
def test_the_lesson_and_the_answers_run_in_a_fresh_kernel(tmp_path):
    """Where there is no runs/, so the networks are trained on the way; a failed assertion raises."""
    notebook = nbformat.read(lesson.PATH, as_version=4)
    answers = re.findall(r"^```python\n(.+?)^```", ANSWERS.read_text(), re.MULTILINE | re.DOTALL)
    assert len(answers) == 8
    notebook.cells += [nbformat.v4.new_code_cell(answer) for answer in answers]
    lesson.execute(notebook, tmp_path)
    assert (tmp_path / "runs" / "lesson_v1" / "encoder.pth").exists()
