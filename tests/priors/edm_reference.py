"""EDM's two networks in torch, written for the tests from the paper (Karras et al. 2022) as a reading of a state dict.

Which block stands where is told by its keys, sorted by size. It shares nothing with `gdiff_jax.priors.edm`, which builds the
networks from their arguments.
"""

import math
import re

import torch
import torch.nn.functional as F


def forward(weights: dict, kwargs: dict, x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """(N, C, H, W), c_noise (N,) and one-hot labels (N, classes) or None -> F(x), (N, C, H, W)."""
    song = kwargs["model_type"] == "SongUNet"
    taps = torch.tensor(kwargs.get("resample_filter", [1, 1]), dtype=torch.float32)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    reach = (len(taps) - 1) // 2

    def each(h, apply):
        """A filter on every channel by itself."""
        n, c, height, width = h.shape
        h = apply(h.reshape(n * c, 1, height, width))
        return h.reshape(n, c, *h.shape[-2:])

    def halve(h, padding=reach):
        return each(h, lambda h: F.conv2d(h, kernel[None, None], stride=2, padding=padding))

    def double(h):
        return each(h, lambda h: F.conv_transpose2d(h, 4 * kernel[None, None], stride=2, padding=reach))

    def linear(name, h):
        return F.linear(h, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def conv(name, h, padding=None):
        w = weights[f"{name}.weight"]
        return F.conv2d(h, w, weights[f"{name}.bias"], padding=w.shape[-1] // 2 if padding is None else padding)

    def norm(name, h):
        groups = min(32, h.shape[1] // 4)
        return F.group_norm(h, groups, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6 if song else 1e-5)

    def block(name, h, resample=lambda h: h):
        y = conv(f"{name}.conv0", resample(F.silu(norm(f"{name}.norm0", h))))
        params = linear(f"{name}.affine", emb)[..., None, None]
        if song:
            y = norm(f"{name}.norm1", y + params)
        else:
            scale, shift = params.chunk(2, dim=1)
            y = norm(f"{name}.norm1", y) * (1 + scale) + shift
        y = conv(f"{name}.conv1", F.silu(y))
        h = resample(h)
        y = y + (conv(f"{name}.skip", h) if f"{name}.skip.weight" in weights else h)
        y = y / math.sqrt(2) if song else y
        if f"{name}.qkv.weight" not in weights:
            return y
        n, c, height, width = y.shape
        heads = 1 if song else c // 64
        qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", y)).reshape(n, heads, c // heads, 3, height * width)
        q, k, v = qkv.unbind(3)
        w = torch.softmax(torch.einsum("nhdq,nhdk->nhqk", q, k) / math.sqrt(c // heads), dim=-1)
        y = y + conv(f"{name}.proj", torch.einsum("nhqk,nhdk->nhdq", w, v).reshape(n, c, height, width))
        return y / math.sqrt(2) if song else y

    if "map_noise.freqs" in weights:
        angles = noise[:, None] * weights["map_noise.freqs"] * 2 * math.pi
    else:
        half = weights["map_layer0.weight"].shape[1] // 2
        angles = noise[:, None] * 10000.0 ** (-torch.arange(half) / (half - song))
    emb = torch.cat([angles.sin(), angles.cos()] if song else [angles.cos(), angles.sin()], dim=1)
    if song and labels is not None:
        emb = emb + linear("map_label", labels * math.sqrt(labels.shape[1]))
    emb = linear("map_layer1", F.silu(linear("map_layer0", emb)))
    if not song and labels is not None:
        emb = emb + linear("map_label", labels)
    emb = F.silu(emb)

    sizes = sorted({int(m[1]) for m in (re.match(r"enc\.(\d+)x", name) for name in weights) if m}, reverse=True)
    blocks = lambda part, at: sum(f"{part}.{at}_block{i}.norm0.weight" in weights for i in range(99))
    skips, h, aux = [], x, x
    for size in sizes:
        at = f"{size}x{size}"
        h = conv(f"enc.{at}_conv", h) if size == sizes[0] else block(f"enc.{at}_down", h, halve)
        if f"enc.{at}_aux_skip.weight" in weights:
            aux = halve(aux)
            h = h + conv(f"enc.{at}_aux_skip", aux)
        if f"enc.{at}_aux_residual.weight" in weights:
            h = aux = (h + halve(conv(f"enc.{at}_aux_residual", aux, 1 + reach), 0)) / math.sqrt(2)
        skips.append(h)
        for i in range(blocks("enc", at)):
            h = block(f"enc.{at}_block{i}", h)
            skips.append(h)
    shown = None
    for size in reversed(sizes):
        at = f"{size}x{size}"
        for name in ("in0", "in1", "up"):
            if f"dec.{at}_{name}.norm0.weight" in weights:
                h = block(f"dec.{at}_{name}", h, double if name == "up" else lambda h: h)
        for i in range(blocks("dec", at)):
            h = block(f"dec.{at}_block{i}", torch.cat([h, skips.pop()], dim=1))
        if f"dec.{at}_aux_conv.weight" in weights:
            own = conv(f"dec.{at}_aux_conv", F.silu(norm(f"dec.{at}_aux_norm", h)))
            shown = own if shown is None else own + double(shown)
    return conv("out_conv", F.silu(norm("out_norm", h))) if shown is None else shown
