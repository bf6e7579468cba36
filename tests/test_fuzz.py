"""Whatever is handed over gives a result that can be used, or one line that says what is wrong: random arrays, trees, flags."""

import math

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdiff_jax import options
from gdiff_jax.auditing import checks as arguments
from gdiff_jax.auditing.settings import AuditConfig
from gdiff_jax.errors import ConfigError
from gdiff_jax.methods import METHODS
from gdiff_jax.sweeping import checks, inputs
from gdiff_jax.sweeping.config import SweepConfig
from gdiff_jax.victims import saved_trees

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:images reach from")]
many = lambda count: settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))

SHAPE = (4, 4, 3)
TYPES = ("u1", "u2", "i1", "i8", "?", "f2", "f4", "f8", "c8", "U3", "M8[s]", "O")
shapes = st.sampled_from([(2, *SHAPE), SHAPE, (2, 3, 4, 4), (2, 4, 4), (2, 4, 4, 4), (0, *SHAPE), (2, 5, 4, 3), (), (48,)])
labels_shapes = st.sampled_from([(2,), (2, 1), (2, 3), (3,), (), (0,), (1, 2)])


def arrays(shapes):
    """Of any type, with numbers from those that images and labels have, and from all there are."""

    def of(dtype):
        kind = np.dtype(dtype).kind
        some = {"u": st.integers(0, 255), "i": st.integers(-3, 100), "O": st.sampled_from(["a", None, 1])}
        some["f"] = st.sampled_from([-1, -0.25, 0, 0.5, 1, 2, 255, math.nan, math.inf])
        return hnp.arrays(dtype, shapes, elements=some.get(kind)) | (st.nothing() if kind == "O" else hnp.arrays(dtype, shapes))

    return st.sampled_from(TYPES).flatmap(of)


def one_line(error):
    text = str(error)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 700


@many(600)
@given(arrays(shapes) | arrays(shapes).map(lambda a: a.tolist()))
def test_images_are_taken_in_their_range_or_refused(images):
    try:
        taken = arguments.images_of("images", images, SHAPE)
    except ConfigError as error:
        one_line(error)
    else:
        given_ = np.asarray(images)
        assert taken.shape == given_.shape
        assert taken.dtype == np.float32
        assert np.abs(taken).max() <= 1
        expected = given_ / 127.5 - 1 if given_.dtype.kind in "iu" else given_
        np.testing.assert_allclose(taken, expected.astype(np.float32), atol=1e-6)


trees = lambda of: st.dictionaries(st.text(max_size=2), of, max_size=2) | st.lists(of, max_size=3)


@many(450)
@given(st.recursive(arrays(labels_shapes), trees))
def test_labels_are_taken_or_refused(labels):
    try:
        taken = arguments.labels_of(labels, 2)
    except ConfigError as error:
        one_line(error)
    else:
        leaves = jax.tree.leaves(taken)
        assert leaves
        assert all(a.shape[:1] == (2,) and a.dtype.kind not in "USMmO" for a in leaves)


EXPECTED = {"a.kernel": np.zeros((4, 3), np.float32), "a.bias": np.zeros(3, np.float32)}
names = st.sampled_from(
    ["a.kernel", "a/kernel", "a.weight", "a.bias", "module.a.weight", "module.a.bias", "b", "arr_0", "arr_1"]
)
kernels = st.sampled_from([(4, 3), (3, 4), (1, 4, 3), (3,), (1, 3), (), (0,)])
files = st.dictionaries(names, st.sampled_from(["f2", "f4", "f8", "i4", "?", "c8"]).flatmap(lambda t: hnp.arrays(t, kernels)))
whole = st.tuples(*(hnp.arrays("f4", shape, elements=st.integers(-9, 9)) for shape in ((4, 3), (3,))))
whole = st.tuples(st.sampled_from([("a.kernel", "a.bias"), ("x/a/kernel", "x/a/bias"), ("arr_0", "arr_1")]), whole)


@many(250)
@given(files | whole.map(lambda pair: dict(zip(*pair, strict=True))))
def test_saved_trees_are_taken_number_by_number_or_refused(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    np.savez(path, **arrays)
    try:
        tree = saved_trees.fit(str(path), EXPECTED, {}, say=one_line)
    except ValueError as error:
        one_line(error)
    else:
        assert {name: value.shape for name, value in tree.items()} == {name: value.shape for name, value in EXPECTED.items()}
        for value in tree.values():
            assert value.dtype == np.float32
            same = lambda a, value=value: a.size == value.size and np.array_equal(np.sort(a, None), np.sort(value, None))
            assert any(same(a.astype(np.float32)) for a in arrays.values() if a.dtype.kind == "f")


WORDS = (
    "",
    "all",
    "none",
    "l2",
    "cosine",
    "informed",
    "server",
    "eavesdropper",
    "mlp",
    "cnn",
    "x:y",
    "é\udc80",
    "gaussian",
    "clip:1",
)
words = st.sampled_from((*WORDS, "clip:1+gaussian", "clip:-1+gaussian", "soteria:0.4", "topk:2", *METHODS)) | st.text(
    max_size=6
)
numbers = {int: st.integers(-3, 200), float: st.floats() | st.sampled_from([0.0, 0.1, 1.0]), bool: st.booleans(), str: words}
KINDS = {"int": int, "float": float, "bool": bool, "str": str}


def values_of(field):
    """A strategy for the values that a flag can have."""
    kind = str(field.type)
    of = numbers[next(KINDS[name] for name in KINDS if name in kind)]
    return st.lists(of, max_size=3).map(tuple) if "tuple" in kind else of


def changes_of(defaults):
    fields = {field.name: field for _, field in options.leaves(defaults)}
    draw = lambda names: st.fixed_dictionaries({name: values_of(fields[name]) for name in names})
    return st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(draw)


def checked(sweep):
    mechanisms = inputs.parse_mechanisms(sweep.mechanisms)
    sweep = checks.write_out_all(sweep, mechanisms)
    checks.check(sweep, mechanisms)
    return sweep, [sweep.noise.levels(spec, len(mechanisms) == 1) for spec in mechanisms.values()]


@many(450)
@given(changes_of(SweepConfig()))
def test_flags_of_a_sweep_can_be_run_or_are_refused(changes):
    try:
        sweep, levels = checked(options.replace(SweepConfig(), **changes))
    except ConfigError as error:
        one_line(error)
    else:
        assert all(level == tuple(sorted(level)) and all(s >= 0 and math.isfinite(s) for s in level) for level in levels)
        assert sweep.attacks.methods


@many(250)
@given(changes_of(AuditConfig()))
def test_flags_of_an_audit_can_be_run_or_are_refused(changes):
    try:
        config = options.replace(AuditConfig(), **changes).completed()
        config.check()
        checked(config.sweep())
    except ConfigError as error:
        one_line(error)
