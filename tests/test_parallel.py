"""Trials over devices: the same numbers, no collective."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdiff_jax as gd
from gdiff_jax import parallel

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)\b")


def four_devices():
    devices = jax.local_devices()
    assert len(devices) >= 4, "conftest asks for four devices"
    return parallel.trial_mesh(devices[:4])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("derivative", ["mixed partial", "double reverse"])
def test_gradients_on_four_devices_are_those_of_one_without_a_collective(derivative):
    """The derivative of each trial's own distance, with the victim's weights replicated."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=3)}
    loss = lambda p, x, y: jnp.square(jnp.tanh(x @ p["w"] + p["b"])[y]).sum()
    x, y = rng.normal(size=(8, 5)), np.arange(8) % 3
    leaks = jax.tree.map(lambda a: rng.normal(size=(8, *a.shape)), params)

    def distance(params, own):
        x, y, leak = own
        if derivative == "mixed partial":
            return gd.GradientMatching(params, y, leak, loss)(x)
        return gd.l2(jax.grad(loss)(params, x, y), leak)

    gradient = lambda params, own: jax.grad(lambda x: distance(params, (x, *own[1:])))(own[0])
    expected = jax.jit(jax.vmap(gradient, in_axes=(None, 0)))(params, (x, y, leaks))
    mesh = four_devices()
    args = parallel.replicate(params, mesh), parallel.divide((x, y, leaks), mesh)
    compiled = jax.jit(parallel.map_trials(gradient, mesh)).lower(*args).compile()
    found = compiled(*args)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(found.sharding.device_set) == 4
    assert not COLLECTIVE.search(compiled.as_text())


def test_keys_of_trials_depend_on_image_and_seed_alone():
    key = lambda seed, *trials: jax.random.key_data(parallel.trial_keys(seed, *np.array(trials).T))
    several = key(0, (0, 0), (0, 1), (1, 0), (2, 5))
    assert len({tuple(k) for k in several.tolist()}) == 4
    np.testing.assert_array_equal(several[2:], key(0, (1, 0), (2, 5)))
    assert (key(1, (1, 0))[0] != several[2]).any()


def test_one_process_agrees_with_itself():
    values = np.arange(3)
    assert parallel.agree(values) is values
    assert parallel.all_have(values)


def test_on_a_cpu_each_loop_ends_by_its_own():
    """One after another, each as often as it needs; lowered for other platforms, all at a time."""
    turns = []

    def count_to(end):
        def step(n):
            jax.debug.callback(lambda: turns.append(1))
            return n + 1

        return jax.lax.while_loop(lambda n: n < end, step, jnp.int32(0))

    ends = jnp.array([1, 7, 2])
    together = jax.jit(jax.vmap(parallel.one_by_one_on_cpu(count_to)))
    np.testing.assert_array_equal(together(ends), ends)
    jax.effects_barrier()
    assert len(turns) == 10
    square = jax.vmap(parallel.one_by_one_on_cpu(lambda x: x @ x))
    lowered = lambda platform: jax.jit(square).trace(jnp.ones((3, 2, 2))).lower(lowering_platforms=(platform,)).as_text()
    assert "while" in lowered("cpu")
    assert "while" not in lowered("tpu")
