"""What a sweep leaves to be read."""

from pathlib import Path

from tiny import plan_of, read_records

from gdiff_jax.sweeping import comparison, report, tables
from gdiff_jax.sweeping.records import Store


def test_the_summary_holds_tables_and_words(tiny_sweep, tiny_prior):
    out = Path(tiny_sweep.run.out)
    summary, rows = (out / "summary.md").read_text(), read_records(out)
    plan = plan_of(tiny_prior, sigma_grid=(0.0, 0.1, 0.4), seeds=2)
    assert summary.startswith(tables.table(rows, tables.mean_image_rows(plan)))
    for part in (comparison.table(rows), comparison.verdicts(rows)[0], tables.privacy_table(plan)):
        assert part in summary
    assert "Attacker 'informed', who knows the victim's weights and loss" in summary
    assert f"over 3 images x 2 seeds of {tiny_sweep.private.images}; prior {tiny_sweep.prior.prior} (sha256 " in summary
    assert "3 steps, quadratic; DSG guidance rate 0.2, DPS zeta 8, algebra, then " in summary
    assert "where it does not reach, guided by l2." in summary


def test_one_method_is_compared_with_nothing_and_a_screen_is_printed(tiny_sweep, tiny_prior, tmp_path, monkeypatch, capsys):
    """Unless it is asked to be quiet: one short table, who attacks, and where the rest is."""
    for name in ("plot_quality", "contact_sheet"):
        monkeypatch.setattr(report.plots, name, lambda *args: None)
    plan = plan_of(tiny_prior, methods=("dsg",))
    rows = [row for row in read_records(tiny_sweep.run.out) if row["method"] == "dsg"]
    store = Store(tmp_path, {})
    report.write(plan, "x.npz", tiny_sweep.prior, rows, store, quiet=True)
    assert not capsys.readouterr().out
    summary = (tmp_path / "summary.md").read_text()
    assert "Methods beside each other" not in summary
    rows[0]["failed"] = True
    report.write(plan, "x.npz", tiny_sweep.prior, rows, store)
    head, *table, failed, attacker, files = capsys.readouterr().out.strip().splitlines()
    assert head == "Median PSNR in dB over 3 images x 1 seeds of x.npz, a column a sigma:"
    assert "\n".join(table) == tables.brief(rows, tables.mean_image_rows(plan))
    assert failed == f"1 of {len(rows)} trials failed (not finite) and are in no median."
    assert attacker.startswith("Attacker 'informed', who knows")
    assert files == f"In {tmp_path}: summary.md (quartiles, SSIM, costs, guarantees), quality.png, contact_sheet.png"
