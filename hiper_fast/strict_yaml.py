"""YAML as files of options need it: every key once, nothing larger than it looks, one line where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hiper_fast.options import ConfigError, show
from hiper_fast.text import escape, shorten

MOST_BYTES = 500_000
MOST_NODES = 100_000  # that a file stands for, with every alias written out
MOST_SAID = 160  # characters of what a parser has to say
INVALID = "not valid YAML"


class Loader(yaml.SafeLoader):
    """Refuses keys that stand twice, and aliases that add up to more than a file should hold."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            measure(node, {})
        return node


def load(file: Path) -> Any:
    """The content of a file, None if it is empty. ConfigError, without the file's name, or OSError."""
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(f"larger than {MOST_BYTES:,} bytes: no file of options")
    try:
        return yaml.load(content.decode("utf-8-sig"), Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{INVALID} (byte {error.start + 1} is not UTF-8)") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{INVALID} ({describe(error)})") from None
    except RecursionError:
        raise ConfigError(f"{INVALID} (nested too deeply)") from None
    except Exception as error:  # what yaml's constructors let through, of !!int "" or a 13th month
        reason = shorten(escape(str(error)), MOST_SAID)
        raise ConfigError(f"{INVALID} (a value is not of its kind: {reason})") from None


def describe(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line if that is known."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
    problem = shorten(escape(problem), MOST_SAID)
    mend = "; indent with spaces" if r"'\t'" in problem else ""
    return f"line {mark.line + 1}: {problem}{mend}" if mark else problem


def measure(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """How many nodes it stands for; `sizes`: those known, None of the nodes that this one lies in."""
    if id(node) not in sizes:
        sizes[id(node)] = None
        sizes[id(node)] = 1 + sum(measure(child, sizes) for child in list_children(node))
    size = sizes[id(node)]
    if size is None:
        raise yaml.MarkedYAMLError(problem="it holds itself", problem_mark=node.start_mark)
    if size > MOST_NODES:
        problem = f"its aliases stand for more than {MOST_NODES:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return size


def list_children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        check_keys(node)
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def check_keys(node: yaml.MappingNode) -> None:
    seen: dict[tuple[str, str], int] = {}  # the line of each key
    for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
        known = seen.get((key.tag, key.value))
        if known is not None:
            problem = f"{show(key.value)} stands here again; it is in line {known} already"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen[key.tag, key.value] = key.start_mark.line + 1
