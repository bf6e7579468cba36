"""Figures as they are designed, whatever the user's matplotlib is told."""

import io

import matplotlib
import numpy as np
from PIL import Image

from gdiff_jax.sweeping.drawing import Drawing, house_style


def draw():
    with house_style({"font.size": 9}):
        figure = Drawing(figsize=(2, 1))
        figure.subplots().set_title("cost_$HOME_$x^")  # a name, and no formula
        return figure._repr_png_()


def test_a_notebook_shows_it_and_a_matplotlibrc_changes_nothing():
    usual = draw()
    assert Image.open(io.BytesIO(usual)).size == (220, 110)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "axes.facecolor": "red"}):
        other = draw()
        assert matplotlib.rcParams["font.size"] == 40
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(usual))), np.asarray(Image.open(io.BytesIO(other))))
