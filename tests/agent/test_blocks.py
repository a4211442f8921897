"""Which blocks hold what, against a plain record of what was written where."""

import random

import pytest

from hiper_fast.agent.blocks import Blocks


def test_sequences_that_begin_alike_share_their_full_blocks():
    blocks = Blocks(10, size=4)
    first, held = blocks.take([1, 2, 3, 4, 5, 6, 7, 8, 9], room=11)
    assert held == 0 and len(first) == 3
    second, held = blocks.take([1, 2, 3, 4, 5, 6, 7, 0, 9], room=9)
    assert held == 4 and second[0] == first[0] and not set(second[1:]) & set(first)


def test_the_last_token_is_always_read():
    blocks = Blocks(10, size=4)
    blocks.take([1, 2, 3, 4], room=4)
    assert blocks.take([1, 2, 3, 4], room=4)[1] == 0
    assert blocks.take([1, 2, 3, 4, 5], room=5)[1] == 4


def test_more_to_read_than_is_wanted_takes_nothing():
    blocks = Blocks(10, size=4)
    assert blocks.take([1, 2, 3, 4, 5], room=5, most=4) is None and len(blocks.free) == 10
    blocks.take([1, 2, 3, 4, 5], room=5, most=5)
    assert blocks.take([1, 2, 3, 4, 6], room=5, most=0) is None
    assert blocks.take([1, 2, 3, 4, 6], room=5, most=1)[1] == 4


def test_what_nobody_holds_is_found_until_its_room_is_needed():
    blocks = Blocks(3, size=2)
    one, _ = blocks.take([1, 2, 3], room=4)
    blocks.give_back(one)
    again, held = blocks.take([1, 2, 9], room=3)
    assert held == 2 and again[0] == one[0]
    blocks.give_back(again)
    blocks.take([7] * 6, room=6)
    assert list(blocks.find([1, 2])) == []


def test_too_few_blocks():
    blocks = Blocks(3, size=2)
    assert blocks.take([1, 2, 3], room=7) is None
    held, _ = blocks.take([1, 2, 3], room=4)
    assert blocks.take([1, 2, 4], room=6) is None, "of three it shares one, and one is free"
    assert blocks.take([1, 2, 4], room=4) is not None
    assert len(blocks.free) == 0 and len(held) == 2


def test_after_an_update_nothing_is_held():
    blocks = Blocks(4, size=2)
    blocks.give_back(blocks.take([1, 2, 3], room=4)[0])
    blocks.forget()
    assert list(blocks.find([1, 2])) == []
    assert blocks.take([1, 2, 3], room=8)[1] == 0


@pytest.mark.parametrize("size", [1, 3])
def test_blocks_hold_what_they_are_said_to(size):
    """Sequences of few different tokens come, grow and go at random."""
    rng, blocks, written, live = random.Random(0), Blocks(24, size, first=1), {}, []
    shared = 0
    for _ in range(2000):
        if live and rng.random() < 0.45:
            ids, own = live.pop(rng.randrange(len(live)))
            if rng.random() < 0.5:
                blocks.note(ids, own)
            blocks.give_back(own)
            continue
        ids = [rng.randrange(2) for _ in range(rng.randint(1, 12))]
        longer = ids + [rng.randrange(2) for _ in range(rng.randint(0, 5))]
        taken = blocks.take(ids, len(longer) + 1)
        if taken is None:
            continue
        own, held = taken
        shared += held
        assert held % size == 0 and held < len(ids)
        for place, token in enumerate(longer):
            slot = own[place // size], place % size
            if place < held:
                assert written[slot] == token
            written[slot] = token
        live.append((longer, own))
        users = [block for _, one in live for block in one]
        assert {block: users.count(block) for block in users} == blocks.holders
        assert not set(users) & set(blocks.free) and len(set(users)) + len(blocks.free) == 24
    assert shared > 100
    for ids, own in live:
        for place, token in enumerate(ids):
            assert written[own[place // size], place % size] == token
