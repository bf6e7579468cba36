"""LPIPS, where the extra `lpips` is installed, and why it is left out where it cannot be computed."""

import jax
import numpy as np
import pytest

from benchmarks.recognise import lpips_space
from gdiff_jax import metrics

needs_extra = pytest.mark.skipif(bool(metrics.lpips_hindrance((32, 32, 3))), reason="needs the extra lpips")


@needs_extra
def test_lpips_orders_images_by_likeness():
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(0, 0.4, (32, 32, 3)), -1, 1).astype(np.float32)
    near, far = image + 0.02, rng.uniform(-1, 1, image.shape).astype(np.float32)
    same, less, more = metrics.lpips(np.stack([image, near, far]), image)
    assert same == pytest.approx(0, abs=1e-6)
    assert less < more
    grey = metrics.lpips(far[None, :, :, :1], image[:, :, :1])
    assert grey == metrics.lpips(far[None, :, :, :1].repeat(3, -1), image[:, :, :1].repeat(3, -1))


def test_lpips_is_left_out_where_it_would_be_nan_or_fail(monkeypatch):
    """By the reason that the page gives; whether the extra is there decides last."""
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: name)
    assert metrics.lpips_hindrance((32, 32, 3)) == metrics.lpips_hindrance((256, 256, 1)) == ""
    assert metrics.lpips_hindrance((24, 32, 3)) == "it needs at least 32 pixels each way"
    assert metrics.lpips_hindrance((32, 32, 2)) == "it needs grey or three channels, and there are 2"
    with pytest.raises(ValueError, match=r"LPIPS of images \(24, 32, 3\): it needs at least 32"):
        metrics.lpips(np.zeros((1, 24, 32, 3)), np.zeros((24, 32, 3)))
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert metrics.lpips_hindrance((32, 32, 3)) == "the extra lpips is not installed"


@needs_extra
def test_lpips_is_the_squared_distance_of_its_space():
    images = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        vectors = lpips_space()(images)
    np.testing.assert_allclose(np.square(vectors - vectors[0]).sum(1), metrics.lpips(images, images[0]), rtol=1e-3, atol=1e-6)
