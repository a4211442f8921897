"""scatter_advantages: turns to tokens by role."""

import pytest
import torch

from hiper_fast import ops


def random_case(lengths, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    turns, tokens = len(lengths), sum(lengths)
    hae = ops.HAE(
        *torch.randn(6, turns, dtype=dtype, generator=g), torch.rand(turns, generator=g) < 0.5
    )
    roles = torch.randint(0, 8, (tokens,), dtype=torch.uint8, generator=g)
    return hae, roles, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 12], [40] * 10], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference(lengths, dtype):
    case = random_case(lengths, dtype)
    (advantages, loss_mask), expected = (
        ops.scatter_advantages(*case),
        ops.reference.scatter_advantages(*case),
    )
    torch.testing.assert_close(advantages, expected[0])
    assert torch.equal(loss_mask, expected[1])


def test_by_hand():
    one = torch.tensor
    hae = ops.HAE(
        one([1.0, 2.0]),
        None,
        one([10.0, 20.0]),
        None,
        one([100.0, 200.0]),
        None,
        one([True, False]),
    )
    roles = one([0, 1, 2, 4, 6, 7, 2, 6], dtype=torch.uint8)
    advantages, loss_mask = ops.scatter_advantages(hae, roles, one([0, 6, 8], dtype=torch.int32))
    # The subgoal role counts on the boundary turn only: in turn 1 a subgoal token carries no loss.
    assert advantages.tolist() == [0, 1, 10, 100, 110, 111, 0, 200]
    assert loss_mask.tolist() == [False, True, True, True, True, True, False, True]


@pytest.mark.parametrize("lengths", [[], [0], [1], [5, 0, 12], [3] * 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalised_equals_the_reference(lengths, dtype):
    case = random_case(lengths, dtype)
    result, expected = ops.normalize_and_scatter(*case), ops.reference.normalize_and_scatter(*case)
    torch.testing.assert_close(result, expected)


def test_normalised_over_the_turns_that_train_a_level():
    one = torch.tensor
    low, high, switch = (one([x, 2 * x, 3 * x, 4 * x]) for x in (1.0, 10.0, 100.0))
    hae = ops.HAE(low, None, high, None, switch, None, one([True, False, True, True]))
    # Turn 0 trains all, turn 1 nothing (its subgoal is no boundary's), turn 2 low and high, turn 3 switch.
    roles, cu_tokens = (
        one([1, 2, 4, 2, 3, 4], dtype=torch.uint8),
        one([0, 3, 4, 5, 6], dtype=torch.int32),
    )
    advantages, loss_mask, normal = ops.normalize_and_scatter(hae, roles, cu_tokens)
    assert normal.advantages_low.tolist() == [-1, 0, 1, 0]
    assert normal.advantages_high.tolist() == [-1, 0, 1, 0]
    assert normal.advantages_switch.tolist() == [-1, 0, 0, 1]
    assert advantages.tolist() == [-1, -1, -1, 0, 2, 1]
    assert loss_mask.tolist() == [True, True, True, False, True, True]


def test_opcheck_and_strides():
    hae, roles, cu_tokens = random_case([3, 4])
    arguments = (
        hae.advantages_low,
        hae.advantages_high,
        hae.advantages_switch,
        hae.boundary,
        roles,
        cu_tokens,
    )
    torch.library.opcheck(torch.ops.hiper_fast.scatter_advantages.default, arguments)
    strided = torch.stack([roles, roles], 1)[:, 0]
    assert torch.equal(
        ops.scatter_advantages(hae, strided, cu_tokens)[0],
        ops.scatter_advantages(hae, roles, cu_tokens)[0],
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("roles", {"roles": torch.zeros(7, dtype=torch.int64)}),
        ("cu_tokens", {"cu_tokens": torch.tensor([0, 3, 6], dtype=torch.int32)}),
        ("cu_tokens", {"cu_tokens": torch.tensor([0, 8, 7], dtype=torch.int32)}),
        ("hae.advantages_low", {"cu_tokens": torch.tensor([0, 7], dtype=torch.int32)}),
    ],
)
def test_bad_arguments_are_named(name, change):
    hae, roles, cu_tokens = random_case([3, 4])
    with pytest.raises(ValueError, match=name):
        ops.scatter_advantages(**({"hae": hae, "roles": roles, "cu_tokens": cu_tokens} | change))


def test_compiles_in_one_graph_with_what_feeds_it():
    pieces = ops.TokenPieces.from_bytes([b"<action>", b"y", b"</action>"])
    ids, cu_tokens = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 3, 4], dtype=torch.int32)
    rewards, low, high = torch.randn(3, 2)
    terminated, cu_turns = torch.tensor([True]), torch.tensor([0, 2], dtype=torch.int32)

    def pipeline(ids, rewards, low, high):
        roles, switch, _, _ = ops.find_roles(ids, cu_tokens, pieces)
        hae = ops.hae(rewards, low, high, switch, terminated, cu_turns)
        return ops.scatter_advantages(
            hae._replace(advantages_low=ops.normalize(hae.advantages_low, hae.boundary)),
            roles,
            cu_tokens,
        )

    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")
    result, expected = compiled(ids, rewards, low, high), pipeline(ids, rewards, low, high)
    torch.testing.assert_close(result, expected)
