"""The command of an audit: its defaults, its one line for what is wrong, and that it goes on where it was ended."""

import pytest
from tiny import MODELS, audit_config, command_of, ended, run_command, without_time

from gdiff_jax.auditing import load, run
from gdiff_jax.auditing.load import audit_named
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.commands import audit
from gdiff_jax.options import replace


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The trials alone, by the programs of `small`."""
    monkeypatch.setattr(run, "_theory", lambda *_: None)
    monkeypatch.setattr(run, "_film", lambda *_: [])
    monkeypatch.setattr(run, "measured", lambda *_: None)


def test_an_audit_goes_on_where_it_was_ended(tiny_prior, tmp_path):
    cheap = dict(victim=f"{MODELS}:mlp", methods=("analytic",))
    c = audit_config(tiny_prior, tmp_path / "out", sigma_grid=(0.0, 0.1, 1.0), **cheap)
    first = audit_named(c)
    chunks = sorted((tmp_path / "out" / "sweep" / "chunks").glob("*.jsonl"))
    times = [p.stat().st_mtime_ns for p in chunks]
    chunks[1].unlink()
    second = audit_named(c)
    assert [p.stat().st_mtime_ns for i, p in enumerate(chunks) if i != 1] == [t for i, t in enumerate(times) if i != 1]
    assert chunks[1].stat().st_mtime_ns > times[1]
    untimed = lambda result: without_time(result.trials)
    assert untimed(first) == untimed(second)
    assert first.curves == second.curves


@pytest.mark.parametrize(
    "changes", [{}, dict(attacker="eavesdropper"), dict(mechanism="soteria:0.4+gaussian"), dict(local_steps=2)]
)
def test_an_audit_runs_by_default_the_strongest_attack_whoever_attacks(changes):
    assert load._with_methods(replace(AuditConfig(), **changes)).attacks.methods == ("auto",)


def test_the_private_images_are_known_where_they_are_named_or_no_gradient_is():
    known = lambda **changes: replace(AuditConfig(), **changes).images_known
    assert known()
    assert known(images="folder")
    assert not known(gradient="leak.npz")
    assert known(gradient="leak.npz", images="folder")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from_json=nowhere.json"], "--from_json: nowhere.json"),
        (["--sigma=0"], "--sigma is not a flag; did you mean --sigma_grid?"),
        (["--sigma_grid=a,b"], "list of float"),
        (["victim=cnn"], "is not a flag"),
        (["--victim=resnet99"], "victim 'resnet99' is not known"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    assert ended(audit, monkeypatch, *arguments, f"--out={tmp_path / 'o'}") == 2
    assert_one_line(capsys.readouterr().err, words)
    assert not (tmp_path / "o").exists()


def test_another_audits_results_are_not_written_over(tmp_path, monkeypatch, capsys):
    """Neither by a report of other data nor by an audit, where no records say that it may go on."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "audit.json").write_text(name)
    assert ended(audit, monkeypatch, f"--from_json={tmp_path / 'a' / 'audit.json'}", f"--out={tmp_path / 'b'}") == 2
    assert_one_line(capsys.readouterr().err, "holds another audit")
    assert ended(audit, monkeypatch, f"--out={tmp_path / 'b'}") == 2
    assert_one_line(capsys.readouterr().err, "without the records of an audit that could go on")
    assert (tmp_path / "b" / "audit.json").read_text() == "b"


def test_so_does_the_process(tmp_path):
    done = run_command([*command_of("audit.py"), "--from_json=nowhere.json", f"--out={tmp_path / 'o'}"])
    assert done.returncode == 2
    assert_one_line(done.stderr, "nowhere.json")


def assert_one_line(text, words):
    assert text.startswith("error: ")
    assert words in text
    assert len(text.strip().splitlines()) == 1


def test_what_has_finished_is_shown_meanwhile(tiny_prior, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(load, "_show", lambda folder, audit: shown.append((folder, audit)))
    monkeypatch.setattr(run, "PAUSE", 0.0)
    cheap = dict(victim=f"{MODELS}:mlp", methods=("analytic",), batch=2)
    final = audit_named(audit_config(tiny_prior, tmp_path / "out", sigma_grid=(0.0, 0.1, 1.0), **cheap))
    assert shown
    folder, first = shown[0]
    assert folder == tmp_path / "out"
    assert 0 < len(first.attacks) < len(final.attacks)
    of_both = {(r["sigma"], r["image"], r["seed"]): r["psnr"] for r in final.attacks}
    assert all(of_both[r["sigma"], r["image"], r["seed"]] == r["psnr"] for r in first.attacks)
    assert first.about["num_images"] == len({r["image"] for r in first.attacks})
    assert f"{len(first.attacks)} attacks are done" in first.warnings()[0]
    assert first.report(tmp_path / "page").read_text().count("not finished") == 1
    assert not any("not finished" in line for line in final.warnings())


def test_what_cannot_be_shown_meanwhile_ends_nothing(tiny_prior, tmp_path, monkeypatch):
    def fail(folder, audit):
        raise RuntimeError("no page")

    monkeypatch.setattr(load, "_show", fail)
    cheap = dict(victim=f"{MODELS}:mlp", methods=("analytic",), batch=2)
    final = audit_named(audit_config(tiny_prior, tmp_path / "out", sigma_grid=(0.0, 0.1, 1.0), **cheap))
    assert len(final.attacks) == 6
