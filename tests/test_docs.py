"""What the documentation shows is so: its examples run, and what it names is there."""

import doctest
import importlib.util
import re
from pathlib import Path

import jax
import pytest

import gdiff_jax as gd

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


@pytest.mark.parametrize("path", [p for p in PAGES if ">>>" in p.read_text()], ids=lambda p: p.name)
def test_examples_print_what_they_say(path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        found = doctest.testfile(str(path), module_relative=False)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_scripts_and_pages_that_are_named_exist(path):
    text = path.read_text()
    for script in re.findall(r"python ((?:experiments|benchmarks)/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link


def test_every_flag_that_is_named_exists():
    """In the settings that flags are made from, each `name: type = option(...)`."""
    files = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "gdiff_jax").rglob("*.py")]
    option = re.compile(r"^    (\w+): [\w\[\], .|]+ = option\(", re.M)
    known = {name for file in files for name in option.findall(file.read_text())}
    assert {"sigma_grid", "victim", "coordinator", "data"} <= known
    known |= set(re.findall(r'"--(\w+)"', "\n".join(p.read_text() for p in (ROOT / "benchmarks").glob("*.py"))))
    for path in PAGES:
        for line in path.read_text().splitlines():
            if "python " in line or line.startswith("|"):
                for flag in re.findall(r"--(?:no)?(\w+)(?==|[ `])", line):
                    assert flag in known or f"no{flag}" in known or flag in {"help", "worker", "ntasks", "gpus"}, (
                        path.name,
                        flag,
                    )


README = (ROOT / "README.md").read_text()


def block(text, holds):
    """The Python code of a page that holds these words."""
    return next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if holds in code)


def test_the_readme_fits_a_screen_and_a_half():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 200


def test_the_model_of_the_readme_is_one_that_can_be_solved():
    names = {}
    exec(block(README, "# my_model.py"), names)
    loss, params = names["make"]()
    first, _, head, *_ = gd.algebra.explain(loss, params, jax.ShapeDtypeStruct((32, 32, 3), "float32"))
    assert "w1: its input is solved from its kernel's gradient" in first
    assert "its delta is the gradient of b2" in head


@pytest.mark.long
def test_the_library_s_lines_in_the_readme_find_the_image():
    names = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        exec(block(README, "gd.dsg_sample"), names)
    assert gd.image_metrics(names["image"], names["x"])["psnr"] > 18  # samples of the prior have 8.5 in the median


@pytest.fixture(scope="module")
def messages():
    """What makes the page of messages."""
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs" / "messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_messages_holds_those_of_the_code(messages):
    assert messages.PAGE.read_text(encoding="utf-8") == messages.page(), "python docs/messages.py writes it anew"
    assert "must be at least" in messages.generated()


def test_the_messages_that_are_explained_can_be_said(messages):
    said = "\n".join(messages.everything(path) for path in (ROOT / "gdiff_jax").rglob("*.py"))
    head = messages.PAGE.read_text(encoding="utf-8").split(messages.MARK)[0]
    explained = re.findall(r"^\| `([^`]+)` \|", head, re.M) + re.findall(r"^- \*(.+?)(?: \.\.\.)?\*", head, re.M)
    assert len(explained) > 12
    for text in explained:
        assert text.lower() in said.lower(), text
