"""Torch modules of a user's own, at the smallest size, and as the audit's command takes them: functions without arguments.
Images are 16 x 16 x 3 there."""

import torch
from torch import nn


def mlp(pixels=768, hidden=20, classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, classes))


def lenet(size=8, classes=4):
    """Zhu et al.'s, smaller."""
    convolutions = [nn.Conv2d(3, 8, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(8, 8, 5, padding=2), nn.Sigmoid()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * (size // 2) ** 2, classes))


def cnn(size=8, classes=4, norm=False, pool=False):
    width = 16 if pool else 12
    norms = [nn.BatchNorm2d(n) if norm else nn.Identity() for n in (width, 24)]
    smaller = nn.AvgPool2d(2) if pool else nn.Identity()
    first = [nn.Conv2d(3, width, 3, padding=1), norms[0], nn.Tanh() if pool else nn.ReLU(), smaller]
    second = [nn.Conv2d(width, 24, 3, padding=1, stride=1 if pool else 2), norms[1], nn.Tanh() if pool else nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(24 * (size // 2) ** 2, classes))


def normed():
    """With statistics that are not those of a new network, in eval mode."""
    module = cnn(16, 10, norm=True)
    with torch.no_grad():
        module[1].running_mean += 0.3
        module[1].running_var *= 2
    return module.eval()


class ViT(nn.Module):
    def __init__(self, size=8, classes=4, dim=24):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // 4) ** 2 + 1, dim))
        self.block = nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.norm(self.block(tokens))[:, 0])


class Awkward(nn.Module):
    """A tied layer, a frozen one, tensors that are neither parameters nor buffers, and logits in an object."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.tied = nn.Linear(12, 12, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.head = nn.Linear(12, 4)
        self.shift = torch.linspace(-1, 1, 12)
        self.register_buffer("factor", torch.full((12,), 0.5))

    def forward(self, x):
        x = (x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)).flatten(1)
        x = self.frozen(torch.tanh(self.tied(self.again(torch.tanh(self.first(x + self.shift))))))
        return Output(self.head(x * self.factor))


class Output:
    def __init__(self, logits):
        self.logits = logits


class Mixed(nn.Module):
    """What has no gradient of its own, between layers that have: one frozen, one unused, and one tied to another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(768, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.unused = nn.Linear(12, 5)
        self.second = nn.Linear(12, 12, bias=False)
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.second.weight
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.frozen(torch.tanh(self.first(x.flatten(1))))
        return self.head(torch.tanh(self.tied(torch.tanh(self.second(x)))))
