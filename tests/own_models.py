"""Models of a user's own, at the smallest size, as the audit's command takes them: a file of functions that return loss and
params; images are 16 x 16 x 3."""

import jax
import jax.numpy as jnp


def make():
    """Two layers, the first a convolution of patches that do not overlap."""

    def loss(params, x, y):
        patches = x.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 48)
        h = jnp.tanh(patches @ params["conv"]["kernel"].reshape(48, 6) + params["conv"]["bias"][None])
        logits = h.reshape(-1) @ params["out"]["kernel"] + params["out"]["bias"]
        return -jax.nn.log_softmax(logits)[y]

    k = jax.random.split(jax.random.key(3), 2)
    return loss, {
        "conv": {"kernel": 0.3 * jax.random.normal(k[0], (4, 4, 3, 6)), "bias": jnp.zeros(6)},
        "out": {"kernel": 0.3 * jax.random.normal(k[1], (96, 10)), "bias": jnp.zeros(10)},
    }


def smoothed():
    """With smoothed labels, and sure enough for classes below what smoothing gives them."""
    alone, params = make()
    params["out"]["kernel"] *= 8
    return lambda p, x, y: 0.8 * alone(p, x, y) + 0.02 * sum(alone(p, x, jnp.asarray(k)) for k in range(10)), params


def sure():
    """Of class 0, up to rounding."""
    loss, params = make()
    params["out"]["bias"] = params["out"]["bias"].at[0].set(17.0)
    return loss, params


def of_labels(of_logits, classes=10, scale=4):
    """`make` with another loss of its logits, which tells their labels in its own way."""
    _, params = make()
    params["out"] = {"kernel": scale * params["out"]["kernel"][:, :classes], "bias": params["out"]["bias"][:classes]}

    def loss(params, x, y):
        patches = x.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 48)
        h = jnp.tanh(patches @ params["conv"]["kernel"].reshape(48, 6) + params["conv"]["bias"][None])
        return of_logits(h.reshape(-1) @ params["out"]["kernel"] + params["out"]["bias"], y)

    return loss, params


def from_one():
    """Classes 1 .. 10."""
    return of_labels(lambda z, y: -jax.nn.log_softmax(z)[y - 1])


def squared():
    return of_labels(lambda z, y: jnp.square(z - jax.nn.one_hot(y, 10)).sum())


def one_logit():
    return of_labels(lambda z, y: jax.nn.softplus(z[0]) - y.astype(z.dtype) * z[0], 1)


def per_class():
    """A cross-entropy of each class alone: its label can be read."""
    return of_labels(lambda z, y: (jax.nn.softplus(z) - jax.nn.one_hot(y, 10) * z).sum())


def two():
    return of_labels(lambda z, y: -jax.nn.log_softmax(z)[y], 2, scale=1)


def many():
    """Twenty classes."""
    loss, params = of_labels(lambda z, y: -jax.nn.log_softmax(z)[y], scale=0.5)
    kernel = params["out"]["kernel"]
    params["out"] = {"kernel": jnp.concatenate([kernel, kernel[::-1]], 1), "bias": jnp.zeros(20)}
    return loss, params


def of_batch():
    """As training code has it."""
    alone, params = make()

    def loss(params, x, y):
        assert x.ndim == 4
        return jax.vmap(alone, (None, 0, 0))(params, x, y).mean()

    return loss, params


def mlp():
    """Its first layer is dense, behind a normalisation."""
    mean = jnp.array([0.4, 0.5, 0.6]).reshape(1, 1, 3)

    def loss(params, x, y):
        h = jnp.tanh(((x + 1) / 2 - mean).reshape(-1) / 0.25 @ params["a"]["w"] + params["a"]["b"])
        return -jax.nn.log_softmax(h @ params["z"]["w"] + params["z"]["b"])[y]

    k = jax.random.split(jax.random.key(4), 2)
    return loss, {
        "a": {"w": 0.03 * jax.random.normal(k[0], (768, 20)), "b": jnp.zeros(20)},
        "z": {"w": 0.3 * jax.random.normal(k[1], (20, 10)), "b": jnp.zeros(10)},
    }


def no_pair():
    return 3


def blind():
    return (lambda p, x, y: (p["w"] ** 2).sum(), {"w": jnp.ones(3)})


def sometimes():
    return (lambda p, x, y: jnp.where(y == 0, 1.0, jnp.inf) * (p["w"] * x.sum()).sum(), {"w": jnp.ones(3)})
