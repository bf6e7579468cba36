"""Which labels a leaked gradient betrays, read off the last layer: of one image, of a batch, or as one more unknown.

The last layer is dense with softmax and cross-entropy. For one image with features f, probabilities p and label y its
gradient is delta = p - onehot(y) for the bias, and f delta^T for the kernel. A batch leaks the mean over its images.
Labels are 0 .. classes - 1; a victim's kernel is `gradient[victim.last_kernel]`, (features, classes).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gdiff_jax.attacks.base import eigh_alone
from gdiff_jax.matching import GradientMatching, Loss, at_full_precision
from gdiff_jax.pytrees import pytree


@at_full_precision
def infer_label(kernel_gradient: jax.Array, bias_gradient: jax.Array, features: jax.Array | None = None) -> jax.Array:
    """The label of one image. Without noise always right: only the true class has delta < 0 (iDLG, Zhao et al. 2020).

    Under noise the smallest entry of the bias is one row's word among all: the leak is the rank-one matrix [f; 1] delta^T with
    white noise of any, unknown sigma. The label is the one of the largest marginal likelihood [our choice]: the entries of f
    are normal about `features`, with a spread that is not known (`_SPREADS`); delta is a times a pattern d that is negative
    at y alone and sums to 0, a of any size; and over spreads, sizes and patterns it is summed. The patterns are those nearest
    to the top right singular vector, of either sign, to the bias, and the uniform one. Where the features are as expected it
    becomes the least entry of features^T kernel + bias, for a constant the row sums of LLG (Wainakh et al. 2021); where they
    are not, as of a transformer, whose features have both signs, the singular vector tells, and the bias its sign.

    Args:
      kernel_gradient: (features, classes).
      bias_gradient: (classes,), classes >= 2.
      features: (features,) what f is expected to be, such as `Victim.features` of a mean image, or a constant near their size
        where no feature is negative (ReLU, sigmoid); None where nothing is known: they are then about 0.

    Returns:
      An integer, scalar; any for gradients of zeros.
    """
    rows = jnp.concatenate([kernel_gradient, bias_gradient[None]])
    largest = jnp.abs(rows).max()
    rows = rows / jnp.where(largest > 0, largest, 1.0)  # confident victims leak numbers whose squares underflow
    kernel, bias, classes = rows[:-1], rows[-1], bias_gradient.size
    values, vectors = eigh_alone(rows.T @ rows)
    top, line = values[-1], vectors[:, -1]
    eps = jnp.finfo(rows.dtype).eps
    # Of the noise a column holds what the line does not explain, and more: some hides in the line's own direction.
    noise = (jnp.vdot(rows, rows) - top) / (classes - 1) * (1 + (classes - 1) / len(rows))
    # Of rank one to rounding is without noise. Where a softmax is 1 to rounding, the bias alone still tells, by its sign.
    exact = noise <= 100 * eps * top
    sigma2 = jnp.maximum(noise / len(rows), eps**2)
    d = jnp.concatenate([_patterns(v) for v in (line, -line, bias - bias.mean(), jnp.ones_like(bias))])
    a = (jnp.sqrt(top) * jnp.exp2(-0.5 * jnp.arange(24, dtype=rows.dtype)))[:, None]  # of f from 0 to some 3000 of norm
    f = jnp.zeros_like(kernel[:, 0]) if features is None else features
    # Of noise alone the largest eigenvalue is about sigma2 (sqrt(rows) + sqrt(classes - 1))^2 (Marchenko and Pastur).
    signal = jnp.maximum(top - sigma2 * (len(rows) ** 0.5 + (classes - 1) ** 0.5) ** 2, 0.01 * top)
    rms = jnp.sqrt(signal / len(rows)) / a if features is None else jnp.sqrt(jnp.square(f).mean())
    likelihood = jnp.stack([_log_likelihood(kernel, bias, f, jnp.square(s * rms), a, d, sigma2) for s in _SPREADS])
    of_label = jax.nn.logsumexp(likelihood.reshape(-1, len(d) // classes, classes), axis=(0, 1))
    return jnp.where(exact, jnp.argmin(bias), jnp.argmax(of_label))


_SPREADS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the features about their mean, by how large that is [our choice]


def _log_likelihood(
    kernel: jax.Array, bias: jax.Array, f: jax.Array, spread2: jax.Array, a: jax.Array, d: jax.Array, sigma2: jax.Array
) -> jax.Array:
    """log p(kernel, bias) for each size a (sizes, 1) and pattern d (patterns, classes), up to what none of them changes.

    A row k_i is normal about a f_i d with covariance sigma2 I + spread2 a^2 d d^T, inverted by Sherman and Morrison; the
    bias is a row whose f is 1 and known.
    """
    along = d @ kernel.T  # k_i . d, (patterns, features)
    squares, mixed, norm = jnp.square(along).sum(1)[None], (along @ f)[None], f @ f
    total = sigma2 + spread2 * jnp.square(a)
    off = jnp.square(a) * squares - 2 * a**3 * mixed + a**4 * norm  # sum of (a (k_i - a f_i d) . d)^2
    quadratic = jnp.square(a) * norm - 2 * a * mixed - spread2 / total * off
    of_bias = jnp.square(a) - 2 * a * (d @ bias)[None]
    return -(quadratic + of_bias) / (2 * sigma2) - 0.5 * f.size * jnp.log(total / sigma2)


def _patterns(v: jax.Array) -> jax.Array:
    """(classes, classes): row y is v made a possible delta of label y, of norm 1 (or 0): others >= 0, and y minus their sum."""
    others = jnp.maximum(v, 0.0)
    d = jnp.where(jnp.eye(v.size, dtype=bool), (others - others.sum())[:, None], others[None])
    norm = jnp.linalg.norm(d, axis=1, keepdims=True)
    return d / jnp.where(norm > 0, norm, 1.0)


def label_counts(bias_gradient: jax.Array, batch_size: int, probabilities: jax.Array | None = None) -> jax.Array:
    """How often each label occurs in a batch of B images whose mean gradient leaked: its bias row is mean p - counts / B.

    With `probabilities`, counts = B (p - g) as integers: of all counts of sum B the closest, the likeliest under white noise.
    (The squared distance is convex and separable, so giving B labels, each to the class that lacks most, attains its minimum;
    it is rounding by largest remainder, but never goes below 0.) Exact if every class's p is right to within 1 / (2B).

    Without, the rule "bias-corrected" of breaching (Geiping et al.), after LLG (Wainakh et al. 2021): every class with a
    negative entry occurs (of more than B the most negative), an occurrence is worth m = sum of the negatives / B, and after
    each is taken off, whoever is least gets the next. Exact where all labels differ and their classes' p is below 1 / B; with
    repeated labels it is a guess, a good one for untrained victims and B below the number of classes.

    Args:
      bias_gradient: (classes,), the mean over the batch.
      batch_size: B, static.
      probabilities: (classes,) the attacker's estimate of the batch's mean softmax, such as that of other images.

    Returns:
      (classes,) int32, >= 0, of sum B whatever the input.
    """
    counts = jnp.zeros(bias_gradient.shape, jnp.int32)
    if probabilities is not None:
        raw = batch_size * (probabilities - bias_gradient)
        return jax.lax.fori_loop(
            0, batch_size, lambda _, counts: counts.at[jnp.argmax(raw - counts.astype(raw.dtype))].add(1), counts
        )
    negative = bias_gradient < 0
    impact = jnp.where(negative, bias_gradient, 0.0).sum() / batch_size

    def take(_: int, counts: jax.Array) -> jax.Array:
        rest = bias_gradient - counts.astype(bias_gradient.dtype) * impact
        certain = negative & (counts == 0)
        label = jnp.where(certain.any(), jnp.argmin(jnp.where(certain, rest, jnp.inf)), jnp.argmin(rest))
        return counts.at[label].add(1)

    return jax.lax.fori_loop(0, batch_size, take, counts)


def counts_to_labels(counts: jax.Array, batch_size: int) -> jax.Array:
    """(batch_size,) int32 labels, ascending, of counts (classes,) that sum to batch_size."""
    return jnp.repeat(jnp.arange(counts.size, dtype=jnp.int32), counts, total_repeat_length=batch_size)


def label_accuracy(guess: jax.Array, truth: jax.Array) -> jax.Array:
    """Share in [0, 1] of the labels that are right, both (B,), in any order: the overlap of the two multisets / B."""
    earlier = jnp.tril(guess[:, None] == guess[None], -1).sum(1)  # a label guessed for the k-th time needs k in the truth
    return (earlier < (guess[:, None] == truth[None]).sum(1)).mean()


@functools.cache  # one wrapper a loss: it is a static field, and a new one would compile anew
def _soft(loss: Loss) -> Loss:
    def soft(params: Any, candidate: tuple[Any, jax.Array], _: Any) -> jax.Array:
        x, logits = candidate
        return loss(params, x, jax.nn.softmax(logits))

    return soft


@pytree
class JointLabels:
    """objective((x, logits)) = distance where the label is softmax(logits): image and label at once (DLG, Zhu et al. 2019).

    `jax.grad` of it costs one mixed partial for both. The logits are free up to a constant each.

    Attributes:
      match: the objective; its loss must take probabilities as y, (..., classes), and its own label is ignored.
    """

    match: GradientMatching

    def __call__(self, candidate: tuple[Any, jax.Array]) -> jax.Array:
        return dataclasses.replace(self.match, loss=_soft(self.match.loss))(candidate)
