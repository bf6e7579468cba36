"""ADM's U-Net in torch, written for the tests as a reading of a state dict: which block stands where is told by its keys.

It shares nothing with `gdiff_jax.priors.adm`, which builds the network from the flags.
"""

import math

import torch
import torch.nn.functional as F


def forward(
    weights: dict[str, torch.Tensor], flags: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
) -> torch.Tensor:
    """(N, 3, H, W) and (N,) -> (N, 3 or 6, H, W)."""
    per_level = flags["num_res_blocks"] + 1

    def linear(name, h):
        return F.linear(h, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(name, h, stride=1):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(h, kernel, weights[f"{name}.bias"], stride=stride, padding=kernel.shape[-1] // 2)

    def norm(name, h):
        return F.group_norm(h, 32, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def resblock(name, h, resample):
        y = F.silu(norm(f"{name}.in_layers.0", h))
        y = conv(f"{name}.in_layers.2", resample(y))
        time = linear(f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
        if flags.get("use_scale_shift_norm", True):
            scale, shift = torch.chunk(time, 2, dim=1)
            y = norm(f"{name}.out_layers.0", y) * (1 + scale) + shift
        else:
            y = norm(f"{name}.out_layers.0", y + time)
        y = conv(f"{name}.out_layers.3", F.silu(y))
        h = resample(h)
        return y + (conv(f"{name}.skip_connection", h) if f"{name}.skip_connection.weight" in weights else h)

    def attention(name, h):
        n, c = h.shape[:2]
        y = F.group_norm(h.reshape(n, c, -1), 32, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
        y = F.conv1d(y, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
        heads = flags["num_heads"] if flags.get("num_head_channels", -1) == -1 else c // flags["num_head_channels"]
        d = c // heads
        if flags.get("use_new_attention_order"):
            q, k, v = (part.reshape(n * heads, d, -1) for part in y.chunk(3, dim=1))
        else:
            q, k, v = y.reshape(n * heads, 3 * d, -1).split(d, dim=1)
        scale = 1 / math.sqrt(math.sqrt(d))
        w = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        y = torch.einsum("bts,bcs->bct", w, v).reshape(n, c, -1)
        y = F.conv1d(y, weights[f"{name}.proj_out.weight"], weights[f"{name}.proj_out.bias"])
        return h + y.reshape(h.shape)

    same = lambda h: h
    halve = lambda h: F.avg_pool2d(h, 2)
    double = lambda h: F.interpolate(h, scale_factor=2, mode="nearest")

    def block(name, h, resample):
        if f"{name}.in_layers.0.weight" in weights:
            return resblock(name, h, resample)
        if f"{name}.qkv.weight" in weights:
            return attention(name, h)
        if f"{name}.op.weight" in weights:
            return conv(f"{name}.op", h, stride=2)
        if f"{name}.conv.weight" in weights:
            return conv(f"{name}.conv", double(h))
        return conv(name, h)

    def parts(name):
        indices = {key[len(name) + 1 :].split(".")[0] for key in weights if key.startswith(f"{name}.")}
        return [f"{name}.{i}" for i in sorted(indices, key=int)]

    half = flags["num_channels"] // 2
    angles = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    emb = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(x.dtype)
    emb = linear("time_embed.2", F.silu(linear("time_embed.0", emb)))
    if y is not None:
        emb = emb + weights["label_emb.weight"][y]

    h, skips = x, []
    for i, name in enumerate(parts("input_blocks")):
        for part in parts(name):
            h = block(part, h, halve if i and i % per_level == 0 else same)
        skips.append(h)
    for part in parts("middle_block"):
        h = block(part, h, same)
    for name in parts("output_blocks"):
        h = torch.cat([h, skips.pop()], dim=1)
        for j, part in enumerate(parts(name)):
            h = block(part, h, double if j else same)
    return conv("out.2", F.silu(norm("out.0", h)))
