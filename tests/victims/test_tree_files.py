"""Files of other training loops: what they are is read off their first bytes, their names are matched, none is unpickled."""

import pickle

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import serialization
from priors import torch_files

from gdiff_jax.victims import names, saved_trees, tree_files

RNG = np.random.default_rng(0)
OURS = {
    "a.bias": RNG.normal(size=5).astype(np.float32),
    "a.kernel": RNG.normal(size=(12, 5)).astype(np.float32),
    "t": np.float32(1.5),
}
NESTED = {"a": {"kernel": OURS["a.kernel"], "bias": OURS["a.bias"]}, "t": np.asarray(OURS["t"])}
SHAPES = {name: np.zeros_like(value) for name, value in OURS.items()}
TORCH = {"a.weight": np.ascontiguousarray(OURS["a.kernel"].T), "a.bias": OURS["a.bias"], "t": np.asarray(OURS["t"])}
AS_IS = {"a.kernel": None}


def fitted(path, orders=AS_IS, **options):
    said = []
    return saved_trees.fit(str(path), SHAPES, orders, say=said.append, **options), " ".join(said)


def assert_ours(tree):
    assert tree.keys() == OURS.keys()
    for name, value in OURS.items():
        assert (tree[name].shape, tree[name].dtype) == (np.shape(value), np.float32)
        np.testing.assert_array_equal(tree[name], value)


def write_all(folder):
    (folder / "flax.msgpack").write_bytes(serialization.msgpack_serialize(NESTED))
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "orbax", {"a": {k: jnp.asarray(v) for k, v in NESTED["a"].items()}, "t": jnp.asarray(OURS["t"])})
    np.savez(folder / "x.npz", **OURS)
    (folder / "x.npz").rename(folder / "UPPER.NPZ")
    np.savez(folder / "y.npz", **OURS)
    (folder / "y.npz").rename(folder / "really-npz.pt")
    safetensors.numpy.save_file(TORCH, folder / "lower.safetensors")
    (folder / "lower.safetensors").rename(folder / "UPPER.SafeTensors")
    scalar = torch_files.tensor("t", np.full(1, OURS["t"]), (), (), 0)
    torch_files.save(folder / "torch.pt", {**TORCH, "t": scalar})


def test_each_format_gives_the_same_arrays(tmp_path):
    write_all(tmp_path)
    for path in tmp_path.iterdir():
        assert_ours(fitted(path)[0])


NAMINGS = {
    "params/params/a/kernel": (lambda n: f"params/params/{n.replace('.', '/')}", "params.params. before all names"),
    "['params']['a']['kernel']": (lambda n: "['params']" + "".join(f"['{p}']" for p in n.split(".")), ""),
    "a.kernel.value": (lambda n: f"{n}.value", ""),
    "a.weight.grad": (lambda n: f"{n}.grad", ""),
    "net.a.weight": (lambda n: f"net.{n}", "net. before all names is taken off"),
    "module.a.weight": (lambda n: f"module.{n}", "module. before all names is taken off"),
    "a._orig_mod.weight": (lambda n: n.replace("a.", "a._orig_mod."), "what a wrapper put into its names"),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_what_stands_around_names_is_taken_off_and_said(naming, tmp_path):
    change, words = NAMINGS[naming]
    np.savez(tmp_path / "x.npz", **{change(name): value for name, value in (TORCH if "weight" in naming else OURS).items()})
    tree, said = fitted(tmp_path / "x.npz")
    assert_ours(tree)
    assert words in said
    theirs = {f"params.{name}": value for name, value in SHAPES.items()}  # the victim's names may have a prefix too
    of_prefixed = saved_trees.fit(str(tmp_path / "x.npz"), theirs, {"params.a.kernel": None}, say=lambda _: None)
    np.testing.assert_array_equal(of_prefixed["params.a.kernel"], OURS["a.kernel"])


def test_a_tree_within_a_checkpoint_is_taken_and_what_is_left_is_said(tmp_path):
    state = {"params": NESTED, "opt_state": {"0": {"mu": NESTED}}, "step": 3}
    (tmp_path / "state.msgpack").write_bytes(serialization.msgpack_serialize(state))
    tree, said = fitted(tmp_path / "state.msgpack", weights=True)
    assert_ours(tree)
    assert "the arrays under params are taken, left aside: opt_state.0.mu.a.bias" in said
    with pytest.raises(ValueError, match=r"several trees that fit the victim \(params, opt_state.0.mu\): save the one"):
        fitted(tmp_path / "state.msgpack")  # of a gradient nobody knows
    (tmp_path / "one.msgpack").write_bytes(serialization.msgpack_serialize({"grads": NESTED, "epoch": 3}))
    tree, said = fitted(tmp_path / "one.msgpack")
    assert_ours(tree)
    assert "the arrays under grads are taken, left aside: epoch" in said


def test_bfloat16_and_float16_are_what_they_are(tmp_path):
    for dtype in (ml_dtypes.bfloat16, np.float16):
        np.savez(tmp_path / "x.npz", **{name: np.asarray(value, dtype) for name, value in OURS.items()})
        tree, _ = fitted(tmp_path / "x.npz")
        for name, value in OURS.items():
            np.testing.assert_array_equal(tree[name], np.asarray(value, dtype).astype(np.float32))


def test_a_list_is_taken_in_order_where_shapes_leave_no_other(tmp_path):
    np.savez(tmp_path / "list.npz", *OURS.values())
    tree, said = fitted(tmp_path / "list.npz")
    assert_ours(tree)
    assert "without names are taken in the order of the victim's" in said
    np.savez(tmp_path / "torch.npz", *TORCH.values())
    torch_files.save(tmp_path / "list.pt", dict(zip("012", TORCH.values(), strict=True)))  # what a list is when it is flat
    for file in ("torch.npz", "list.pt"):
        with pytest.raises(ValueError, match=r"is a list of 3 arrays without names, .*model.named_parameters"):
            fitted(tmp_path / file)
    twins = {"a.w": np.zeros((2, 3)), "b.w": np.zeros((2, 3))}
    np.savez(tmp_path / "twins.npz", *twins.values())
    with pytest.raises(ValueError, match="shapes do not tell which is which"):
        saved_trees.fit(str(tmp_path / "twins.npz"), twins, {})


BROKEN = {
    "leak.pkl": (lambda p: p.write_bytes(pickle.dumps(NESTED)), "is a pickle, which would run code"),
    "leak.npy": (lambda p: np.save(p, OURS["a.kernel"]), "is a .npy or what Equinox writes, arrays without names"),
    "leak.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file of Keras"),
    "empty.npz": (lambda p: p.write_bytes(b""), "is empty"),
    "folder": (lambda p: p.mkdir(), "is a folder, and no orbax checkpoint"),
    "steps": (lambda p: (p / "7").mkdir(parents=True), "one of its steps may be meant: 7"),
    "text.txt": (lambda p: p.write_text("a gradient"), "in no format that is known"),
    "objects.npz": (lambda p: np.savez(p, a=np.array([1, None], object)), "a holds Python objects"),
    "float8.npz": (lambda p: np.savez(p, a=np.ones(3, ml_dtypes.float8_e4m3fn)), r"a has the dtype \|V1, of raw bytes"),
    "twice.npz": (lambda p: np.savez(p, **{"a/b": np.ones(2), "a.b": np.ones(2)}), r"two arrays are called a\.b"),
    "none.msgpack": (lambda p: p.write_bytes(serialization.msgpack_serialize({"a": "b"})), "no array of numbers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_with_what_can(name, tmp_path):
    write, words = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} .*{words}"):
        tree_files.read(str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v[None], r"a.bias \(1, 5\), the victim has \(5,\), with an axis more"),
        (lambda v: v.astype(np.complex64), "no floats: a.bias is complex64"),
        (lambda v: (100 * v).astype(np.int8), "a.bias is int8: integers have a scale"),
        (lambda v: v.astype(np.float64) * 1e300, "not finite: a.bias"),
    ],
)
def test_arrays_that_are_no_gradient_are_named(change, words, tmp_path):
    np.savez(tmp_path / "x.npz", **{name: change(np.asarray(value)) for name, value in OURS.items()})
    with pytest.raises(ValueError, match=words):
        fitted(tmp_path / "x.npz")


def test_names_that_fit_in_two_ways_are_two_readings():
    found = names.matches(["a.kernel"], ["x.kernel", "y.kernel"])
    assert sorted(match.prefix for match in found) == ["x", "y"]
    assert names.matches(["a.kernel", "a.bias"], ["a.kernel"]) == []
    assert names.closest(["a.kernel", "a.bias"], ["a.kernel"]).names == {"a.kernel": "a.kernel"}
