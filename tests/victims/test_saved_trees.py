"""Weights and gradients of other training loops, by name, shape, layout and order of rows; and what is said of those that
do not fit."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from gdiff_jax.victims import saved_trees

RNG = np.random.default_rng(0)
OURS = {
    "conv.kernel": RNG.normal(size=(5, 5, 3, 6)).astype(np.float32),
    "conv.bias": RNG.normal(size=6).astype(np.float32),
    "out.kernel": RNG.normal(size=(96, 10)).astype(np.float32),
    "out.bias": RNG.normal(size=10).astype(np.float32),
}
SHAPES = {name: np.zeros_like(value) for name, value in OURS.items()}


def torch_layout(tree):
    """What a torch network of the same shape saves, its flattened map in the order (C, H, W)."""
    out = tree["out.kernel"].reshape(4, 4, 6, 10).transpose(2, 0, 1, 3).reshape(96, 10)
    arrays = {"conv.weight": tree["conv.kernel"].transpose(3, 2, 0, 1), "conv.bias": tree["conv.bias"]}
    arrays |= {"out.weight": out.T, "out.bias": tree["out.bias"]}
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def test_arrays_under_our_names_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "flax.npz", **{f"params/{name.replace('.', '/')}": value for name, value in OURS.items()})
    tree = saved_trees.fit(str(tmp_path / "flax.npz"), SHAPES, {})
    assert tree.keys() == OURS.keys()
    for name, value in OURS.items():
        np.testing.assert_array_equal(tree[name], value)


def test_arrays_under_torchs_names_get_our_layout(tmp_path):
    save_file(torch_layout(OURS), tmp_path / "torch.safetensors")
    tree = saved_trees.fit(str(tmp_path / "torch.safetensors"), SHAPES, {"out.kernel": (6, 4, 4)})
    for name, value in OURS.items():
        np.testing.assert_array_equal(tree[name], value)
    as_is = saved_trees.fit(str(tmp_path / "torch.safetensors"), SHAPES, {"out.kernel": None})
    np.testing.assert_array_equal(as_is["out.kernel"], torch_layout(OURS)["out.weight"].T)


def test_order_of_rows(tmp_path):
    """By what a dense layer makes of an image that torch flattened (C, H, W) and we (H, W, C)."""
    expected = {"a.kernel": np.zeros((12, 5), np.float32), "a.bias": np.zeros(5, np.float32)}
    image = np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)
    kernel = RNG.normal(size=(5, 12)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", **{"a.weight": kernel, "a.bias": np.zeros(5, np.float32)})
    tree = saved_trees.fit(str(tmp_path / "rows.npz"), expected, {"a.kernel": (3, 2, 2)})
    np.testing.assert_allclose(image.ravel() @ tree["a.kernel"], kernel @ image.transpose(2, 0, 1).ravel(), rtol=1e-5)


def test_orders_as_they_are_written():
    assert saved_trees.parse_orders(("a.kernel:3x2x2", "b.kernel:as-is")) == {"a.kernel": (3, 2, 2), "b.kernel": None}
    for text in ("a.kernel", "a.kernel:3x2", "a.kernel:3x2x0", "a.kernel:cxhxw"):
        with pytest.raises(ValueError, match=f"^'{text}' is not NAME:CxHxW, such as fc1.kernel:16x8x8"):
            saved_trees.parse_orders((text,))


def write(folder):
    without = lambda name: {k: v for k, v in OURS.items() if k != name}
    np.savez(folder / "missing.npz", **without("out.bias"))
    np.savez(folder / "extra.npz", **OURS, other=np.zeros(3))
    np.savez(folder / "shape.npz", **without("out.bias"), **{"out.bias": np.zeros(11)})
    np.savez(folder / "nan.npz", **without("out.bias"), **{"out.bias": np.full(10, np.nan)})
    np.savez(folder / "integer.npz", **without("out.bias"), **{"out.bias": np.zeros(10, int)})
    save_file(torch_layout(OURS), folder / "torch.safetensors")
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    (folder / "broken.safetensors").write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("file", "orders", "words"),
    [
        ("nowhere.npz", {}, "does not exist; give a .npz"),
        ("missing.npz", {}, "does not fit the victim; missing: out.bias"),
        ("extra.npz", {}, "not of the victim: other"),
        ("shape.npz", {}, r"of another shape: out.bias \(11,\), the victim has \(10,\)"),
        ("nan.npz", {}, "not finite: out.bias"),
        ("integer.npz", {}, "no floats: out.bias is int64: integers have a scale"),
        ("broken.npz", {}, "cannot be read"),
        ("broken.safetensors", {}, "cannot be read"),
        ("torch.safetensors", {}, r"of an unknown order: out.kernel \(96, 10\) \(say flattened=out.kernel:CxHxW, or as-is"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_all_that_is_wrong(file, orders, words, tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path / file} .*{words}"):
        saved_trees.fit(str(tmp_path / file), SHAPES, orders)


def test_an_order_that_cannot_be_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=r"^flattened out.kernel:5x4x4: out.kernel has 96 rows, not 80"):
        saved_trees.fit(str(tmp_path / "torch.safetensors"), SHAPES, {"out.kernel": (5, 4, 4)})
    with pytest.raises(ValueError, match=r"^flattened in.kernel: the victim has no such array; it has conv.kernel, "):
        saved_trees.fit(str(tmp_path / "torch.safetensors"), SHAPES, {"in.kernel": (1, 1, 1)})


def test_no_array_is_two_parameters(tmp_path):
    np.savez(tmp_path / "one.npz", **{"a.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"one array for several: a\.kernel, a\.scale"):
        saved_trees.fit(str(tmp_path / "one.npz"), {"a.kernel": np.zeros(3), "a.scale": np.zeros(3)}, {})
