"""The contestants by name."""

from __future__ import annotations

import torch

from manifold_nets.comparison.contestants.builders import (
    Make,
    from_geoopt,
    from_pymanopt,
    from_table,
    from_timm,
    from_torch,
    with_weight_norm,
)
from manifold_nets.comparison.contestants.protocol import constrained, scaled_metric_by_columns
from manifold_nets.comparison.models.forms import Form
from manifold_nets.comparison.protocols import Contestant
from manifold_nets.optim import OPTIMIZERS, RiemannianAdam, RiemannianSGD

__all__ = ["CONTESTANTS"]

_OURS = {
    "rsgd": "Riemannian SGD: projected gradient, retraction, momentum kept tangent",
    "radam": "Riemannian Adam: one second moment a sphere",
    "sgd-g": "SGD-G: clipped gradient, geodesic, parallel transport",
    "adam-g": "Adam-G: clipped gradient, one second moment a filter, geodesic",
    "angular": "every filter turns by the learning rate in each step",
    "angular-adam": "Adam's direction, entry by entry; every filter turns by the learning rate in each step",
    "pbwn": "projection-based weight normalization: a plain step, then back to the norm",
    "sm": "the scaled metric: steps in proportion to the squared norm of each filter",
}


def _torch() -> list[Contestant]:
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    nesterov = from_torch(sgd, momentum=True, nesterov=True)
    rows = [
        ("sgd", "sgd", from_torch(sgd, momentum=True), "SGD with momentum"),
        ("sgd-nesterov", "sgd", nesterov, "SGD with Nesterov's momentum; needs a momentum"),
        ("sgd-wn", "sgd", with_weight_norm(from_torch(sgd, momentum=True)), "SGD on torch's weight normalization"),
        ("adam", "adam", from_torch(adam), "Adam; weight decay by an L2 penalty"),
        ("adam-wn", "adam", with_weight_norm(from_torch(adam)), "Adam on torch's weight normalization"),
        ("adamw", "adam", from_torch(torch.optim.AdamW), "Adam with decoupled weight decay"),
        ("nadam", "adam", from_torch(torch.optim.NAdam), "Adam with Nesterov's momentum"),
        ("rmsprop", "adam", from_torch(torch.optim.RMSprop, momentum=True), "RMSprop with momentum"),
        ("adagrad", "adam", from_torch(torch.optim.Adagrad), "AdaGrad"),
    ]
    return [_named(name, family, "torch", make, description) for name, family, make, description in rows]


def _ours() -> list[Contestant]:
    return [
        Contestant(
            name=name,
            form="converted" if row.weights == "spheres" else "plain",
            family="adam" if row.adaptive else "sgd",
            library="manifold_nets",
            make=from_table(name),
            description=_OURS.get(name, f"{row.kind.__name__}, {row.source}"),
        )
        for name, row in OPTIMIZERS.items()
    ]


def _of_the_protocol() -> list[Contestant]:
    sgd, adam = RiemannianSGD, RiemannianAdam
    plain, held = constrained(sgd, momentum=0.0), constrained(sgd)
    by_columns = "the scaled metric; the classifier by the columns of its inputs"
    ours = "manifold_nets"
    return [
        _named("un", "sgd", ours, plain, "hidden filters held at their norms, no momentum", "constrained"),
        _named("sm-columns", "sgd", ours, scaled_metric_by_columns, by_columns),
        _named("rsgd-all", "sgd", ours, held, "Riemannian SGD, the classifier's filters held too", "constrained-all"),
        _named(
            "radam-all",
            "adam",
            ours,
            constrained(adam),
            "Riemannian Adam, the classifier's filters held too",
            "constrained-all",
        ),
    ]


def _of_other_libraries() -> list[Contestant]:
    rsgd, radam = from_geoopt("RiemannianSGD", momentum=True, stabilize=10), from_geoopt("RiemannianAdam", stabilize=10)
    sgdp, adamp = from_timm("SGDP", momentum=True), from_timm("AdamP")
    return [
        _named("geoopt-rsgd", "sgd", "geoopt", rsgd, "geoopt's Riemannian SGD on the same manifold", "converted"),
        _named("geoopt-radam", "adam", "geoopt", radam, "geoopt's Riemannian Adam on the same manifold", "converted"),
        _named("sgdp", "sgd", "timm", sgdp, "SGD without the radial part of its steps"),
        _named("adamp", "adam", "timm", adamp, "Adam without the radial part of its steps"),
    ]


def _of_pymanopt() -> list[Contestant]:
    rows = [
        ("pymanopt-sd", "SteepestDescent", "steepest descent with line search"),
        ("pymanopt-cg", "ConjugateGradient", "nonlinear conjugate gradients with line search"),
        ("pymanopt-tr", "TrustRegions", "trust regions with exact Hessians, which are not counted as evaluations"),
    ]
    return [
        Contestant(
            name=name,
            form="converted",
            family="full batch",
            library="pymanopt",
            make=from_pymanopt(kind),
            full_batch=True,
            description=f"{text}; the full batch, one iteration an epoch",
        )
        for name, kind, text in rows
    ]


def _named(name: str, family: str, library: str, make: Make, description: str, form: Form = "plain") -> Contestant:
    return Contestant(name, form, family, library, make, description=description)


#: Contestants by the names that the command line gives them.
CONTESTANTS: dict[str, Contestant] = {
    found.name: found for found in (*_torch(), *_ours(), *_of_the_protocol(), *_of_other_libraries(), *_of_pymanopt())
}
