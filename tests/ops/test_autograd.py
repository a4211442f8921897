"""How the ops are differentiated: once, in reverse mode, also by torch.func; anything else is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from hiper_fast import bench, ops


@pytest.fixture(scope="module")
def x():
    made = vars(bench.make_inputs(bench.Size(3, 7, 40, 9, 14, 30)))
    return SimpleNamespace(**{k: v.detach() if torch.is_tensor(v) else v for k, v in made.items()})


def losses(x):
    """Op -> (a scalar of one argument, that argument)."""
    rows = x.targets, x.row_old, x.row_advantages
    tokens = x.old_logprobs, x.advantages, x.loss_mask
    return {
        "linear_logprobs": (lambda v: ops.linear_logprobs(v, x.weight, x.targets).sum(), x.hidden),
        "linear_ppo": (lambda v: ops.linear_ppo(v, x.weight, *rows)[0], x.hidden),
        "ppo_loss": (lambda v: ops.ppo_loss(v, *tokens)[0], x.logprobs),
        "value_loss": (lambda v: ops.value_loss(v, x.values_low, x.rewards, x.switch)[0], x.values),
        "rms_norm": (lambda v: ops.rms_norm(v, x.scale).square().sum(), x.hidden),
        "swiglu": (lambda v: ops.swiglu(v, x.up).square().sum(), x.gate),
        "rope": (lambda v: ops.rope(v, x.key, x.cos, x.sin)[0].square().sum(), x.query),
    }


def constants(x):
    """Op without gradients -> (a scalar of one argument, that argument)."""
    responses = x.roles, x.cu_tokens
    ends = x.terminated, x.cu_turns
    low = x.levels.advantages_low

    def levels(v):
        return x.levels._replace(advantages_low=v)

    return {
        "hae": (lambda v: ops.hae(x.rewards, v, x.values_high, x.switch, *ends)[0].sum(), low),
        "gae": (lambda v: ops.gae(x.rewards, v, *ends)[0].sum(), low),
        "normalize": (lambda v: ops.normalize(v, x.switch).sum(), low),
        "scatter_advantages": (
            lambda v: ops.scatter_advantages(levels(v), *responses)[0].sum(),
            low,
        ),
        "normalize_and_scatter": (
            lambda v: ops.normalize_and_scatter(levels(v), *responses)[0].sum(),
            low,
        ),
        "sample": (lambda v: ops.sample(v, x.uniform, x.temperature)[1].sum(), x.logits),
    }


LAYERS = ("rms_norm", "swiglu", "rope")
LOSSES = ("linear_logprobs", "linear_ppo", "ppo_loss", "value_loss", *LAYERS)
MADE_WITH_THE_LOSS = ("linear_ppo", "ppo_loss", "value_loss")
CONSTANTS = (
    "hae", "gae", "normalize", "scatter_advantages", "normalize_and_scatter", "sample",
)  # fmt: skip
for_every_loss = pytest.mark.parametrize("op", LOSSES)
for_every_constant = pytest.mark.parametrize("op", CONSTANTS)


def differentiate(loss, value):
    leaf = value.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@for_every_loss
def test_functional_gradients_are_those_of_backward(x, op):
    loss, value = losses(x)[op]
    expected = differentiate(loss, value)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.func.grad(loss)(value), expected)
    torch.testing.assert_close(torch.func.grad(lambda v: 3 * loss(v))(value), 3 * expected)
    result, pull = torch.func.vjp(loss, value)
    torch.testing.assert_close(result, loss(value))
    torch.testing.assert_close(pull(torch.tensor(2.0))[0], 2 * expected)


def test_functional_gradients_of_all_arguments_with_metrics_aside(x):
    def loss(hidden, weight, bias):
        return ops.linear_ppo(
            hidden, weight, x.targets, x.row_old, x.row_advantages, bias=bias, softcap=5.0
        )

    given = x.hidden, x.weight, torch.zeros(len(x.weight))
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    gradients, metrics = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(*given)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(*leaves)[0], leaves))
    torch.testing.assert_close(metrics, loss(*given)[1])


@for_every_loss
def test_forward_mode_is_refused_by_name(x, op):
    loss, value = losses(x)[op]
    told = pytest.raises(NotImplementedError, match=rf"ops\.{op} has no forward-mode derivative")
    ones = torch.ones_like(value)
    with told:
        torch.func.jvp(loss, (value,), (ones,))
    with told:
        torch.func.jacfwd(loss)(value)
    with told:  # the tangent lies beneath another transform
        torch.func.jvp(torch.func.grad(loss), (value,), (ones,))
    for leaf in (value, value.clone().requires_grad_()):
        for context in (torch.enable_grad(), torch.no_grad()):  # which keeps tangents
            with forward_ad.dual_level(), context, told:
                loss(forward_ad.make_dual(leaf, ones))
    with forward_ad.dual_level():
        torch.testing.assert_close(
            loss(forward_ad.make_dual(value, ones).detach()), loss(value), rtol=0, atol=0
        )


@for_every_loss
def test_a_second_derivative_is_refused_by_name(x, op):
    loss, value = losses(x)[op]
    told = pytest.raises(NotImplementedError, match=rf"ops\.{op} has no second derivative")
    for factor in (1, 3):
        leaf = value.clone().requires_grad_()
        total = factor * loss(leaf)
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        torch.testing.assert_close(gradient.detach(), factor * differentiate(loss, value))
        with told:
            torch.autograd.grad(gradient.sum(), leaf, retain_graph=True)
        with told:  # a penalty: silently without effect, if the gradient were a constant
            (total + gradient.square().sum()).backward()
    with told:
        torch.func.grad(lambda v: torch.func.grad(loss)(v).square().sum())(value)


@for_every_loss
def test_a_gradient_with_a_graph_can_be_used_as_a_constant(x, op):
    loss, value = losses(x)[op]
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (leaf * gradient.detach()).sum().backward()
    torch.testing.assert_close(leaf.grad, differentiate(loss, value))


@pytest.mark.parametrize("op", MADE_WITH_THE_LOSS)
def test_a_gradient_can_be_differentiated_in_what_multiplies_the_loss(x, op):
    """Also where that is 1, which backward need not multiply by."""
    loss, value = losses(x)[op]
    leaf, factor = value.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(factor * loss(leaf), leaf, create_graph=True)
    (slope,) = torch.autograd.grad(gradient.sum(), factor)
    torch.testing.assert_close(slope, differentiate(loss, value).sum())


@for_every_loss
def test_backward_twice_over_one_graph_adds_the_same_again(x, op):
    """What backward hands over must not become the leaf's own gradient while the graph keeps it."""
    loss, value = losses(x)[op]
    leaf = value.clone().requires_grad_()
    total = loss(leaf)
    total.backward(retain_graph=True)
    once = leaf.grad.clone()
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(leaf.grad, 3 * once)
    assert not leaf.grad.requires_grad


@pytest.mark.parametrize("op", MADE_WITH_THE_LOSS)
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_backward_hands_over_what_was_made_with_the_loss(x, op, factor):
    """Scaled where it lies: a copy of a head's gradient would be most of what a step holds."""

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if f"hiper_fast.{op}." in str(function):
                self.addresses = {tensor.data_ptr() for tensor in result}
            return result

    loss, value = losses(x)[op]
    leaf = value.clone().requires_grad_()
    with Made() as made:
        total = loss(leaf)
    (factor * total).backward()
    assert leaf.grad.data_ptr() in made.addresses
    torch.testing.assert_close(leaf.grad, factor * differentiate(loss, value))


@for_every_loss
def test_a_gradient_that_was_handed_over_may_be_overwritten(x, op):
    """The graph, where it is kept, gives the right one again."""
    loss, value = losses(x)[op]
    leaf, expected = value.clone().requires_grad_(), differentiate(loss, value)
    total = loss(leaf)
    for factor in (1.0, 3.0, 1.0):
        (gradient,) = torch.autograd.grad(factor * total, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, factor * expected)
        gradient.zero_()
    total.backward()
    torch.testing.assert_close(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


def test_gradients_are_scaled_by_what_only_the_device_knows():
    gradients = [torch.ones(3, 2), torch.ones(0), torch.ones(2, dtype=torch.float16)]
    for factor, expected in ((1.0, 1.0), (-0.5, -0.5), (0.0, 0.0)):
        torch.ops.hiper_fast.scale_gradients(gradients, torch.tensor(factor))
        assert [g.tolist() for g in gradients] == [[[expected] * 2] * 3, [], [expected] * 2]
    torch.library.opcheck(
        torch.ops.hiper_fast.scale_gradients.default, (gradients, torch.tensor(2.0))
    )


@for_every_constant
def test_an_op_without_gradients_detaches(x, op):
    """Its result is a constant, in reverse and in forward mode, as `detach` makes one."""
    run, value = constants(x)[op]
    leaf = value.clone().requires_grad_()
    assert not run(leaf).requires_grad
    ones = torch.ones_like(value)
    for function in (run, lambda v: v.detach().sum()):
        assert not torch.func.grad(function)(value).any()
        assert torch.func.jvp(function, (value,), (ones,))[1] == 0
        with forward_ad.dual_level():
            assert (
                forward_ad.unpack_dual(function(forward_ad.make_dual(value, ones))).tangent is None
            )
    torch.testing.assert_close(
        torch.func.grad(lambda v: v.sum() * run(v))(value), ones * run(value)
    )
