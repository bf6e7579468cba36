"""Pictures of records."""

from tiny import row_of

from gdiff_jax.sweeping import plots


def test_the_legend_names_every_method_and_an_exact_image_does_not_flatten_the_plot(monkeypatch, tmp_path):
    """Methods that the first panel lacks too; 150 dB would press all else into one line."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    rows = [row_of("dsg", 0.0, 0, 20.0), dict(row_of("analytic", 0.0, 0, 150.0), victim="mlp")]
    plots.plot_quality(rows, [], lambda victim, mechanism, sigma: float("inf"), tmp_path / "quality.png")
    (figure,) = figures
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"DSG", "ANALYTIC"}
    assert [ax.get_ylim()[1] for ax in figure.axes] == [plots.EXACT + 1] * 2
    drawn = [float(y) for ax in figure.axes for line in ax.lines for y in line.get_ydata()]
    assert max(drawn) == plots.EXACT  # at the edge, not beyond it
    assert "cut at 60" in figure.axes[0].get_ylabel()


def test_inferred_labels_are_shares_over_sigma(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    rows = [
        row_of("dsg", sigma, i, 20.0, accuracy=share)
        for sigma, shares in ((0.0, [1, 1]), (1.0, [1, 0]))
        for i, share in enumerate(shares)
    ]
    plots.plot_labels(rows + [dict(row, method="dps") for row in rows], tmp_path / "labels.png")
    (line,) = figures[0].axes[0].lines
    assert line.get_ydata().tolist() == [1.0, 0.5]
    assert line.get_label() == "cnn, untrained"
