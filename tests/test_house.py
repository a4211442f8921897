"""The house's own rules: arrows go one way, functions are short and flat, every shipped file is packed."""

import ast
from pathlib import Path

import pytest

import hiper_fast

ROOT = Path(hiper_fast.__file__).parent
COMMANDS = {
    "train",
    "eval",
    "play",
    "bench",
    "report",
    "plan",
    "session",
    "configure",
    "tokenizers",
    "serve",
}
ROOMS = [  # from the ground up; a room imports from those before it
    {"text", "stopping"},
    {"options", "response", "_C", "kernels"},
    {"plugins", "config", "packing", "ops", "strict_yaml"},
    {"distributed"},
    {"envs", "agent"},
    {"rollout", "gymnasium", "openenv"},
    {"estimators"},
    {"runs"},
    {"learn"},
    {"plan", "configure"},
    {"resuming"},
    {"session", "eval", "study"},
    COMMANDS,
    {"compare"},
]
MOST_LINES, MOST_LEVELS = 60, 3
BLOCKS = ast.For | ast.While | ast.If | ast.With | ast.Try | ast.Match
FILES = sorted(path for path in ROOT.rglob("*.py"))


def name_module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_module(path) for path in FILES}


def find_imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    package = name_module(path) if path.stem == "__init__" else name_module(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return {name for name in found if name.startswith("hiper_fast.")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(ROOMS) if name in rooms)


def test_every_file_has_a_room():
    assert {room(module) for module in MODULES} - {""} <= set().union(*ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_down(path):
    own = room(name_module(path))
    for module in find_imports(path):
        other = room(module)
        assert not own or other == own or floor(other) < floor(own), f"{own} imports {module}"


def test_no_file_imports_itself_by_way_of_others():
    arrows = {name_module(path): find_imports(path) & MODULES for path in FILES}
    done, path = set(), []

    def walk(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(arrows[module] - {module}):
                walk(other)
            path.pop()
            done.add(module)

    for module in arrows:
        walk(module)


def test_environments_know_no_training():
    """And nothing of one environment lies outside its folder."""
    environments = {path.parent.name for path in ROOT.glob("envs/*/family.py")}
    for path in FILES:
        if "envs" not in path.relative_to(ROOT).parts:
            named = {
                module
                for module in find_imports(path)
                if module.split(".")[2:3] and module.startswith("hiper_fast.envs.")
            }
            assert not {module.split(".")[2] for module in named} & environments, path


def measure_nesting(node: ast.AST) -> int:
    """Levels of loops, conditions, contexts and handlers inside a function's own body; an elif is no new one."""
    deepest = 0
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, []):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                continue
            is_elif = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            is_elif = is_elif and len(node.orelse) == 1
            level = isinstance(child, BLOCKS) and not is_elif
            deepest = max(deepest, level + measure_nesting(child))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_flat(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < MOST_LINES, node.name
            assert measure_nesting(node) <= MOST_LEVELS, node.name


def test_nothing_is_imported_from_torchs_inside():
    for path in FILES:
        assert "torch._C" not in path.read_text(), path
