"""Which of transformers' causal LMs can be trained here: a tiny random model of every type, taken through loading.

python benchmarks/models.py [TYPE …] [--page FILE]

A type works if it loads, the log-probs that the built-in engine stores are those that an update reads from packed
microbatches and those of the model as it came, and gradients arrive. Or it is refused, with a ConfigError. All
else is a fault, and the exit status 1. Without types, all are tried and docs/models.md is written.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hiper_fast.agent import attention, tiny
from hiper_fast.agent.agent import Agent, run_trunk
from hiper_fast.agent.loading import prepare
from hiper_fast.config import Config, ModelConfig
from hiper_fast.options import ConfigError
from hiper_fast.packing import microbatches, prefix_sums
from hiper_fast.rollout.engines import Answer, Request
from hiper_fast.rollout.engines.paged import Engine, Options

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TOKENIZER = tiny.build_tokenizer([], [])
PADDING = 11  # rows of the embedding that stand for no token
WINDOW = 6
SIZES = [  # what a field of a configuration is called -> its value; the first that fits
    (r"indexer_kv_heads", 1),
    (r"indexer_compress_ratio", 2),
    (r"indexer_budget", 8),
    (r"(decoder_|unpadded_)?vocab_size(_per_layer_input)?", len(TOKENIZER) + PADDING),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?decoder_layers|num_blocks|depth", 2),
    (r"(num_)?encoder_layers|num_nextn_predict_layers|first_k_dense_replace|num_dense_layers", 1),
    (r".*(key_value_heads|kv_n_heads|kv_heads)", 2),
    (r".*(attention_heads|n_heads?|num_heads|num_query_groups)", 4),
    (r"(input_|output_)?embedding_size|word_embed_proj_dim", 16),
    (r"hidden_size(_global)?|n_embd|d_model|emb_dim|embedding_dim|lru_width", 32),
    (r"attention_hidden_size", 32),
    (r".*intermediate_size|.*ffn(_hidden)?_(dim|size)|dim_ff|dff|d_inner|n_inner", 48),
    (r"feed_forward_size|mlp_dim|intermediate_size_mlp", 48),
    (r"qk_head_dim", 16),
    (r".*head_dim|attention_head_size|dim_head|kv_channels|d_head|rotary_dim", 8),
    (r".*lora_rank|laurel_rank|gated_norm_rank|hidden_size_per_layer_input", 8),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", 4),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"topk_group|n_group|num_expert_group|.*num_shared_experts|n_shared_experts", 1),
    (r"max_(position_embeddings|target_positions|seq_len)|n_positions|n_ctx|context_length", 40),
    (r"model_max_length|original_max_position_embeddings", 40),
    (r"sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size", WINDOW),
    (r"local_attention(_window_len)?|keep_window_size", WINDOW),
    (r"encoder_hash_byte_group_vocab", 100),
]
OPTIONS = {  # not sizes: what makes a model of its kind
    "use_sliding_window": True,
    "is_decoder": True,
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "bos_token_id": TOKENIZER.eos_token_id,
}
BOTH = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPECIAL = {  # type -> fields of its configuration that follow no rule
    "cohere": {"logit_scale": 0.75},  # else log-probs hardly spread
    "cohere2": {"logit_scale": 0.75},
    "cohere2_moe": {"logit_scale": 0.75},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(BOTH, ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 4.0}},
    "gemma3n_text": {"layer_types": BOTH * 2, "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": BOTH * 2, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral3": {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1,
                                              "original_max_position_embeddings": 10}},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
LENGTHS = 17, 3, 1, 14, 9, 2  # of the prompts
RESPONSE = 8
TEMPERATURE = 0.8
BATCH_TOKENS = 60  # of prompts at once, and of a microbatch
TOLERANCE = 1e-4  # nats
GAIN = 1.3  # of the weights: log-probs then spread by a nat or more, and an error shows
SEED = 0


INTRODUCTION = """# Which models can be trained

    python benchmarks/models.py

writes this page in about a minute: for each of the {types} model types for which transformers has a causal LM, a tiny
model with random weights goes through what `--model` goes through at load. Here transformers {transformers} and
torch {torch}, in float32 on a CPU.

| | types |
|---|--:|
| work | {works} |
| are refused at load, with the reason | {refused} |
| cannot be built from transformers' default configuration, or are no model alone | {not_built} |
| load and differ, or fail otherwise | {faults} |

- **Works**: three ways to a token's log-prob agree within {tolerance:.0e} nats (worst here {worst:.1e}): what a rollout
  stored while it sampled (conversations of two turns, prompts of {lengths} tokens, packed and through its cache,
  temperature {temperature}), what updates read from packed microbatches through the fused head, and what the model
  says as it came, of each sequence by itself. Log-probs spread by about a nat or more, windows are shorter than the
  sequences, packed batches longer than the positions, and the embedding has rows that stand for no token. Gradients
  of policy and critic arrive.
- **Refused**: what the load of a checkpoint would say. The same probe runs at every load. So it also refuses a
  checkpoint of a type that works here, if its options make it differ.
- Encoders count as decoders here (`is_decoder: true`). Else they are refused, for attention in both directions.
- Rotary frequencies of type `longrope` or `dynamic` change beyond a length: runs that can reach it are refused.
- Soft-capped attention scores are fast on a GPU with flash-attn. Without it, and with attention sinks always, a layer
  holds all scores of a group of sequences.

"""


@dataclass(slots=True)
class Outcome:
    type: str
    name: str
    kind: str  # works, refused, not built or fault
    reason: str = ""
    difference: float = math.nan  # the largest, in nats


def shrink(default: PreTrainedConfig, given: dict | None = None) -> PreTrainedConfig:
    """A configuration of the same class with tiny sizes."""
    options = {}
    for field, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            options[field] = shrink(value)
        elif field in OPTIONS:
            options[field] = OPTIONS[field]
        elif value is None or type(value) is int:
            sizes = [size for name, size in SIZES if re.fullmatch(name, field)]
            if sizes:
                options[field] = sizes[0]
        elif field in ("layer_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))
            options[field] = kinds * (1 + (len(kinds) == 1))
    options |= given or {}
    for field in {"layer_types", "layers_block_type"} & options.keys():
        options["num_hidden_layers"] = len(options[field])
    if "kv_lora_rank" in options:  # latent attention, in which no heads share a key
        options["num_key_value_heads"] = options["num_attention_heads"]
    return type(default)(**options)


def build(model_type: str, **fields) -> PreTrainedModel:
    """A model whose weights are so large, and its log-probs so unlike, that an error shows."""
    config = shrink(CONFIG_MAPPING[model_type](), SPECIAL.get(model_type, {}) | fields)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config).eval()
    scatter(model)
    attention.heed_cap(model)
    return model


@torch.no_grad()
def scatter(model: PreTrainedModel) -> None:
    for p in model.parameters():
        if p.dim() > 1:
            p.normal_(std=GAIN * p.shape[-1] ** -0.5)
        elif p.is_floating_point():
            p.add_(0.3 * torch.randn(p.shape))


def wake_engine(agent: Agent) -> Engine:
    """The built-in one, as a rollout has it."""
    config = Config(rollout=Options())
    config.agent.batch_tokens, config.agent.max_response_tokens = BATCH_TOKENS, RESPONSE
    engine = Engine(agent, config)
    engine.wake()
    return engine


def sample(engine: Engine, prompts: list[list[int]]) -> list[Answer]:
    """The answers, in order."""
    for key, prompt in enumerate(prompts):
        engine.submit(key, Request(prompt, SEED + key, TEMPERATURE, conversation=key))
    answers = {}
    while len(answers) < len(prompts):
        answers |= dict(engine.collect())
    return [answers[key] for key in range(len(prompts))]


@torch.no_grad()
def read_packed(agent: Agent, sequences: list[list[int]]) -> list[Tensor]:
    """Log-probs of every token but the first of each sequence, as an update reads them."""
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    ids = torch.tensor(sum(sequences, []))
    cu_seqlens = prefix_sums([len(s) for s in sequences])
    for batch in microbatches(ids, cu_seqlens, BATCH_TOKENS, share=agent.shares_prefixes):
        hidden, read = (x[batch.rows] for x in (run_trunk(agent.model, batch), batch.input_ids))
        logprobs = agent.logprobs(hidden, read.roll(-1), TEMPERATURE)
        sizes = batch.cu_whole.diff().tolist()
        for index, rows in zip(batch.index.tolist(), logprobs.split(sizes), strict=True):
            found[index] = rows[:-1]
    return found


@torch.no_grad()
def read_alone(model: PreTrainedModel, vocabulary: int, sequences: list[list[int]]) -> list[Tensor]:
    """The same by the model as it came, each sequence by itself."""
    found = []
    for ids in map(torch.tensor, sequences):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1, :vocabulary].float()
        found.append((logits / TEMPERATURE).log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return found


def compare(model: PreTrainedModel, agent: Agent) -> float:
    """Nats at most between what rollouts store, what updates read and what `model` gives, as it came.

    Rollouts are conversations of two turns whose second goes on from the first's past.
    """
    generator = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(len(TOKENIZER), (n,), generator=generator).tolist() for n in LENGTHS]
    engine = wake_engine(agent)
    first = sample(engine, prompts)
    longer = [[*prompt, *answer.ids, 7, 8] for prompt, answer in zip(prompts, first, strict=True)]
    turns = list(zip(prompts + longer, first + sample(engine, longer), strict=True))
    sequences = [prompt + answer.ids for prompt, answer in turns]
    ways = read_packed(agent, sequences), read_alone(model, agent.head.vocabulary, sequences)
    return max(
        float((read[-len(answer.ids) :] - torch.tensor(answer.logprobs)).abs().max())
        for way in ways
        for read, (_, answer) in zip(way, turns, strict=True)
    )


def train(agent: Agent) -> None:
    """Gradients of policy and critic, as an update takes them; ValueError if none arrive."""
    [batch] = microbatches(torch.arange(40), prefix_sums([25, 15]), 40)
    logprobs = agent.logprobs(agent.trunk(batch), batch.input_ids, TEMPERATURE)
    agent.add_critic()
    torch.nn.init.ones_(agent.critic.heads.weight)
    values = agent.critic(agent.critic_hidden(batch))
    (logprobs.sum() + values.square().sum()).backward()
    for module in (agent.model, agent.critic):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if not gradients or not all(g.isfinite().all() for g in gradients):
            raise ValueError(f"gradients of {type(module).__name__} are missing or not finite")


def check(model_type: str, dtype: torch.dtype = torch.float32) -> Outcome:
    outcome = Outcome(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "not built")
    try:
        model = build(model_type).to(dtype)
        outcome.kind = "fault"
        agent = prepare(copy.deepcopy(model), TOKENIZER, ModelConfig(device="cpu"))
        outcome.difference = compare(model, agent)
        train(agent)
        outcome.kind = "works" if outcome.difference <= TOLERANCE else "fault"
    except ConfigError as error:
        outcome.kind, outcome.reason = "refused", str(error)
    except Exception as error:
        outcome.reason = f"{type(error).__name__}: {error}"
    return outcome


def describe(outcome: Outcome) -> str:
    """What the table says beside a type and its class."""
    if outcome.kind == "works":
        return "works"
    reason = re.sub(r"^model\.path: (\w+ (?=has|gives|cannot|chooses|scales))?", "", outcome.reason)
    reason = re.split("; (?:use|it cannot)|, which cannot read packed|, where they spread", reason)[
        0
    ]
    reason = re.sub(": by up to .*", "", reason)
    reason = reason or f"differs by {outcome.difference:.2g} nats"
    return f"{outcome.kind}: {textwrap.shorten(reason, 160, placeholder=' …')}".replace("|", "\\|")


def write_page(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in outcomes)
    worst = max(o.difference for o in outcomes if o.kind == "works")
    rows = [f"| {o.type} | `{o.name}` | {describe(o)} |" for o in outcomes]
    return INTRODUCTION.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        types=len(outcomes),
        works=counts["works"],
        refused=counts["refused"],
        not_built=counts["not built"],
        faults=counts["fault"],
        tolerance=TOLERANCE,
        worst=worst,
        lengths=f"{min(LENGTHS)} to {max(LENGTHS)}",
        temperature=TEMPERATURE,
    ) + "\n".join(["| type | class | |", "|---|---|---|", *rows, ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all")
    parser.add_argument("--page", type=Path, help="where the page goes")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = []
    for model_type in options.types or TYPES:
        outcomes.append(check(model_type))
        print(f"{model_type:26} {describe(outcomes[-1])}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in Counter(o.kind for o in outcomes).items()))
    page = options.page or (None if options.types else PAGE)
    if page:
        page.write_text(write_page(outcomes))
    return int(any(outcome.kind == "fault" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
