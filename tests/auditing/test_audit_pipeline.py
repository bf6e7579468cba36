"""What a pipeline asks of an audit: a condition under which it fails, and a summary in Markdown."""

import dataclasses

import pytest
from test_audit_summary import SIGMAS, make, row
from tiny import ended

from gdiff_jax.auditing import condition, markdown
from gdiff_jax.commands import audit


@pytest.mark.parametrize("text", ["recovered > 0.1", " recovered>0.1 ", "psnr >= 20", "ssim<=.5", "recognised < 1"])
def test_a_condition_is_read(text):
    found = condition.parse(text)
    assert condition.parse(str(found)) == found
    assert "".join(text.split()).startswith(found.measure + found.comparison)


@pytest.mark.parametrize(
    "text",
    ["", "recovered", "recovered > ", "recovered = 0.1", "lpips < 1", "psnr > nan", "recovered > 10", "psnr > 20 dB", "not"],
)
def test_what_is_no_condition_is_refused_with_what_may_stand_there(text):
    with pytest.raises(ValueError, match=r"recovered"):
        condition.parse(text)


def test_it_is_met_at_the_levels_where_it_holds():
    record = make()  # medians of about 40.5, 30.5, 20.5 and 10.5 dB
    assert [text.split()[1] for text in condition.parse("psnr > 25").met(record)] == ["0", "0.01"]
    assert condition.parse("recovered > 0.99").met(record) == ["sigma 0 (1)", "sigma 0.01 (1)", "sigma 0.1 (1)"]
    assert condition.parse("recovered > 1").met(record) == []
    assert len(condition.parse("recovered >= 0").met(record)) == len(SIGMAS)


def test_what_was_not_measured_counts_as_failed():
    rows = [row("dsg", s, i, 0, None, None, failed=True, ssim=None) for s in SIGMAS for i in range(3)]
    assert condition.parse("psnr > 25").met(make(rows)) == [f"sigma {s:.3g} (not measured)" for s in SIGMAS]


def test_the_summary_holds_verdict_and_levels_and_no_mark_of_its_names():
    record = make()
    record = dataclasses.replace(
        record, about={**record.about, "victim": "my_model.py:<make>|[x](y)", "threat_model": "Known."}
    )
    text = markdown.render(record)
    assert text.startswith("## Audit of my\\_model.py:\\<make\\>\\|[x]\\(y)\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(SIGMAS)
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(("bound", "code"), [("psnr > 25", 3), ("psnr > 60", None)])
def test_the_command_ends_with_a_code_of_its_own(bound, code, tmp_path, monkeypatch, capsys):
    record = make()
    about = {**record.about, "threat_model": "Known.", "film_steps": [], "attacks": {}, "methods": ["dsg", "dps"]}
    data = tmp_path / "audit.json"
    data.write_text(dataclasses.replace(record, about=about).to_json())
    monkeypatch.setattr("gdiff_jax.auditing.page.write", lambda record, folder: folder / "report.html")
    arguments = [f"--from_json={data}", f"--out={tmp_path / 'o'}", f"--fail_if={bound}"]
    assert ended(audit, monkeypatch, *arguments) == code
    assert ("failed: psnr > 25 at sigma 0 (" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fail_if=recovered is bad"], "--fail_if: 'recovered is bad' is no condition"),
        (["--fail_if=psnr > 20", "--gradient=leak.npz"], "--fail_if is of reconstructions beside the truth"),
    ],
)
def test_it_is_refused_before_anything_starts(arguments, words, tmp_path, monkeypatch, capsys):
    assert ended(audit, monkeypatch, *arguments, f"--out={tmp_path / 'o'}") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
