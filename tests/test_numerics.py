"""Results do not depend on settings of JAX that a shell or a notebook left on, or say which were on."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg  # noqa: F401 - its BLAS is a library of its own
import threadpoolctl

from gdiff_jax import numerics, parallel
from gdiff_jax.algebra.structure import on_host
from gdiff_jax.errors import ConfigError
from gdiff_jax.sweeping.records import VERSION, Store
from gdiff_jax.victims import zoo


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_keys_are_of_threefry_whatever_the_default_is():
    images, seeds = np.arange(3), np.zeros(3, int)
    draw = lambda keys: jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)
    expected = draw(parallel.trial_keys(7, images, seeds))
    weights = zoo.init_params("mlp-narrow", zoo.make_victim("mlp-narrow", (8, 8, 1), 10), 3)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(draw(parallel.trial_keys(7, images, seeds)), expected)
        for k in range(3):  # of a batch of one, which under rbg would draw other numbers
            np.testing.assert_array_equal(draw(parallel.trial_keys(7, images[k : k + 1], seeds[:1]))[0], expected[k])
        again = zoo.init_params("mlp-narrow", zoo.make_victim("mlp-narrow", (8, 8, 1), 10), 3)
    jax.tree.map(np.testing.assert_array_equal, again, weights)
    np.testing.assert_array_equal(jax.random.key_data(numerics.key(5)), [0, 5])  # what it has been since the first record


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (lambda: jax.enable_x64(True), "jax_enable_x64", True),
        (lambda: jax.default_matmul_precision("bfloat16"), "jax_default_matmul_precision", "bfloat16"),
        (lambda: jax.threefry_partitionable(False), "jax_threefry_partitionable", False),
    ],
)
def test_a_setting_that_touches_numbers_is_part_of_the_identity(tmp_path, settings, name, value):
    usual = Store(tmp_path / "out", {"steps": 3})
    assert usual.identity == {"version of records": VERSION, "steps": 3}  # settings as usual leave no entry of their own
    usual.open()
    with settings():
        assert numerics.unusual() == {name: value}
        with pytest.raises(ConfigError, match=f"{name} was {numerics.USUAL[name]!r}, is {value!r}"):
            Store(tmp_path / "out", {"steps": 3})
        Store(tmp_path / "other", {"steps": 3}).open()
        Store(tmp_path / "other", {"steps": 3})
    with pytest.raises(ConfigError, match=f"{name} was {value!r}, is {numerics.USUAL[name]!r}"):
        Store(tmp_path / "other", {"steps": 3})


def test_of_xla_only_what_changes_the_arithmetic_counts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=/tmp/x")
    assert numerics.unusual() == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_cpu_enable_fast_math=true")
    assert numerics.unusual() == {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}


def test_a_thread_computes_under_the_settings_of_its_caller():
    dtype = lambda: str(jnp.asarray(np.float64(1)).dtype)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        assert in_a_thread(dtype) == "float32"
        assert in_a_thread(numerics.carried(dtype)) == "float64"
        assert in_a_thread(numerics.carried(lambda: jax.config.jax_default_matmul_precision)) == "highest"


def test_debugging_is_set_aside_and_told():
    said = []
    with numerics.without_debugging(said.append):
        assert said == []
    with jax.debug_nans(True), jax.disable_jit(True):
        with numerics.without_debugging(said.append):
            assert jnp.isnan(jnp.log(-jnp.ones(()))).item()
            assert hasattr(jax.jit(jnp.sin), "lower")
        with pytest.raises(FloatingPointError):
            jnp.log(-jnp.ones(()))
    (line,) = said
    assert "JAX_DEBUG_NANS, JAX_DISABLE_JIT is set aside" in line


def test_factorisations_take_one_thread_while_leaks_are_solved_and_as_many_as_before_then():
    threads = lambda: [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        assert max(before) == 2
        with on_host():
            assert set(threads()) == {1}
            with on_host():
                pass
            assert set(threads()) == {1}
        assert threads() == before


def test_of_what_differs_settings_are_told_by_value_and_hashes_by_name():
    one = {"batch": 3, "picked": "a" * 64, "sha256": {"prior": "b" * 64, "images": "c" * 64}}
    other = {"batch": 4, "picked": None, "sha256": {"prior": "d" * 64, "images": "c" * 64}}
    assert numerics.differences(one, other) == "batch was 3, is 4; picked is another; sha256 of prior is another"
    assert numerics.differences(one, one) == ""
