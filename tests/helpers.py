"""What many tests begin with."""

from hiper_fast.agent.loading import load_agent
from hiper_fast.config import ModelConfig
from hiper_fast.configure import resolve
from hiper_fast.envs.family import families

HOUSEHOLD = families.find("household")


def make_tiny(family=HOUSEHOLD, seed=0, **model):
    """The tiny model's agent, on the CPU."""
    return load_agent(ModelConfig(**{"device": "cpu", **model}), seed, family.tokenizer)


def configure(name="household", **options):
    """A resolved configuration; `train__lr=1` is train.lr."""
    given = {key.replace("__", "."): value for key, value in options.items()}
    return resolve(given={"env.name": name, "model.device": "cpu", **given})
