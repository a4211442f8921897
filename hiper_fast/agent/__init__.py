"""Policy, critic and reference; how they load, attend and adapt; the tiny model."""
