"""hiper_fast: HiPER, hierarchical reinforcement learning for language-model agents, small and fast."""

__version__ = "0.1.0"
