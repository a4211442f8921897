"""Which level trains each token: one warp reads one response, with the semantics of hiper_fast/response.py.

The text is never put together. A tag begins with '<', so first every '<' of a block of tokens is looked at, one token
a lane: the bytes after it, across tokens, tell its tag. Of each block's tags the first opening one and the first
closing one after it count. (An opening tag holds no '<' but its first byte, so "after its start" is "after its end".)
A second pass over the tokens writes roles. CJK characters, which cannot be valid, are found on the way like tags.

A position is (token within the response, byte within the token's piece), as one int64: token << 32 | byte.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hiper_fast.kernels import _errors
from hiper_fast.kernels._launch import on_device
from hiper_fast.kernels._scan import bounds
from hiper_fast.kernels._tuning import constants

_ACTION, _SUBGOAL, _SWITCH = (tl.constexpr(bit) for bit in (1, 2, 4))
_ANGLE_OR_HIGH, _EMPTY = tl.constexpr(1 | 2), tl.constexpr(4)  # flags of a piece
_NOWHERE = tl.constexpr(2**62)
_NONE = tl.constexpr(2**30)


def _word(text: str) -> tl.constexpr:
    return tl.constexpr(int.from_bytes(text.encode(), "big"))


# Up to 8 bytes after the '<', as a big-endian number.
_OPEN_ACTION, _OPEN_SUBGOAL, _OPEN_SWITCH = map(_word, ("action>", "subgoal>", "switch>"))
_CLOSE_ACTION, _CLOSE_SUBGOAL, _CLOSE_SWITCH = map(_word, ("/action>", "/subgoal", "/switch>"))
_KEEP, _CHANGE = map(_word, ("KEEP", "SWITCH"))


@triton.jit
def _known(token_ids, token, inside, vocabulary):
    """Each token's id, and whether it is `inside` and the id exists."""
    id = tl.load(token_ids + token, mask=inside, other=0).to(tl.int64)
    return id, inside & (id >= 0) & (id < vocabulary)


@triton.jit
def _piece(token_ids, token, inside, offsets, vocabulary):
    """[begin, end) of each token's bytes; none for tokens that are not `inside` and for ids that do not exist."""
    id, known = _known(token_ids, token, inside, vocabulary)
    begin = tl.load(offsets + id, mask=known, other=0)
    return begin, tl.load(offsets + id + 1, mask=known, other=0)


@triton.jit
def _skip_empty(token_ids, token, at, end, count, offsets, vocabulary):
    """Moves on to the next token while `at` is at its token's end."""
    stuck = (at >= end) & (token < count)
    while tl.max(stuck.to(tl.int32), axis=0) > 0:
        token += stuck.to(tl.int32)
        begin, following_end = _piece(
            token_ids, token, stuck & (token < count), offsets, vocabulary
        )
        at = tl.where(stuck, begin, at)
        end = tl.where(stuck, following_end, end)
        stuck = (at >= end) & (token < count)
    return token, at, end


@triton.jit
def _earlier(first, candidate, j):
    """The byte of a lane's first tag of a kind, now that there is one at j if `candidate`."""
    return tl.where(candidate & (first == _NONE), j, first)


@triton.jit
def _first(lane_token, byte):
    """The first position over the lanes; byte _NONE: there is none in the lane."""
    position = (lane_token.to(tl.int64) << 32) | byte.to(tl.int64)
    return tl.min(tl.where(byte == _NONE, _NOWHERE, position), axis=0)


@triton.jit
def _find(opened, closed, lane_token, open_byte, close_byte, close_after_open):
    """(position of the first opening tag, of the first closing tag after it), from those so far and this block's."""
    opened = tl.minimum(opened, _first(lane_token, open_byte))
    opening_token = (opened >> 32).to(tl.int32)
    # Within the opening tag's own token only a closing tag after it counts.
    byte = tl.where(
        lane_token == opening_token,
        close_after_open,
        tl.where(lane_token > opening_token, close_byte, _NONE),
    )
    return opened, tl.minimum(closed, _first(lane_token, byte))


@triton.jit
def _walk(token_ids, position, steps, count, bytes, offsets, vocabulary):
    """(token, address, end of the token's bytes) of the byte `steps` bytes after the one at `position`."""
    token = (position >> 32).to(tl.int32) + tl.zeros([1], tl.int32)
    begin, end = _piece(token_ids, token, token < count, offsets, vocabulary)
    at = begin + (position & 0xFFFFFFFF).to(tl.int32)
    for _ in range(0, steps):
        at += 1
        token, at, end = _skip_empty(token_ids, token, at, end, count, offsets, vocabulary)
    return token, at, end


@triton.jit(
    do_not_specialize=["tokens", "turns", "vocabulary"],
    do_not_specialize_on_alignment=["token_ids", "cu_tokens", "bytes", "offsets", "piece_flags"],
)
def _kernel(
    token_ids, cu_tokens, bytes, offsets, piece_flags, roles, switch, value_index, valid, flags,
    tokens, turns, vocabulary, TOKENS_SLOT: tl.constexpr, IDS_SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    turn = tl.program_id(0)
    begin, end = bounds(
        cu_tokens, turn + tl.zeros([1], tl.int32), turns, tokens, flags, TOKENS_SLOT
    )
    base = tl.max(begin, axis=0)
    count = tl.max(end, axis=0) - base
    token_ids += base
    roles += base

    action_open = tl.full([], _NOWHERE, tl.int64)
    subgoal_open, switch_open = action_open, action_open
    action_close, subgoal_close, switch_close = action_open, action_open, action_open
    cjk = tl.full([], 0, tl.int32)

    start = 0
    while start < count:
        lane_token = start + tl.arange(0, BLOCK)
        inside = lane_token < count
        id, known = _known(token_ids, lane_token, inside, vocabulary)
        tl.store(flags + IDS_SLOT + tl.zeros([BLOCK], tl.int32), 1, mask=inside & ~known)
        interesting = (
            tl.load(piece_flags + id, mask=known, other=0).to(tl.int32) & _ANGLE_OR_HIGH
        ) != 0
        piece = tl.load(offsets + id, mask=known & interesting, other=0)
        piece_end = tl.load(offsets + id + 1, mask=known & interesting, other=0)

        nothing = tl.full([BLOCK], _NONE, tl.int32)
        action_1, action_2, action_3 = (
            nothing,
            nothing,
            nothing,
        )  # bytes of: opening, closing, closing after opening
        subgoal_1, subgoal_2, subgoal_3 = nothing, nothing, nothing
        switch_1, switch_2, switch_3 = nothing, nothing, nothing
        longest = tl.max(piece_end - piece, axis=0)
        j = 0
        while j < longest:
            lead = tl.load(bytes + piece + j, mask=piece + j < piece_end, other=0).to(tl.int32)
            angle = lead == 0x3C
            wide = (lead >= 0xE4) & (lead <= 0xE9)
            if tl.max((angle | wide).to(tl.int32), axis=0) > 0:
                # The 8 bytes that follow, and the one after them; 0 past the end.
                word = tl.zeros([BLOCK], tl.int64)
                last = tl.zeros([BLOCK], tl.int32)
                token, at = lane_token, piece + j
                at_end = tl.where(angle | wide, piece_end, at + 1)
                for k in range(0, 9):
                    at += 1
                    reading = (angle | wide) & (token < count)
                    token = tl.where(reading, token, count)
                    token, at, at_end = _skip_empty(
                        token_ids, token, at, at_end, count, offsets, vocabulary
                    )
                    last = tl.load(bytes + at, mask=token < count, other=0).to(tl.int32)
                    if k < 8:
                        word = (word << 8) | last.to(tl.int64)
                following = (word >> 48).to(tl.int32) & 0xFFFF
                in_block = ((following & 0xC0C0) == 0x8080) & (
                    (lead != 0xE4) | ((following >> 8) >= 0xB8)
                )
                cjk |= tl.max((wide & in_block).to(tl.int32), axis=0)

                action_1 = _earlier(action_1, angle & ((word >> 8) == _OPEN_ACTION), j)
                subgoal_1 = _earlier(subgoal_1, angle & (word == _OPEN_SUBGOAL), j)
                switch_1 = _earlier(switch_1, angle & ((word >> 8) == _OPEN_SWITCH), j)
                closes = angle & (word == _CLOSE_ACTION)
                action_2 = _earlier(action_2, closes, j)
                action_3 = _earlier(action_3, closes & (action_1 < j), j)
                closes = angle & (word == _CLOSE_SUBGOAL) & (last == 0x3E)
                subgoal_2 = _earlier(subgoal_2, closes, j)
                subgoal_3 = _earlier(subgoal_3, closes & (subgoal_1 < j), j)
                closes = angle & (word == _CLOSE_SWITCH)
                switch_2 = _earlier(switch_2, closes, j)
                switch_3 = _earlier(switch_3, closes & (switch_1 < j), j)
            j += 1
        action_open, action_close = _find(
            action_open, action_close, lane_token, action_1, action_2, action_3
        )
        subgoal_open, subgoal_close = _find(
            subgoal_open, subgoal_close, lane_token, subgoal_1, subgoal_2, subgoal_3
        )
        switch_open, switch_close = _find(
            switch_open, switch_close, lane_token, switch_1, switch_2, switch_3
        )
        start += BLOCK

    # The tokens of each block's first and last byte; first > last where there is no block.
    has_action, has_subgoal, has_switch = (
        action_close < _NOWHERE,
        subgoal_close < _NOWHERE,
        switch_close < _NOWHERE,
    )
    action_first, action_last = count, count - 1
    subgoal_first, subgoal_last = count, count - 1
    switch_first, switch_last = count, count - 1
    if has_action:
        token, at, at_end = _walk(token_ids, action_close, 8, count, bytes, offsets, vocabulary)
        action_first, action_last = (action_open >> 32).to(tl.int32), tl.max(token, axis=0)
    if has_subgoal:
        token, at, at_end = _walk(token_ids, subgoal_close, 9, count, bytes, offsets, vocabulary)
        subgoal_first, subgoal_last = (subgoal_open >> 32).to(tl.int32), tl.max(token, axis=0)

    # The switch text: stripped of ASCII whitespace, in capitals, packed; more than 8 letters are no word of ours.
    word = tl.full([], 0, tl.int64)
    letters = tl.full([], 0, tl.int32)
    if has_switch:
        token, at, at_end = _walk(token_ids, switch_close, 8, count, bytes, offsets, vocabulary)
        switch_first, switch_last = (switch_open >> 32).to(tl.int32), tl.max(token, axis=0)
        token, at, at_end = _walk(token_ids, switch_open, 8, count, bytes, offsets, vocabulary)
        close_token = (switch_close >> 32).to(tl.int32)
        close_begin, _ = _piece(
            token_ids, close_token + tl.zeros([1], tl.int32), token < count, offsets, vocabulary
        )
        close_at = tl.max(close_begin, axis=0) + (switch_close & 0xFFFFFFFF).to(tl.int32)
        spaces = tl.full([], 0, tl.int32)  # whitespace that counts only if more follows
        here, where = tl.max(token, axis=0), tl.max(at, axis=0)
        while ((here < close_token) | (where < close_at)) & (letters <= 8) & (here <= close_token):
            letter = tl.max(tl.load(bytes + at, mask=token < count, other=0).to(tl.int32), axis=0)
            is_space = (letter == 0x20) | ((letter >= 0x09) & (letter <= 0x0D))
            if is_space:
                spaces += (letters > 0).to(tl.int32)
            else:
                letters += spaces + 1
                spaces = tl.full([], 0, tl.int32)
                capital = tl.where((letter >= 0x61) & (letter <= 0x7A), letter - 0x20, letter)
                word = (word << 8) | capital.to(tl.int64)
            at += 1
            token, at, at_end = _skip_empty(
                token_ids, token, at, at_end, count, offsets, vocabulary
            )
            here, where = tl.max(token, axis=0), tl.max(at, axis=0)
    keeps = (letters == 4) & (word == _KEEP)
    changes = (letters == 6) & (word == _CHANGE)
    tl.store(switch + turn, (letters > 0) & ~keeps)
    tl.store(valid + turn, (keeps | changes) & has_subgoal & has_action & (cjk == 0))

    # The first token that starts at or after a block's end is the one after that of its last byte.
    low = tl.full([], 0, tl.int32)
    if has_subgoal & (subgoal_last + 1 < count):
        low = subgoal_last + 1
    elif has_switch & (switch_last + 1 < count):
        low = switch_last + 1
    tl.store(value_index + 3 * turn, low)
    tl.store(value_index + 3 * turn + 1, 0)
    tl.store(value_index + 3 * turn + 2, 0)

    start = 0
    while start < count:
        token = start + tl.arange(0, BLOCK)
        inside = token < count
        id, known = _known(token_ids, token, inside, vocabulary)
        spelled = (tl.load(piece_flags + id, mask=known, other=_EMPTY).to(tl.int32) & _EMPTY) == 0
        role = tl.where((token >= action_first) & (token <= action_last), _ACTION, 0)
        role |= tl.where((token >= subgoal_first) & (token <= subgoal_last), _SUBGOAL, 0)
        role |= tl.where((token >= switch_first) & (token <= switch_last), _SWITCH, 0)
        role = tl.where(spelled, role, 0)
        if has_action == 0:
            role |= _ACTION
        tl.store(roles + token, role.to(tl.uint8), mask=inside)
        start += BLOCK


def find_roles(
    token_ids: Tensor,
    cu_tokens: Tensor,
    piece_bytes: Tensor,
    piece_offsets: Tensor,
    piece_flags: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_ids, cu_tokens = token_ids.contiguous(), cu_tokens.contiguous()
    tokens, turns = token_ids.shape[0], cu_tokens.shape[0] - 1
    roles = torch.empty(tokens, dtype=torch.uint8, device=token_ids.device)
    switch, valid = (
        torch.empty(turns, dtype=torch.bool, device=token_ids.device) for _ in range(2)
    )
    value_index = torch.empty(turns, 3, dtype=torch.int32, device=token_ids.device)
    if turns:
        # With the limit named, ptxas does not spill a register or two to fit one program more.
        with on_device(token_ids):
            _kernel[(turns,)](
                token_ids, cu_tokens, piece_bytes, piece_offsets, piece_flags, roles, switch, value_index, valid,
                _errors.flags(), tokens, turns, piece_flags.shape[0],
                TOKENS_SLOT=_errors.ROLES_TOKENS, IDS_SLOT=_errors.ROLES_IDS,
                **constants("find_roles._kernel", token_ids.device, BLOCK=64, num_warps=1),
                maxnreg=96, enable_fp_fusion=True,
            )  # fmt: skip
    return roles, switch, value_index, valid
