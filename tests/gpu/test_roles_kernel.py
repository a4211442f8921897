"""find_roles on the device against its reference, on responses that may lack, nest, repeat or break anything."""

import random

import pytest
import torch
from test_find_roles import TestByHand as ByHand
from test_find_roles import odd_response, run

from hiper_fast import ops

pytest.importorskip("triton")

from hiper_fast.kernels import raise_pending
from hiper_fast.kernels.find_roles import find_roles

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_device(device):
    def run_kernel(ids, cu_tokens, pieces):
        tensors = (ids, cu_tokens, pieces.bytes, pieces.offsets, pieces.flags)
        return tuple(x.cpu() for x in find_roles(*(x.to(device) for x in tensors)))

    return run_kernel


@pytest.mark.parametrize("name", [name for name in vars(ByHand) if name.startswith("test_")])
def test_by_hand(on_device, name):
    getattr(ByHand(), name)(on_device)


def test_equals_the_reference_on_odd_responses(on_device, interpreted):
    """About a second a response under the interpreter."""
    for seed in range(1 if interpreted else 20):
        rng = random.Random(seed)
        responses = [odd_response(rng) for _ in range(14 if interpreted else 300)]
        result = run(responses, implementation=on_device)
        expected = run(responses, implementation=ops.reference.find_roles)
        for tokens, roles, wanted in zip(responses, result[0], expected[0], strict=True):
            assert roles == wanted, tokens
        for x, y in zip(result[1:], expected[1:], strict=True):
            assert torch.equal(x, y)


def test_more_tokens_than_a_block_and_tags_across_its_end(on_device):
    text = b"<switch>Switch </switch>" + 30 * b"word" + b"<subgoal>x</subgoal> <action>y</action>"
    letters = [
        text[i : i + 1] for i in range(len(text))
    ]  # 64 tokens a block: tags lie across the ends
    for response in (letters, [b"", *letters[:70]], letters[:63]):
        result, expected = (
            run([response], implementation=on_device),
            run([response], implementation=ops.reference.find_roles),
        )
        assert result[0] == expected[0]
        for x, y in zip(result[1:], expected[1:], strict=True):
            assert torch.equal(x, y)


def test_switch_words(on_device):
    words = ["KEEP", "KE EP", "switch\v", "\x1cKEEP", "SWITCHES", "", " ", "\0KEEP"]
    after = ["", "", "\u4e00", "\u9fff", "\ua000", "", "\u4dff", ""]
    texts = [
        f"<switch>{w}</switch><subgoal>a</subgoal><action>b</action>{c}"
        for w, c in zip(words, after, strict=True)
    ]
    responses = [[t.encode()] for t in texts]
    result, expected = (
        run(responses, implementation=on_device),
        run(responses, implementation=ops.reference.find_roles),
    )
    for x, y in zip(result[1:], expected[1:], strict=True):
        assert torch.equal(x, y)


def test_bad_inputs_are_reported(on_device):
    pieces = ops.TokenPieces.from_bytes([b"<action>", b"y", b"</action>"])
    cu = torch.tensor([0, 3], dtype=torch.int32)
    for bad in (3, -1, 2**40):
        roles, *_ = on_device(torch.tensor([0, bad, 2]), cu, pieces)
        assert roles.tolist() == [1, 0, 1]  # as a token without bytes
        with pytest.raises(ValueError, match="find_roles: token_ids"):
            raise_pending()
    on_device(torch.tensor([0, 1, 2]), torch.tensor([0, 4], dtype=torch.int32), pieces)
    with pytest.raises(ValueError, match="find_roles: cu_tokens"):
        raise_pending()
