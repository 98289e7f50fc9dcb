"""Two models that ask for unit norms: class weights of face recognition, and the items of a recommender.

    python examples/cosine_heads.py

*Margins.* Face recognition compares directions: the logit of class c is s cos θ_c, with the angle of a feature and the
weight of the class, and ArcFace adds a margin m to the angle of the right class in training (arXiv:1801.07698). The
usual code normalizes the class weights in every forward pass; their norms then grow and slow them down. Here they
lie on spheres, and no pass is needed. Digits take the place of faces: a network is trained on the digits 0 to 6 and has
to tell pairs of images of 7, 8 and 9, which it has never seen, apart by the angle of their features.

*Items.* A recommender ranks items by the cosine of a user's and an item's vector: `UnitNormEmbedding` for both, with
sparse gradients, so that a step moves the rows that a batch looks up. Users like items of their own group and a few
others; it is asked how often an item that a user likes and that was held back is ranked above one that the user does
not like. Beside it: plain embeddings, normalized in every forward pass, under torch's SparseAdam.

Figures are means ± standard deviations over seeds; rates are the best of a grid on validation data, the same for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import torch
from digits import Images, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, softplus

import manifold_nets as mn

SCALE, MARGIN, KNOWN = 16.0, 0.3, 7


# ---- margins ---------------------------------------------------------------------------------------------------------


class MarginHead(nn.Module):
    """Logits ``s cos(θ + m)`` of the right class and ``s cos θ`` of the others."""

    def __init__(self, features: int, classes: int, *, on_spheres: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features))
        self.on_spheres = on_spheres
        if on_spheres:
            mn.constrain(self, "weight", per="row")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of features and their classes."""
        cosine = linear(normalize(x), self.weight if self.on_spheres else normalize(self.weight)).clamp(-0.999, 0.999)
        right = torch.nn.functional.one_hot(y, len(self.weight)).bool()
        return cross_entropy(SCALE * torch.where(right, (cosine.acos() + MARGIN).cos(), cosine), y)


def body() -> nn.Module:
    """Features of a digit."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


def verification(model: nn.Module, images: Images) -> float:
    """How often two images of one unseen digit are at a smaller angle than two of different ones, in percent."""
    unseen = images.y >= KNOWN
    with torch.no_grad():
        x, y = normalize(model(images.x[unseen])), images.y[unseen]
    cosine, same = x @ x.T, y[:, None] == y
    apart = ~torch.eye(len(y), dtype=torch.bool)
    right, wrong = cosine[same & apart], cosine[~same]
    return 100 * float((right[:, None] > wrong[:2000]).double().mean())


def margin_run(on_spheres: bool, rate: float, seed: int, parts: dict[str, Images], steps: int) -> tuple[float, float]:
    """Verification on validation and test images."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({"body": body(), "head": MarginHead(32, KNOWN, on_spheres=on_spheres)})
    rates = mn.matched_learning_rates(net, optimizer="adam", lr=rate).by_weight()
    optimizer = mn.optim.RiemannianAdam(mn.param_groups(net, sphere_lr=rates), lr=rate)
    known = (parts["train"].y < KNOWN).nonzero().flatten()
    for _ in range(steps):
        rows = known[torch.randint(len(known), (64,))]
        optimizer.zero_grad()
        net["head"](net["body"](parts["train"].x[rows]), parts["train"].y[rows]).backward()
        optimizer.step()
    return verification(net["body"], parts["validation"]), verification(net["body"], parts["test"])


# ---- items -----------------------------------------------------------------------------------------------------------

USERS, ITEMS, GROUPS = 400, 1000, 10


def tastes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of users and items that they like: to train on, to tune by, and to test on; item 0 is padding."""
    draw = torch.Generator().manual_seed(seed)
    users, items = torch.randint(GROUPS, (USERS,), generator=draw), torch.randint(GROUPS, (ITEMS,), generator=draw)
    chance = torch.where(users[:, None] == items, 0.2, 0.005)
    chance[:, 0] = 0
    pairs = (torch.rand(USERS, ITEMS, generator=draw) < chance).nonzero()
    pairs = pairs[torch.randperm(len(pairs), generator=draw)]
    end = len(pairs) // 5
    return pairs[2 * end :], pairs[:end], pairs[end : 2 * end]


class Recommender(nn.Module):
    """Scores ``s cos θ`` of users and items."""

    def __init__(self, *, on_spheres: bool) -> None:
        super().__init__()
        kind = mn.layers.UnitNormEmbedding if on_spheres else nn.Embedding
        self.users = kind(USERS, 16, sparse=True)
        self.items = kind(ITEMS, 16, padding_idx=0, sparse=True)
        self.on_spheres = on_spheres

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of pairs."""
        u, v = self.users(users), self.items(items)
        return 8.0 * (u * v if self.on_spheres else normalize(u, dim=-1) * normalize(v, dim=-1)).sum(-1)


def ranking(model: Recommender, pairs: Tensor, liked: Tensor) -> float:
    """How often a liked item is above one that the user does not like, in percent."""
    with torch.no_grad():
        everything = model(torch.arange(USERS)[:, None], torch.arange(1, ITEMS))
    other = ~liked[:, 1:]
    below = [(everything[u][other[u]] < everything[u, i - 1]).double().mean() for u, i in pairs[:1000].tolist()]
    return 100 * float(torch.stack(below).mean())


def item_run(on_spheres: bool, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Ranking of validation and test pairs."""
    train, validation, test = tastes(seed)
    liked = torch.zeros(USERS, ITEMS, dtype=torch.bool)
    liked[tuple(torch.cat([train, validation, test]).T)] = True
    torch.manual_seed(seed)
    model = Recommender(on_spheres=on_spheres)
    optimizer: torch.optim.Optimizer
    if on_spheres:
        rates = mn.matched_learning_rates(model, optimizer="adam", lr=rate).by_weight()
        optimizer = mn.optim.RiemannianAdam(mn.param_groups(model, sphere_lr=rates))
    else:
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=rate)
    for _ in range(steps):
        rows = train[torch.randint(len(train), (128,))]
        optimizer.zero_grad()
        gap = model(rows[:, 0], rows[:, 1]) - model(rows[:, 0], torch.randint(1, ITEMS, (128,)))
        softplus(-gap).mean().backward()
        optimizer.step()
    return ranking(model, validation, liked), ranking(model, test, liked)


# ---- both ------------------------------------------------------------------------------------------------------------


def report(name: str, run: Callable[[bool, float, int], tuple[float, float]], rates: list[float], seeds: int) -> None:
    """Tune with the last seed, run the others, print."""
    for on_spheres in (False, True):
        best = max(rates, key=lambda rate, on=on_spheres: run(on, rate, seeds)[0])
        found = [run(on_spheres, best, seed)[1] for seed in range(seeds)]
        spread = statistics.stdev(found) if seeds > 1 else math.nan
        kind = "on spheres" if on_spheres else "normalized in each pass"
        print(f"{name:10}{kind:26}rate {best:<8g}{statistics.mean(found):6.2f} ± {spread:.2f} %")


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    parts, rates = load_digits(), [1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
    report("margins", lambda on, r, seed: margin_run(on, r, seed, parts, options.steps), rates, options.seeds)
    report("items", lambda on, r, seed: item_run(on, r, seed, options.steps), rates, options.seeds)


if __name__ == "__main__":
    main()
