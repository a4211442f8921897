"""Serve an environment to OpenEnv's clients, who need not install it.

python -m hiper_fast.serve alfworld
python -m hiper_fast.serve household --port 8001 --env.size medium
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys

from hiper_fast.config import Config, EnvConfig
from hiper_fast.envs.base import GameError
from hiper_fast.envs.family import families
from hiper_fast.options import ConfigError, list_options, set_options, show, suggest
from hiper_fast.text import clean

MOST_PORTS = 65_535
COMMON = {"env.name", "env.max_turns"}  # turns are the client's to count
GRACE = 1  # seconds that sessions get to end when the server is stopped


def parse_arguments(
    argv: list[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    """The parser, what it knows, and the dotted options that are left."""
    parser = argparse.ArgumentParser(
        prog="python -m hiper_fast.serve",
        description="Serve an environment to OpenEnv's clients; every WebSocket session plays games of its own.",
        epilog="The environment's own options, as hiper_fast.train has them, say what is served: --env.size medium, …; "
        "turns are the client's to count. Leave with Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "env", help=f"what to serve: {', '.join(families.names())} or package.module:Family"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: any that is free [8000]")
    parser.add_argument("--sessions", type=int, default=1024, help="most sessions at once [1024]")
    return parser, *parser.parse_known_args(argv)


def read_options(name: str, given: list[str]) -> EnvConfig:
    """The options of the environment `name`, which are all that may be given."""
    config = Config(env=families.find(name).Options())
    known = [o for o in list_options(config) if o.startswith("env.") and o not in COMMON]
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for option in known:
        parser.add_argument(f"--{option}", nargs="?", const=True, dest=option)
    values, unknown = parser.parse_known_args(given)
    if unknown:
        near = suggest(unknown[0].strip("-"), known, f"known: {', '.join(known) or 'none'}")
        raise ConfigError(f"command line: unexpected argument {show(unknown[0])}; {near}")
    set_options(config, [("command line", *setting) for setting in vars(values).items()], {})
    config.env.name = name
    return config.env


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; ConfigError where none can."""
    if not 0 <= port <= MOST_PORTS:
        raise ConfigError(f"--port: must be from 0 to {MOST_PORTS}, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--port: nothing can be served at {host}:{port} ({error}); give another --port or --host"
        ) from None


def serve(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Serves until a signal ends it."""
    try:
        import uvicorn

        from hiper_fast.openenv import Games, make_app
    except ImportError as error:
        raise ConfigError(
            f"serving needs openenv-core ({error}); pip install 'hiper_fast[openenv]'"
        ) from None
    if arguments.sessions < 1:
        raise ConfigError(f"--sessions: must be at least 1, got {arguments.sessions}")
    games = Games(families.find(arguments.env)(read_options(arguments.env, overrides)))
    app = make_app(games, arguments.sessions)
    with listen(arguments.host, arguments.port) as sock:
        place = f"http://{arguments.host}:{sock.getsockname()[1]}"
        panels = ", ".join(f"{name} {len(tasks)}" for name, tasks in games.panels.items())
        print(f"{arguments.env} at {place}; games of its panels: {panels or 'none'}", flush=True)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            timeout_graceful_shutdown=GRACE,
            ws_per_message_deflate=False,
        )
        logging.getLogger("uvicorn.error").addFilter(is_told)
        uvicorn.Server(settings).run(sockets=[sock])


def is_told(record: logging.LogRecord) -> bool:
    """All but that a client has left, of which OpenEnv makes an error every time."""
    return not (record.exc_info and record.exc_info[0].__name__ == "WebSocketDisconnect")


def main(argv: list[str] | None = None) -> int:
    parser, arguments, overrides = parse_arguments(argv)
    try:
        serve(arguments, overrides)
    except (ValueError, ImportError, GameError, OSError) as error:
        print(clean(f"{parser.prog}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
