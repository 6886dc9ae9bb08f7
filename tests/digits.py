"""Small image models trained on scikit-learn's handwritten digits, 8 by 8 pixels, within seconds."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINED = 1200  # of 1,797; the others are held out


class Block(nn.Module):
    """A layer of a transformer, normalised before attention and before its feed-forward part."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = nn.MultiheadAttention(size, 4, batch_first=True)
        self.wide = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, states: Tensor) -> Tensor:
        seen = self.before(states)
        states = states + self.attention(seen, seen, seen, need_weights=False)[0]
        return states + self.wide(self.between(states))


class Patches(nn.Module):
    """A ViT: 16 patches of 2 by 2 pixels, two blocks, and the mean of their states."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(4, size)
        self.places = nn.Parameter(0.1 * torch.randn(16, size))
        self.blocks = nn.ModuleList(Block(size) for _ in range(2))
        self.head = nn.Linear(size, 10)

    def forward(self, images: Tensor) -> Tensor:
        states = self.embed(F.unfold(images, 2, stride=2).transpose(1, 2)) + self.places
        for block in self.blocks:
            states = block(states)
        return self.head(states.mean(1))


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All images, `[1797, 1, 8, 8]` in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    return images, torch.tensor(found.target)[order]


def held_out() -> tuple[Tensor, Tensor]:
    images, classes = digits()
    return images[TRAINED:], classes[TRAINED:]


@functools.cache
def cnn() -> nn.Sequential:
    """Three convolutions, whose maps are 8 by 8, 4 by 4 and 2 by 2."""
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
    )


@functools.cache
def vit() -> Patches:
    torch.manual_seed(0)
    return trained(Patches())


def trained(model: nn.Module, steps: int = 200) -> nn.Module:
    images, classes = (part[:TRAINED] for part in digits())
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(TRAINED, (64,), generator=source)
        loss = F.cross_entropy(model(images[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
