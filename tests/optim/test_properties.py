"""What holds for every partition, radius and option: hypothesis chooses them; the manifold's own methods judge."""

import geoopt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manifold_nets as mn
from manifold_nets.optim import RiemannianAdam, RiemannianSGD

EPS = torch.finfo(torch.float64).eps


@st.composite
def manifolds(draw):
    """Any view and kept axes of a small weight, with any radius a group."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    kept = draw(st.sets(st.integers(0, len(shape) - 1)))
    partition = mn.Partition(tuple(shape), tuple(shape), tuple(sorted(kept)))
    radii = st.floats(1e-3, 1e3)
    radius = draw(st.one_of(radii, st.lists(radii, min_size=partition.n_groups, max_size=partition.n_groups)))
    return mn.SphereProduct(partition, radius=radius)


momenta = st.one_of(
    st.fixed_dictionaries({"momentum": st.just(0.0)}),
    st.fixed_dictionaries({"momentum": st.floats(0.1, 0.99), "dampening": st.floats(0, 1)}),
    st.fixed_dictionaries({"momentum": st.floats(0.1, 0.99), "nesterov": st.just(True)}),
)
rates, seeds = st.floats(1e-4, 10), st.integers(0, 2**31)


def start(manifold, seed):
    torch.manual_seed(seed)
    weight = geoopt.ManifoldParameter(manifold.random(dtype=torch.float64), manifold=manifold)
    gradients = [torch.randn(manifold.partition.shape, dtype=torch.float64) for _ in range(3)]
    # Gradients of a loss of the directions w/r.
    return weight, [manifold.partition.divide(gradient, manifold.radius_for(gradient)) for gradient in gradients]


@settings(max_examples=100, deadline=None)
@given(manifold=manifolds(), options=momenta, lr=rates, maximize=st.booleans(), seed=seeds)
def test_sgd_takes_the_steps_that_the_manifolds_methods_take(manifold, options, lr, maximize, seed):
    weight, gradients = start(manifold, seed)
    optimizer = RiemannianSGD([weight], lr=lr, maximize=maximize, **options)
    w, b, mu = weight.detach().clone(), None, options["momentum"]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        xi = manifold.egrad2rgrad(w, -gradient if maximize else gradient)
        b = xi if b is None or mu == 0 else mu * b + (1 - options.get("dampening", 0)) * xi
        d = xi + mu * b if options.get("nesterov") else b
        w, b = manifold.retr_transp(w, -lr * d, b)
        assert torch.equal(weight.grad, gradient)
        # In units of the radius; a long step magnifies what rounding has left of it.
        allowed = 1000 * EPS * (1 + lr * float(manifold.norm(w, d)))
        assert float(manifold.norm(w, weight.detach() - w)) <= allowed


@settings(max_examples=100, deadline=None)
@given(manifold=manifolds(), lr=rates, amsgrad=st.booleans(), seed=seeds)
def test_adam_stays_on_the_spheres_with_a_tangent_moment(manifold, lr, amsgrad, seed):
    weight, gradients = start(manifold, seed)
    optimizer = RiemannianAdam([weight], lr=lr, amsgrad=amsgrad)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert float(manifold.deviations(weight).max()) <= 4 * EPS
    state = optimizer.state[weight]
    assert manifold.check_vector_on_tangent(weight, state["exp_avg"], atol=0, rtol=100 * EPS)
    assert state["exp_avg_sq"].shape == manifold.partition.spread_shape
    if manifold.partition.group_size == 1:
        assert not state["exp_avg"].any()
