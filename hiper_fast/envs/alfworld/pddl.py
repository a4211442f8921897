"""Just enough PDDL to play ALFWorld: a problem is read, its goal compiled to a test over facts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

from ..base import GameError

Fact = tuple[str, ...]  # (predicate, argument, ...), lower-case
Formula = tuple[str, object]  # ("atom", fact) | ("not", formula) | ("and" | "or", list of formulas)

MAX_DEPTH = 50  # of a goal; official goals nest seven deep
MAX_GROUND = 200_000  # bindings tried while grounding one goal; official goals need a few hundred

_COMMENT = re.compile(r";[^\n]*")
_SECTION = re.compile(r"\(\s*:([a-z-]+)")
_FACT = re.compile(r"\(([^()]+)\)")
_TOKEN = re.compile(r"[()]|[^\s()]+")


class Problem(NamedTuple):
    domain: str
    types: dict[str, str]  # object -> its type
    facts: dict[str, list[Fact]]  # the initial state, by predicate
    goal: list  # nested lists of tokens


def read_problem(text: str) -> Problem:
    """Parse a PDDL problem; names come out lower-case, as for the planner. Raises GameError."""
    text = text.lower()
    if ";" in text:
        text = _COMMENT.sub("", text)
    if text.count("(") != text.count(")"):
        raise GameError("its pddl_problem has unbalanced parentheses (is it truncated?)")
    parts = _SECTION.split(text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name in ("domain", "objects", "init", "goal"):
        if name not in sections:
            raise GameError(f"its pddl_problem has no (:{name} …) section")
    return Problem(
        domain=sections["domain"].replace(")", "").strip(),
        types=_read_objects(sections["objects"]),
        facts=_read_facts(sections["init"]),
        goal=read_expression(sections["goal"]),
    )


def _read_objects(section: str) -> dict[str, str]:
    types, names = {}, []
    tokens = iter(section.replace(")", " ").split())
    for token in tokens:
        if token == "-":
            types.update(dict.fromkeys(names, next(tokens, "object")))
            names = []
        else:
            names.append(token)
    return types | dict.fromkeys(names, "object")


def _read_facts(section: str) -> dict[str, list[Fact]]:
    if "=" in section:  # costs and distances: (= (total-cost) 0)
        section = re.sub(r"\(\s*=\s*\([^()]*\)[^()]*\)", "", section)
    facts: dict[str, list[Fact]] = defaultdict(list)
    found = _FACT.findall(section)
    for fact in map(str.split, found):
        facts[fact[0] if fact else ""].append(tuple(fact))
    if section.count("(") != len(found) or "" in facts:
        raise GameError("its (:init …) section holds something that is not a plain fact")
    return facts


def read_expression(text: str) -> list:
    """The parenthesised expression that `text` begins with, as nested lists."""
    stack: list[list] = [[]]
    for token in _TOKEN.findall(text):
        if token == "(":
            stack.append([])
            if len(stack) > MAX_DEPTH:
                raise GameError(f"its goal nests more than {MAX_DEPTH} deep")
        elif len(stack) == 1:
            break
        elif token == ")":
            closed = stack.pop()
            stack[-1].append(closed)
            if len(stack) == 1:
                return closed
        else:
            stack[-1].append(token)
    raise GameError("its goal is not a parenthesised expression")


def rename(expression: list | str, names: dict[str, str]) -> list | str:
    """The expression with `names` in place of their keys."""
    if isinstance(expression, str):
        return names.get(expression, expression)
    return [rename(part, names) for part in expression]


def read_parameters(tokens: list[str]) -> dict[str, str]:
    """`?o1 ?o2 - object ?r - receptacle` -> {variable: type}."""
    if not _is_atom(tokens):
        raise GameError(
            f"its goal has quantified variables that cannot be read: {str(tokens)[:80]}"
        )
    return _read_objects(" ".join(tokens))


def _is_atom(expression: object) -> bool:
    return (
        isinstance(expression, list)
        and expression != []
        and all(isinstance(term, str) for term in expression)
    )


def holds(formula: Formula, facts: Collection[Fact]) -> bool:
    """Whether a ground formula is true where exactly `facts` are."""
    operator, rest = formula
    if operator == "atom":
        return rest in facts
    if operator == "and":
        return all(holds(part, facts) for part in rest)
    if operator == "or":
        return any(holds(part, facts) for part in rest)
    return not holds(rest, facts)


def list_atoms(formula: Formula) -> Iterator[Fact]:
    """Every fact a ground formula depends on."""
    operator, rest = formula
    if operator == "atom":
        yield rest
    elif operator == "not":
        yield from list_atoms(rest)
    else:
        for part in rest:
            yield from list_atoms(part)


TRUE: Formula = ("and", [])
FALSE: Formula = ("or", [])


class Grounder:
    """Compiles a goal expression to a formula over fluent facts; all that is static is decided."""

    def __init__(self, problem: Problem, fluents: Collection[str], arity: Mapping[str, int]):
        self.fluents = fluents
        self.arity = {"=": 2, **arity}
        self.types = problem.types
        self.static = {
            predicate: facts
            for predicate, facts in problem.facts.items()
            if predicate not in fluents
        }
        self.facts = set(chain.from_iterable(self.static.values()))
        self.matches: dict[tuple, list[Fact]] = {}
        self.tried = 0

    def ground(self, expression: list, binding: dict[str, str]) -> Formula:
        operator, *rest = expression if isinstance(expression, list) and expression else [None]
        if operator in ("and", "or"):
            return _simplify(operator, [self.ground(part, binding) for part in rest])
        if operator == "not" and len(rest) == 1:
            return _negate(self.ground(rest[0], binding))
        if operator == "imply" and len(rest) == 2:
            return self.ground(["or", ["not", rest[0]], rest[1]], binding)
        if operator == "exists" and len(rest) == 2:
            return self._ground_exists(*rest, binding)
        if operator == "forall" and len(rest) == 2:
            return _negate(self._ground_exists(rest[0], ["not", rest[1]], binding))
        if _is_atom(expression) and self.arity.get(operator) == len(rest):
            return self._ground_atom((operator, *(self._resolve(term, binding) for term in rest)))
        raise GameError(f"its goal has a part that cannot be read: {str(expression)[:80]}")

    def _resolve(self, term: str, binding: dict[str, str]) -> str:
        if term.startswith("?") and term not in binding:
            raise GameError(f"its goal uses the variable {term} without a quantifier")
        return binding.get(term, term)

    def _ground_atom(self, fact: Fact) -> Formula:
        if fact[0] == "=":
            return TRUE if len(set(fact[1:])) == 1 else FALSE
        if fact[0] in self.fluents:
            return ("atom", fact)
        return TRUE if fact in self.facts else FALSE

    def _ground_exists(self, declared: list, body: list, binding: dict[str, str]) -> Formula:
        variables = read_parameters(declared)
        binding = {
            variable: value for variable, value in binding.items() if variable not in variables
        }
        conjuncts = self._flatten(body, variables, binding)
        bindings, undecided = [binding], []
        for part in conjuncts:
            if _is_atom(part) and part[0] in self.static and len(set(part)) == len(part):
                bindings = [wider for narrow in bindings for wider in self._join(part, narrow)]
            else:
                undecided.append(part)
        for variable, type_ in variables.items():
            bindings = [
                wider for narrow in bindings for wider in self._enumerate(variable, type_, narrow)
            ]
        return _simplify("or", [self.ground(["and", *undecided], bound) for bound in bindings])

    def _flatten(self, body: list, variables: dict[str, str], binding: dict[str, str]) -> list:
        """The conjuncts of `body` and of nested `exists`: one join instead of nested loops."""
        if body[:1] == ["and"]:
            return [part for inner in body[1:] for part in self._flatten(inner, variables, binding)]
        if body[:1] == ["exists"] and len(body) == 3:
            inner = read_parameters(body[1])
            if not inner.keys() & (variables.keys() | binding.keys()):
                variables |= inner
                return self._flatten(body[2], variables, binding)
        return [body]

    def _join(self, part: list[str], binding: dict[str, str]) -> Iterator[dict[str, str]]:
        """`binding` extended by each static fact that `part` can stand for."""
        pattern = tuple(binding.get(term, term) for term in part)
        for fact in self._match(pattern):
            self._count()
            yield binding | {
                term: value for term, value in zip(pattern, fact, strict=True) if term[0] == "?"
            }

    def _match(self, pattern: Fact) -> list[Fact]:
        """The static facts that agree with the constants of `pattern`."""
        fixed = [place for place, term in enumerate(pattern) if term[0] != "?"]
        if len(fixed) == len(pattern):
            return [pattern] if pattern in self.facts else []
        key = tuple((place, pattern[place]) for place in fixed)
        if key not in self.matches:
            pick = itemgetter(*fixed)
            wanted = pick(pattern)
            self.matches[key] = [
                fact
                for fact in self.static[pattern[0]]
                if len(fact) == len(pattern) and pick(fact) == wanted
            ]
        return self.matches[key]

    def _enumerate(
        self, variable: str, type_: str, binding: dict[str, str]
    ) -> Iterator[dict[str, str]]:
        if variable in binding:
            yield binding
            return
        for name, its_type in self.types.items():
            if its_type == type_:
                self._count()
                yield binding | {variable: name}

    def _count(self) -> None:
        self.tried += 1
        if self.tried > MAX_GROUND:
            raise GameError(f"its goal has more than {MAX_GROUND} possible bindings")


def _simplify(operator: str, parts: list[Formula]) -> Formula:
    neutral, decisive = (TRUE, FALSE) if operator == "and" else (FALSE, TRUE)
    if decisive in parts:
        return decisive
    parts = [part for part in parts if part != neutral]
    return parts[0] if len(parts) == 1 else (operator, parts)


def _negate(formula: Formula) -> Formula:
    return FALSE if formula == TRUE else TRUE if formula == FALSE else ("not", formula)
