"""Each class is a tree of its own, so that a jitted function never runs another's program."""

import jax
import jax.numpy as jnp
import pytest

from gdiff_jax.mechanisms import GaussianNoise, LaplaceNoise
from gdiff_jax.methods import DSG, CalibratedDSG
from gdiff_jax.pytrees import as_float64, pytree, static


@pytree
class Line:
    slope: jax.Array
    name: str = static(default="line")
    offset: jax.Array | float = 0.0


def test_classes_with_equal_fields_are_different_trees():
    """A hash that differs is not enough: jit's cache compares only some of its bits, then the trees."""
    assert jax.tree.structure(GaussianNoise(1.0)) != jax.tree.structure(LaplaceNoise(1.0))
    assert jax.tree.structure(DSG()) != jax.tree.structure(CalibratedDSG())
    assert jax.tree.structure(DSG(0.1)) == jax.tree.structure(DSG(0.2))
    assert jax.tree.structure(DSG(interval=1)) != jax.tree.structure(DSG(interval=2))


def test_a_jitted_function_runs_the_program_of_the_class_it_is_given():
    """Of as many pairs as one in ten of them would show in, nearly for sure."""
    which = jax.jit(lambda tree: tree.x if type(tree).__name__ == "First" else -tree.x)
    for _ in range(40):
        first, second = (pytree(type(name, (), {"__annotations__": {"x": float}})) for name in ("First", "Second"))
        assert (which(first(1.0)), which(second(1.0))) == (1, -1)


def test_a_tree_has_paths_and_comes_back():
    line = Line(jnp.ones(2), "rising", 3.0)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(line)] == [".slope", ".offset"]
    again = jax.tree.map(lambda leaf: 2 * leaf, line)
    assert (again.slope == 2).all()
    assert again.offset == 6
    assert again.name == "rising"
    assert hash(jax.tree.structure(line)) == hash(jax.tree.structure(again))


@pytest.mark.usefixtures("x64")
def test_arrays_of_floats_are_widened_of_whichever_kind():
    """NumPy's own kind of a bfloat16 is no float."""
    tree = {"b": jnp.ones(2, jnp.bfloat16), "h": jnp.ones(2, jnp.float16), "n": jnp.arange(3)}
    wide = as_float64(tree)
    assert [wide[name].dtype for name in "bhn"] == [jnp.float64, jnp.float64, tree["n"].dtype]
