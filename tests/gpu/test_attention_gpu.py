"""Packed attention on a GPU against every sequence alone: a varlen kernel in bfloat16, SDPA in float32."""

import copy

import pytest
import torch
import transformers

from hiper_fast.agent import attention
from hiper_fast.agent.agent import run_trunk
from hiper_fast.packing import microbatches, prefix_sums

pytestmark = pytest.mark.gpu
SIZES = dict(
    vocab_size=60, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.1,
)  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("share", [False, True])
def test_packed_equals_unpacked(device, interpreted, dtype, tolerance, window, share):
    if interpreted:
        pytest.skip("no kernel of ours: nothing to interpret")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**SIZES, sliding_window=window)
    )
    model = model.to(device, dtype)
    plain = copy.deepcopy(model)
    attention.use(model)
    lengths = [7, 1, 12, 5, 1, 30, 2, 11]
    ids, cu = torch.randint(2, 60, (sum(lengths),)), prefix_sums(lengths)
    ids[cu[5] : cu[5] + 12] = ids[cu[2] : cu[3]]  # one begins as a whole other one
    ids[cu[7] : cu[7] + 5] = ids[cu[2] : cu[2] + 5]
    (batch,) = microbatches(ids, cu, 1000, share=share)
    assert (batch.counts[0] > 10) == share
    batch = batch.to(device)
    hidden = run_trunk(model.base_model, batch)[batch.rows]
    parts = hidden.split(batch.cu_whole.diff().tolist())
    total = torch.zeros((), device=device)
    for i, rows in zip(batch.index.tolist(), parts, strict=True):
        alone = plain.base_model(
            input_ids=ids[None, cu[i] : cu[i + 1]].to(device)
        ).last_hidden_state[0]
        torch.testing.assert_close(rows, alone, atol=tolerance, rtol=tolerance)
        total = total + (alone.float() ** 3).sum()
    total.backward()
    (hidden.float() ** 3).sum().backward()
    for mine, expected in zip(
        model.base_model.parameters(), plain.base_model.parameters(), strict=True
    ):
        error = (mine.grad - expected.grad).float().norm() / expected.grad.float().norm().clamp(
            min=1e-6
        )
        assert error < tolerance
