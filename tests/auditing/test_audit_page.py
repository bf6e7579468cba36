"""The report of an audit: its page, its figures and its data say the same, and ask nothing of a network."""

import base64
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from test_audit_schema import unclipped
from tiny import parsed
from written import faults_of_page

import gdiff_jax as gd
from gdiff_jax.auditing import figures, page, pictures
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands import audit as command
from gdiff_jax.commands import flags


def files(folder):
    """The files of a report, by their place in the folder."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if "sweep" not in p.relative_to(folder).parts}


def figures_of(folder):
    return {p.name: p.read_bytes() for p in (folder / "figures").iterdir()}


def test_a_report_made_again_of_its_json_is_the_same_to_the_byte(small, tmp_path, monkeypatch, capsys):
    settings = parsed(AuditConfig(), f"--from_json={small / 'audit.json'}", f"--out={tmp_path / 'again'}")
    monkeypatch.setattr(flags, "read_flags", lambda defaults: settings)
    command._audit()
    assert f"report: {tmp_path / 'again' / 'report.html'}" in capsys.readouterr().out
    made, again = files(small), files(tmp_path / "again")
    assert {"report.html", "audit.json", "trials.csv", "figures/quality.svg", "figures/quality.png"} <= made.keys()
    assert made.keys() == again.keys()
    for name in made:
        assert made[name] == again[name], name


def test_no_formula_is_shown_as_its_source(small):
    """Ticks of logarithmic axes are formulas to matplotlib; names with dollars in them are not to be, so none is read."""
    drawn = sorted((small / "figures").glob("*.svg"))
    assert "steps.svg" in {file.name for file in drawn}
    assert not [file.name for file in drawn if "mathdefault" in file.read_text(encoding="utf-8")]


def test_every_figure_answers_to_the_data(small):
    """Other numbers, another figure."""
    audit, drawn = gd.Audit.load(small / "audit.json"), figures_of(small)
    names = {name.partition(".")[0] for name in drawn}
    assert names == set(figures.drawings(audit))
    assert names == {
        "reconstructions", "recognised", "quality", "recovered", "epsilon", "identification", "steps", "signal", "film",
        "layers", "spectrum", "worst",
    }  # fmt: skip
    worse = lambda r: {**r, "psnr": r["psnr"] and r["psnr"] + 1, "rank": 1, "noise_norm": 2 * (r.get("noise_norm") or 0)}
    theory = {**audit.theory, "shares": {k: v / 2 for k, v in audit.theory["shares"].items()}}
    theory["spectra"] = [{**s, "eigenvalues": [2 * v for v in s["eigenvalues"]]} for s in theory["spectra"]]
    black = {k: pictures.png(np.zeros((16, 16, 3))) for k in audit.pictures}
    halved = {k: {**c, "signal": [v and v / 2 for v in c["signal"]]} if "signal" in c else c for k, c in audit.curves.items()}
    levels = [{**v, "counts": [{**c, "hits": c["hits"] // 2} for c in v["counts"]]} for v in audit.identification["levels"]]
    other = dataclasses.replace(
        audit, trials=[worse(r) for r in audit.trials], theory=theory, pictures=black, curves=halved,
        identification={**audit.identification, "levels": levels},
    )  # fmt: skip
    changed = figures.files(other)
    assert changed.keys() == drawn.keys()
    assert [name for name in drawn if changed[name] == drawn[name]] == []


def test_the_page_is_whole_and_asks_for_nothing(small):
    text, test = ((small / name).read_text() for name in ("report.html", "blind.html"))
    assert faults_of_page(text) == faults_of_page(test) == []
    assert "default-src 'none'" in text
    for svg in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", text):
        inner = base64.b64decode(svg).decode()
        assert not re.findall(r'href="(?!#|data:)', inner)
    for words in (
        "For those who decide",
        "What leaks most",
        "and attacker &#39;",
        "clip:1+gaussian",
        "γ(κ)",
        "Cramér-Rao",
        "python",
        "What this does not say",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("sound", "broken", "fault"),
    [
        ("</table>", "", "closes another element"),
        ("</body>", "<p></body>", "closes another element"),
        ("</html>", "", "<html> is not closed"),
        ('id="worst"', 'id="images"', "id 'images' twice"),
        ('href="#noise"', 'href="#nose"', "link to '#nose'"),
        ('href="#noise"', 'href="other.html"', "link to 'other.html'"),
        ('<img src="data:', '<img src="http:', "link to 'http:"),
        (' alt="', ' title="', "a picture without words"),
        ("</h1>", "</h1>" + 2_000_000 * " ", "bytes"),
    ],
)
def test_what_is_wrong_with_a_page_is_found(small, sound, broken, fault):
    text = (small / "report.html").read_text()
    assert sound in text
    assert any(fault in found for found in faults_of_page(text.replace(sound, broken, 1)))


def test_the_page_of_noise_without_clipping_names_no_bound(small):
    """And says from which noise on the best attacker is held off."""
    audit = gd.Audit.load(small / "audit.json")
    text = page.render(dataclasses.replace(audit, **unclipped(audit)), figures_of(small))
    assert faults_of_page(text) == []
    assert "Without clipping there is no bound" in text
    assert "<td>1.5 [1.25, inf]</td>" in text
    assert "At σ = 1.5 it crosses 40 % among 3" in text
    assert "<th>γ(1/K)</th>" not in text
    bounded = page.render(audit, figures_of(small))
    assert "<th>γ(1/K)</th>" in bounded
    for other in ({"reason": "it was not"}, {k: v for k, v in audit.identification.items() if k != "enough"}):
        text = page.render(dataclasses.replace(audit, identification=other), figures_of(small))
        assert faults_of_page(text) == []
        assert "the best attacker”" not in text


def test_the_page_escapes_what_it_is_told(small):
    audit = gd.Audit.load(small / "audit.json")
    hostile = dataclasses.replace(audit, about={**audit.about, "victim": "<script>alert(1)</script>"})
    text = page.render(hostile, figures_of(small))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.long), 390])
def test_chromium_shows_the_page_without_errors(small, width, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("data:,")  # leave the browser's own first page, and what it asks for
        driver.get_log("performance")
        driver.get((small / "report.html").as_uri())
        assert driver.get_log("browser") == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        broken = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.alt)"
        assert driver.execute_script(broken) == []
        assert driver.execute_script("return document.images.length") >= 7
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
        assert [url for url in urls if not url.startswith(("file:", "data:"))] == []
    finally:
        driver.quit()
