"""value_loss against the reference and by hand."""

import pytest
import torch

from hiper_fast import ops


def random_case(turns, seed=0):
    g = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, turns, dtype=torch.float64, generator=g)
    return values.requires_grad_(), old, returns, torch.rand(turns, generator=g) < 0.7


@pytest.mark.parametrize("turns", [0, 1, 2, 40])
@pytest.mark.parametrize("options", [{}, {"clip": 0.1, "denominator": 5.0}])
def test_equals_the_reference_with_gradients(turns, options):
    for seed in range(3):
        case = random_case(turns, seed)
        (loss, metrics), expected = (
            ops.value_loss(*case, **options),
            ops.reference.value_loss(*case, **options),
        )
        torch.testing.assert_close(loss, expected)
        assert all(m.dim() == 0 and not m.requires_grad for m in metrics.values())
        if case[3].any():
            torch.testing.assert_close(
                torch.autograd.grad(loss, case[0]), torch.autograd.grad(expected, case[0])
            )


def test_no_turns_have_a_gradient_of_no_turns():
    values = torch.zeros(0, requires_grad=True)
    loss, _ = ops.value_loss(
        values, *torch.zeros(2, 0), torch.zeros(0, dtype=torch.bool), denominator=3.0
    )
    assert torch.autograd.grad(loss, values)[0].shape == (0,)


def test_by_hand():
    one = torch.tensor
    loss, metrics = ops.value_loss(
        one([1.0, 3.0, 0.0, 7.0]),
        one([0.8, 0.0, 0.0, 7.0]),
        one([2.0, 2.0, 0.0, 0.0]),
        one([True, True, True, False]),
    )
    # (1 - 2)^2 = 1; the larger of (3 - 2)^2 and (0.5 - 2)^2 is 2.25; 0. No half.
    torch.testing.assert_close(loss, one(3.25 / 3))
    torch.testing.assert_close(metrics["clip_fraction"], one(1 / 3))


def test_masked_turns_do_not_matter_whatever_they_hold():
    values, old, returns, mask = random_case(9)
    expected = ops.value_loss(values, old, returns, mask)[0]
    broken = [torch.where(mask, x.detach(), torch.nan) for x in (values, old, returns)]
    leaf = broken[0].requires_grad_()
    loss, _ = ops.value_loss(leaf, *broken[1:], mask)
    torch.testing.assert_close(loss, expected)
    assert not torch.autograd.grad(loss, leaf)[0].isnan().any()


def test_an_empty_mask_is_zero():
    values, old, returns, mask = random_case(4)
    loss, _ = ops.value_loss(values, old, returns, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0 and (values.grad == 0).all()


@pytest.mark.parametrize("name", ["old_values", "returns", "mask"])
def test_bad_arguments_are_named(name):
    values, old, returns, mask = random_case(5)
    given = {"old_values": old, "returns": returns, "mask": mask}
    for bad in (given[name][:4], given[name].to(torch.float32), given[name].to("meta")):
        with pytest.raises(ValueError, match=name):
            ops.value_loss(values, **(given | {name: bad}))
