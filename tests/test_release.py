"""What a release says of itself is one thing: its version, its licence, and files that a wheel holds."""

import hashlib
import re
import tomllib

from tiny import ROOT

import gdiff_jax as gd

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_and_the_licence_are_the_same_everywhere():
    citation = dict(re.findall(r"^([\w-]+): \"?([^\"\n]+)\"?$", (ROOT / "CITATION.cff").read_text(), re.M))
    latest, day = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M).groups()
    assert citation["version"] == latest == gd.__version__
    assert citation["date-released"] == day
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert f"SPDX-License-Identifier: {PROJECT['license']}\n" in (ROOT / "LICENSE").read_text()
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])


def test_no_message_names_a_file_that_a_wheel_lacks():
    """Of messages those that are found in the code; one says whose third_party it means."""
    said = (ROOT / "docs" / "messages.md").read_text().split("made by docs/messages.py")[1]
    pages = "".join(p.read_text() for p in (ROOT / "gdiff_jax").rglob("*.html"))
    for text in (said, pages):
        text = text.replace("in third_party/adm of gdiff_jax's", "")
        assert re.findall(r"\b(?:experiments|benchmarks|docs|third_party|examples|tests)/[\w/.]+", text) == []


def test_terms_of_bundled_data_are_those_of_the_files():
    """A hash in the table is that of what is bundled."""
    table = (ROOT / "third_party" / "README.md").read_text()
    for path, sha256 in re.findall(r"bundled: `(gdiff_jax/[^`]+)`[^|]*\| ([0-9a-f]{64})", table):
        assert hashlib.sha256((ROOT / path).read_bytes()).hexdigest() == sha256
    assert "UTKFace" in table
