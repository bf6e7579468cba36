"""The network of the examples, small and with sigmoids; `make` is what the audit's command asks for."""

import torch
from torch import nn


def make() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 5, padding=2, stride=2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, padding=2, stride=2), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Conv2d(12, 12, 5, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 10))
