"""TextWorld under its public name; see `alfworld.textworld`."""

from .alfworld.textworld import TextWorld

__all__ = ["TextWorld"]
