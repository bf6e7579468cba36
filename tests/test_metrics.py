"""The metrics against closed forms and against a second implementation of SSIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from gdiff_jax.metrics import expectation_metrics, image_metrics, match_images, psnr_from_error, ssim


def ssim_numpy(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, Eq. 13, window by window: 11 x 11 Gaussian of sigma 1.5, windows inside the image, mean over all."""
    g = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g)[:, :, None] / g.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mean = lambda x: (w * x).sum((0, 1))
            mp, mq = mean(p), mean(q)
            vp, vq, cross = mean((p - mp) ** 2), mean((q - mq) ** 2), mean((p - mp) * (q - mq))
            values.append((2 * mp * mq + c1) * (2 * cross + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def pair(shape: tuple[int, ...], noise: float) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image in [-1, 1] and a noisy one, float32."""
    rng = np.random.default_rng(3)
    h, w, c = shape
    a = 0.8 * np.sin(np.arange(h)[:, None, None] / 3 + np.arange(w)[None, :, None] / 4 + np.arange(c))
    return a.astype(np.float32), np.clip(a + noise * rng.normal(size=shape), -1, 1).astype(np.float32)


@pytest.mark.parametrize("shape", [(11, 11, 1), (16, 13, 3)])
@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_ssim_equals_a_second_implementation(shape: tuple[int, ...], noise: float) -> None:
    a, b = pair(shape, noise)
    expected = ssim_numpy((a.astype(np.float64) + 1) / 2, (b.astype(np.float64) + 1) / 2)
    np.testing.assert_allclose(image_metrics(jnp.asarray(a), jnp.asarray(b))["ssim"], expected, atol=2e-5)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = 0.25, 0.75
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    np.testing.assert_allclose(ssim(jnp.full((12, 12, 1), a), jnp.full((12, 12, 1), b)), expected, rtol=1e-3)


@pytest.mark.parametrize("shift", [0.02, 0.5, 1.0])
def test_mse_and_psnr_of_a_constant_shift(shift: float) -> None:
    """A shift s of pixels in [-1, 1] is s / 2 of pixels in [0, 1]: MSE s^2 / 4, PSNR 10 log10(4 / s^2)."""
    a = jnp.full((4, 5, 3), -0.5)
    m = image_metrics(a + shift, a)
    np.testing.assert_allclose(m["mse"], shift**2 / 4, rtol=1e-5)
    np.testing.assert_allclose(m["psnr"], 10 * np.log10(4 / shift**2), rtol=1e-5)


@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_psnr_from_error_agrees_with_psnr(noise: float) -> None:
    """The trace's error is of images in [-1, 1]; it must name the same dB."""
    a, b = (jnp.asarray(x) for x in pair((8, 9, 3), noise))
    np.testing.assert_allclose(psnr_from_error(jnp.square(a - b).mean()), image_metrics(a, b)["psnr"], rtol=1e-5)


def test_equal_images_are_perfect() -> None:
    a, _ = (jnp.asarray(x) for x in pair((12, 12, 3), 0.1))
    m = image_metrics(a, a)
    assert m["mse"] == 0
    assert m["psnr"] == 200  # where it ends, to be written down
    assert psnr_from_error(jnp.float32(0)) == 200
    assert np.isnan(psnr_from_error(jnp.float32(np.nan)))
    assert np.isnan(image_metrics(a * jnp.nan, a)["psnr"])
    np.testing.assert_allclose(m["ssim"], 1, atol=1e-6)


def test_images_are_clipped_first() -> None:
    """A reconstruction may leave [-1, 1]; what is shown and saved is the clipped one, so that is what is measured."""
    white = jnp.ones((4, 4, 1))
    assert image_metrics(3 * white, white)["mse"] == 0
    assert image_metrics(-7 * white, white)["mse"] == 1


def test_a_batch_has_one_value_an_image() -> None:
    a, b = (np.stack(x) for x in zip(pair((12, 12, 3), 0.1), pair((12, 12, 3), 0.5), strict=True))
    batch = image_metrics(jnp.asarray(a), jnp.asarray(b))
    for i in range(2):
        alone = image_metrics(jnp.asarray(a[i]), jnp.asarray(b[i]))
        assert set(alone) == {"mse", "psnr", "ssim"}
        for name in alone:
            np.testing.assert_allclose(batch[name][i], alone[name], rtol=1e-5)


@pytest.mark.parametrize("shape", [(10, 32, 3), (32, 10, 3), (4, 10, 10, 1)])
def test_ssim_refuses_images_under_its_window(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"at least 11 pixels each way; the images are \("):
        ssim(jnp.zeros(shape), jnp.zeros(shape))
    assert set(image_metrics(jnp.zeros(shape), jnp.ones(shape))) == {"mse", "psnr"}


def test_metrics_pass_through_jit_and_vmap() -> None:
    a, b = (jnp.asarray(x)[None] for x in pair((12, 12, 1), 0.3))
    mapped, direct = jax.jit(jax.vmap(image_metrics))(a, b), image_metrics(a, b)
    for name in direct:
        np.testing.assert_allclose(mapped[name], direct[name], rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_images_are_matched_by_the_least_total_error(seed: int) -> None:
    """Against SciPy's assignment; random images, so the greedy choice is often not the best."""
    rng = np.random.default_rng(seed)
    truth, found = (rng.uniform(-1, 1, (6, 2, 2, 1)).astype(np.float32) for _ in range(2))
    order = np.asarray(jax.jit(match_images)(jnp.asarray(found), jnp.asarray(truth)))
    cost = np.square(truth[:, None] - found[None]).mean((2, 3, 4))
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    np.testing.assert_array_equal(order, columns[np.argsort(rows)])


def test_a_permutation_is_undone_and_a_failed_image_goes_where_nothing_else_fits() -> None:
    truth = jnp.linspace(-1, 1, 5)[:, None, None, None] * jnp.ones((5, 2, 2, 1))
    order = jnp.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(match_images(truth[order], truth), jnp.argsort(order))
    failed = truth[order].at[2].set(jnp.nan)  # stood for truth 4
    np.testing.assert_array_equal(match_images(failed, truth), jnp.argsort(order))
    assert sorted(np.asarray(match_images(jnp.full_like(truth, jnp.inf), truth))) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="matched one to one"):
        match_images(truth[:4], truth)


def test_what_is_expected_of_an_image_and_whether_it_is_right() -> None:
    truth, deviation = np.zeros((12, 12, 3)), np.full((12, 12, 3), 0.1)
    found = np.where(np.arange(12)[:, None, None] < 9, 0.19, 0.21) * np.ones_like(truth)
    expected = expectation_metrics(found, truth, deviation)
    assert expected["expected_psnr"] == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-4)
    assert expected["within_two_deviations"] == 0.75
    of_unknown = expectation_metrics(found, np.full_like(truth, np.nan), deviation)
    assert of_unknown == {"expected_psnr": expected["expected_psnr"]}
    for nothing in (np.full_like(deviation, np.nan), np.zeros_like(deviation)):
        assert expectation_metrics(found, truth, nothing) == {}


def test_bytes_are_refused():
    """Which would be clipped to white."""
    images = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"images are uint8; floats in \[-1, 1\] are needed"):
        image_metrics(images, images)


@pytest.mark.parametrize("scale", [255.0, 2.0])
def test_a_truth_in_another_range_is_refused(scale):
    truth = jnp.linspace(0, scale, 16 * 16 * 3).reshape(16, 16, 3)
    with pytest.raises(ValueError, match=r"images in \[-1, 1\] are needed"):
        image_metrics(truth / scale, truth)
