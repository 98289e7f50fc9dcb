"""Models for the command line."""

from __future__ import annotations

NETS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=4, eps=1e-5, zero=False):
        super().__init__(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width, eps=eps), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3)
        )
        self[1].running_mean.uniform_(-1, 1)
        self[1].running_var.uniform_(0.5, 2)
        if zero:
            with torch.no_grad():
                self[0].weight[1] = 0

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.norm = nn.Embedding(10, 6), nn.Linear(6, 5), nn.LayerNorm(5)

    def forward(self, ids):
        return self.norm(self.linear(self.embedding(ids)))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(3, 5), nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x, y):
        return self.norm(self.a(x) + self.b(y))
"""


SHAPE = ("--input-shape", "2,6,6")
