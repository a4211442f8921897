"""Any text environment behind an OpenEnv server."""

from .environment import OpenEnvSession, ServerError

__all__ = ["OpenEnvSession", "ServerError"]
