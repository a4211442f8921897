"""Any Gymnasium environment whose observations are texts."""

from .environment import GymnasiumText

__all__ = ["GymnasiumText"]
