"""The notebook runs from its first cell to its last, and what is committed is its outcome: `pip install -e ".[notebook]"`."""

import os
import time
from pathlib import Path

import pytest
from tiny import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebook`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebook`")
PATH = ROOT / "notebooks" / "from_a_gradient_to_a_picture.ipynb"


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_the_notebook_is_committed_with_its_pictures_and_nothing_of_the_machine():
    notebook = nbformat.read(PATH, 4)
    nbformat.validate(notebook)
    assert len(notebook.cells) == 10
    assert pictures(notebook) == 4
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 500_000
    for word in (str(Path.home()), "site-packages", "/tmp", "Warning"):
        assert word not in text, word
    assert {output.output_type for output in outputs(notebook)} <= {"display_data", "execute_result", "stream"}


@pytest.mark.long
def test_the_notebook_runs(monkeypatch):
    # As a user runs it: not with the programs of the tests, which are compiled quickly and run slowly, nor with their backend.
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(PATH, 4)
    start = time.monotonic()
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()  # raises where a cell fails
    print(f"{time.monotonic() - start:.0f} seconds")
    assert pictures(notebook) == 4
    (verdict,) = [output.text for output in outputs(notebook) if "images are recovered" in output.get("text", "")]
    assert "4 images x 1 seeds" in verdict
