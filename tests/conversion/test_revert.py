"""revert: an ordinary torch model with the same keys, the same values and the same function."""

import copy
import pickle

import geoopt
import pytest
import torch
from helpers.checkpoint_cases import DTYPES, architecture, constrained, put, tied
from torch import nn

import manifold_nets as mn
from manifold_nets.constraints import constrained_weights, lost_constraints


def trained(dtype=torch.float32):
    """A constrained model with gradients, a frozen weight, and one module in evaluation mode."""
    net = constrained(dtype)
    net[2].weight.requires_grad_(False)
    net[1].eval()
    net(torch.randn(3, 2, 6, 6).to(dtype)).float().square().sum().backward()
    return net


def check_plain(net, plain):
    """The same keys, bits, gradients, flags and modes, in plain parameters."""
    assert {name: type(p) for name, p in plain.named_parameters()} == dict.fromkeys(
        [name for name, _ in net.named_parameters()], nn.Parameter
    )
    assert list(plain.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())
    for old, new in zip(net.parameters(), plain.parameters(), strict=True):
        assert (old.requires_grad, old.dtype, old.stride()) == (new.requires_grad, new.dtype, new.stride())
        assert (old.grad is None) == (new.grad is None)
        assert old.grad is None or torch.equal(old.grad, new.grad)
    assert [m.training for m in net.modules()] == [m.training for m in plain.modules()]
    assert list(constrained_weights(plain)) == []
    assert lost_constraints(plain.parameters()) == []
    # A model that a pickle can give to a machine without this package.
    assert b"manifold_nets" not in pickle.dumps(plain)
    assert b"geoopt" not in pickle.dumps(plain)


def check_same_function(net, plain, x):
    for mode in (True, False):
        outputs = [copy.deepcopy(model).train(mode)(x) for model in (net, plain)]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_reverted_model_is_plain_and_computes_the_same(dtype, inplace):
    net = trained(dtype)
    before = copy.deepcopy(net)
    for old, new in zip(net.parameters(), before.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    plain = mn.revert(net, inplace=inplace)
    assert (plain is net) == inplace
    check_plain(before, plain)
    check_same_function(before, plain, torch.randn(3, 2, 6, 6).to(dtype))


def test_the_original_is_left_alone():
    net = trained()
    objects = [id(p) for p in net.parameters()]
    plain = mn.revert(net)
    assert [id(p) for p in net.parameters()] == objects
    assert [weight.name for weight in constrained_weights(net)] == ["0.weight", "2.weight", "5.weight"]
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in plain.parameters()}
    assert plain[0].weight.grad.data_ptr() != net[0].weight.grad.data_ptr()


def test_in_place_nothing_is_copied():
    net = trained()
    memory = [p.data_ptr() for p in net.parameters()]
    assert [p.data_ptr() for p in mn.revert(net, inplace=True).parameters()] == memory


def _one_bit(plain):
    with torch.no_grad():
        plain[0].weight.view(-1)[5] = torch.nextafter(plain[0].weight.view(-1)[5], torch.tensor(9.0))


@pytest.mark.parametrize(
    "spoil",
    [
        _one_bit,
        lambda plain: plain[1].train(),
        lambda plain: plain[2].weight.requires_grad_(True),
        lambda plain: setattr(plain[0].weight, "grad", None),
        lambda plain: plain[0].weight.grad.mul_(2),
        lambda plain: put(plain, "5.weight", mn.SphereProduct((5, 144))),
        lambda plain: setattr(plain[5], "note", mn.SphereProduct((5, 144))),
    ],
)
def test_sabotage_each_change_is_noticed(spoil):
    net = trained()
    plain = mn.revert(net)
    check_plain(net, plain)
    spoil(plain)
    with pytest.raises(AssertionError):
        check_plain(net, plain)


def test_sabotage_a_rescaled_filter_changes_the_function():
    net = trained()
    plain = mn.revert(net)
    x = torch.randn(3, 2, 6, 6)
    with torch.no_grad():
        plain[5].weight[0] *= 1 + 1e-6
    with pytest.raises(AssertionError):
        check_same_function(net, plain, x)


def test_a_model_with_nothing_constrained_is_copied():
    net = architecture()
    plain = mn.revert(net)
    assert plain is not net
    check_plain(net, plain)
    assert mn.revert(net, inplace=True) is net


def test_tied_weights_stay_tied():
    net = tied()
    put(net, "a.weight", mn.SphereProduct((4, 4)))
    put(net, "c.weight", mn.SphereProduct((4, 4)))
    net["b"].weight = net["c"].weight = net["a"].weight
    plain = mn.revert(net)
    assert plain["a"].weight is plain["b"].weight is plain["c"].weight
    check_plain(net, plain)


def test_weights_that_drifted_are_given_back_as_they_are():
    net = constrained()
    with torch.no_grad():
        net[0].weight *= 3
    check_plain(net, mn.revert(net))


def test_a_constraint_whose_parameter_was_replaced_is_forgotten_too():
    net = constrained()
    net.load_state_dict(net.state_dict(), assign=True)
    plain = mn.revert(net)
    check_plain(net, plain)
    assert mn.restore(plain) == []


def test_module_hooks_and_other_manifolds_are_kept():
    net = constrained()
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("hook"))
    net[5].bias = geoopt.ManifoldParameter(net[5].bias.detach(), manifold=geoopt.Euclidean())
    plain = mn.revert(net, inplace=True)
    plain(torch.randn(2, 2, 6, 6))
    assert calls == ["hook"]
    assert isinstance(plain[5].bias, geoopt.ManifoldParameter)
    assert type(plain[0].weight) is nn.Parameter


def marked(net):
    """A network whose parameters have attributes and hooks, and what the hooks have seen."""
    seen = []
    for name, parameter in net.named_parameters():
        parameter._no_weight_decay = name
        parameter.register_hook(lambda gradient, name=name: (seen.append(name), 2 * gradient)[1])
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(f"{name} after"))
    return net, seen


def check_marks(net, seen, x):
    names = [name for name, _ in net.named_parameters()]
    assert [parameter._no_weight_decay for parameter in net.parameters()] == names
    unhooked = copy.deepcopy(net)  # torch copies no hooks
    seen.clear()
    for each in (net, unhooked):
        each.eval()(x).square().mean().backward()
    assert sorted(seen) == sorted(names + [f"{name} after" for name in names])
    for a, b in zip(net.parameters(), unhooked.parameters(), strict=True):
        assert torch.equal(a.grad, 2 * b.grad)
        a.grad = None


@pytest.mark.parametrize("inplace", [False, True])
def test_attributes_and_hooks_of_parameters_stay_on_the_way_there_and_back(inplace, tmp_path):
    x = torch.randn(4, 2, 6, 6)
    net, seen = marked(architecture())
    converted = mn.convert(net, x, inplace=inplace)
    assert any(isinstance(p, geoopt.ManifoldParameter) for p in converted.parameters())
    check_marks(converted, seen, x)
    check_marks(mn.revert(converted, inplace=inplace), seen, x)
    if not inplace:
        check_marks(net, seen, x)
    mn.save(mn.convert(architecture(), x), tmp_path / "net.safetensors")
    net, seen = marked(architecture())
    check_marks(mn.load(net, tmp_path / "net.safetensors"), seen, x)


def test_a_handle_removes_the_hook_of_the_parameter_that_took_the_place():
    net, x = architecture(), torch.randn(4, 2, 6, 6)
    seen = []
    handle = net[0].weight.register_hook(seen.append)
    copied = mn.convert(net, x)
    mn.convert(net, x, inplace=True)
    handle.remove()
    net(x).square().mean().backward()
    assert seen == []
    copied(x).square().mean().backward()
    assert len(seen) == 1


def test_reverting_a_conversion_leaves_no_trace():
    net = architecture().train()
    x = torch.randn(4, 2, 6, 6)
    converted = mn.convert(net, x)
    plain = mn.revert(converted)
    check_plain(converted, plain)
    check_same_function(converted, plain, x)
    assert mn.conversion_record(plain) is None
    assert mn.conversion_record(converted) is not None


LAYERS = [
    (nn.Linear, (4, 6), (5, 4)),
    *[(getattr(nn, f"Conv{n}d"), (4, 6, 3), (2, 4, *[5] * n)) for n in (1, 2, 3)],
    *[(getattr(nn, f"ConvTranspose{n}d"), (4, 6, 3), (2, 4, *[5] * n)) for n in (1, 2, 3)],
]


@pytest.mark.parametrize(("plain_class", "arguments", "shape"), LAYERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_unit_norm_layers_become_torch_layers(plain_class, arguments, shape, inplace):
    options = {} if plain_class is nn.Linear else {"groups": 2, "stride": 2}
    net = nn.Sequential(getattr(mn.layers, f"UnitNorm{plain_class.__name__}")(*arguments, **options), nn.Flatten())
    x = torch.randn(shape)
    expected = net(x)
    plain = mn.revert(net, inplace=inplace)
    assert type(plain[0]) is plain_class
    assert torch.equal(plain(x), expected)
    assert b"manifold_nets" not in pickle.dumps(plain)
    assert repr(plain[0]) == repr(plain_class(*arguments, **options))
    plain[0].reset_parameters()
    assert type(plain[0].weight) is nn.Parameter
    assert type(net[0]).__name__ == plain_class.__name__ if inplace else type(net[0]) is not plain_class


def test_a_class_derived_from_a_unit_norm_layer_keeps_its_class_and_loses_the_constraint():
    class Own(mn.layers.UnitNormLinear):
        pass

    plain = mn.revert(Own(4, 3))
    assert type(plain) is Own
    assert type(plain.weight) is nn.Parameter
