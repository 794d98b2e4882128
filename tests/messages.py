"""The messages that emergency_kit/ can end with, read out of its source.

In: the package's files. Out: `Message`s, each a text whose holes (what a run fills in) are HOLE, with the file and line it is made at.
What counts: the first argument of every error of `errors.py`, of the package's own exceptions that carry a text into one of them, of
ValueError (pydantic and the loaders pass its words on), of `cli._say`, and the reasons of the verdict (`gate._check`). Variables, helper
functions, arguments, lists that are joined and returned tuples are followed through the package by name. Limits: no types are known, so
that a method is found by its name alone; what comes from a library is a hole.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

PACKAGE = Path("emergency_kit")
HOLE = "\0"
# A hole is followed where what fills it is a sentence, or where the text around it says too little to be found by.
SENTENCE_WORDS, ENOUGH_WORDS, MOST_TEXTS, MOST_ELEMENTS, MOST_TARGETS, DEEPEST = 4, 3, 200, 40, 3, 7
# Calls whose argument of this number is a message, too: `Refused(status, kind, text)`, and `Row(place, value, problem)`, a line that cannot be read.
ARGUMENT = {"Refused": 2, "Row": 2, "_check": 1}
SPOKEN = {("cli", "_say"), ("evaluation/gate", "_check"), ("data/formats", "Row")}
# Its ValueErrors are for who calls it wrongly; none reaches a user.
OWN_BUSINESS = {"statistics.py"}


@dataclass(frozen=True)
class Message:
    text: str
    place: str  # file:line
    kind: str  # the error's class, or the call that says it


@dataclass(frozen=True)
class Scope:
    """Where a name is looked up: functions from the innermost out, and the module."""

    functions: tuple[ast.FunctionDef | ast.AsyncFunctionDef, ...]
    module: ast.Module
    stem: str

    def within(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Scope:
        return Scope((function, *self.functions), self.module, self.stem)

    def bodies(self) -> list[ast.AST]:
        return [*self.functions, self.module]


def words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


class Package:
    def __init__(self, root: Path = PACKAGE):
        self.modules = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
        self.functions: dict[str, list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, Scope]]] = {}
        self.calls: dict[str, list[tuple[ast.Call, Scope]]] = {}
        self.errors = {"KitError"}
        self.at: list[tuple[Path, ast.Call, Scope]] = []
        self._found: dict[tuple[int, ...], set[str]] = {}
        for path, module in self.modules.items():
            self._index(module, Scope((), module, path.stem), path)

    def _index(self, node: ast.AST, scope: Scope, path: Path) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                self.functions.setdefault(child.name, []).append((child, scope))
                self._index(child, scope.within(child), path)
                continue
            if isinstance(child, ast.ClassDef):
                if any(_name(base) in self.errors or _name(base) == "Exception" for base in child.bases):
                    self.errors.add(child.name)
            if isinstance(child, ast.Call) and (name := _name(child.func)):
                self.calls.setdefault(name, []).append((child, scope))
                self.at.append((path, child, scope))
            self._index(child, scope, path)

    def messages(self) -> Iterator[Message]:
        raised = {id(node.exc) for module in self.modules.values() for node in ast.walk(module) if isinstance(node, ast.Raise)}
        for path, call, scope in self.at:
            name = _name(call.func)
            known = name in self.errors or any(name == spoken and str(path).startswith(f"emergency_kit/{room}") for room, spoken in SPOKEN) or (name == "ValueError" and id(call) in raised and path.name not in OWN_BUSINESS)
            position = ARGUMENT.get(name, 0)
            if not known or position >= len(call.args) or path.name == "errors.py":
                continue
            node = call.args[position]
            found = self.elements(node, scope, 0) if name == "ConfigError" else self.texts(node, scope, 0)
            for text in sorted(found):
                yield Message(" ".join(text.split()), f"{path}:{call.lineno}", name)

    # One expression

    def texts(self, node: ast.AST | None, scope: Scope, depth: int) -> set[str]:
        """What a string expression can be. Never empty: at least a hole."""
        key = (id(node), *map(id, scope.functions))
        if node is None or depth > DEEPEST:
            return {HOLE}
        if key not in self._found:
            self._found[key] = {HOLE}  # for what refers to itself
            self._found[key] = self._texts(node, scope, depth)
        return self._found[key]

    def _texts(self, node: ast.AST, scope: Scope, depth: int) -> set[str]:
        match node:
            case ast.Constant(value=str(value)):
                return {value}
            case ast.JoinedStr(values=values):
                return self._joined(values, scope, depth)
            case ast.FormattedValue(value=value):
                return self.texts(value, scope, depth)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return _product([self.texts(left, scope, depth), self.texts(right, scope, depth)])
            case ast.IfExp(body=body, orelse=other):
                return self.texts(body, scope, depth) | self.texts(other, scope, depth)
            case ast.BoolOp(values=values):
                return set().union(*(self.texts(value, scope, depth) for value in values))
            case ast.NamedExpr(value=value) | ast.Await(value=value):
                return self.texts(value, scope, depth)
            case ast.Name(id=name):
                return self._named(name, scope, depth) or {HOLE}
            case ast.Subscript(value=ast.Dict(values=values)):
                return set().union(*(self.texts(value, scope, depth) for value in values))
            case ast.Subscript(value=ast.Name() as listed, slice=ast.Constant(value=int())):
                return self.elements(listed, scope, depth + 1) or {HOLE}
            case ast.Call(func=function, args=args):
                return self._called(node, function, args, scope, depth)
        return {HOLE}

    def _joined(self, values: list[ast.expr], scope: Scope, depth: int) -> set[str]:
        plain = [str(value.value) if isinstance(value, ast.Constant) else HOLE for value in values]
        poor, parts = words("".join(plain)) < ENOUGH_WORDS, [{literal} for literal in plain]
        for arguments in (False, True):  # what callers hand over only where nothing nearer says enough
            for at, value in enumerate(values):
                if parts[at] == {HOLE} and (arguments == self._is_argument(value, scope)) and (poor or not arguments):
                    inner = self.texts(value, scope, depth + 1)
                    if any(words(text) >= (1 if poor else SENTENCE_WORDS) for text in inner):
                        parts[at] = inner
            if all(words(text) >= ENOUGH_WORDS for text in _product(parts)):
                break
        return _product(parts)

    def _is_argument(self, value: ast.expr, scope: Scope) -> bool:
        name = _name(value.value) if isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name) else ""
        return bool(name) and any(name in {one.arg for one in (*body.args.args, *body.args.kwonlyargs)} for body in scope.functions)

    def _called(self, node: ast.Call, function: ast.expr, args: list[ast.expr], scope: Scope, depth: int) -> set[str]:
        name = _name(function)
        if isinstance(function, ast.Attribute) and name == "join" and args:
            return {HOLE + text + HOLE for text in self.elements(args[0], scope, depth + 1)} or {HOLE}
        if name in ("str", "redact") and args:
            return self.texts(args[0], scope, depth)
        if isinstance(function, ast.Attribute) and name in ("strip", "format", "replace", "capitalize", "rstrip", "removesuffix"):
            return self.texts(function.value, scope, depth)
        found: set[str] = set()
        for target, inside in self._targets(function, scope):
            for value in _returns(target):
                found |= self.texts(value, inside, depth + 1)
        return found or {HOLE}

    def _targets(self, function: ast.expr, scope: Scope) -> list[tuple[ast.AST, Scope]]:
        """Functions of the package that a call can mean: those of the module named before the dot, else of this one, else of any."""
        named = [(target, around.within(target)) for target, around in self.functions.get(_name(function), [])]
        before = _name(function.value) if isinstance(function, ast.Attribute) else scope.stem
        if isinstance(function, ast.Attribute) and before in sys.stdlib_module_names:
            return []
        near = [one for one in named if one[1].stem == before] or [one for one in named if one[1].stem == scope.stem] or named
        return near if len(near) <= MOST_TARGETS else []

    def _named(self, name: str, scope: Scope, depth: int) -> set[str]:
        found: set[str] = set()
        for body in scope.bodies():
            for value, picked in _assigned(body, name):
                if picked is None:
                    found |= self.texts(value, scope, depth + 1)
                elif isinstance(picked, int):
                    found |= self._item(value, picked, scope, depth + 1)
                else:
                    found |= self.elements(value, scope, depth + 1)
            if isinstance(body, ast.FunctionDef | ast.AsyncFunctionDef):
                found |= self._argument(body, name, scope.stem, depth)
            if found:
                return found
        return found

    def _item(self, value: ast.expr, index: int, scope: Scope, depth: int) -> set[str]:
        """The index-th of a tuple, written here or returned by a function of the package."""
        if isinstance(value, ast.Tuple):
            return self.texts(value.elts[index], scope, depth) if index < len(value.elts) else set()
        found: set[str] = set()
        if isinstance(value, ast.IfExp):
            return self._item(value.body, index, scope, depth) | self._item(value.orelse, index, scope, depth)
        if isinstance(value, ast.Call) and depth <= DEEPEST:
            for target, inside in self._targets(value.func, scope):
                for back in _returns(target):
                    found |= self._item(back, index, inside, depth + 1)
        return found

    def _argument(self, function: ast.FunctionDef | ast.AsyncFunctionDef, name: str, stem: str, depth: int) -> set[str]:
        """What callers hand over for a parameter."""
        given = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        keywords = [argument.arg for argument in function.args.kwonlyargs]
        if name not in given + keywords or depth > DEEPEST:
            return set()
        first = 1 if given[:1] in (["self"], ["cls"]) else 0
        found: set[str] = set()
        for call, scope in self.calls.get(function.name, []):
            if scope.stem != stem and (function.name.startswith("_") or len(self.functions[function.name]) > 1):
                continue
            for keyword in call.keywords:
                if keyword.arg == name:
                    found |= self.texts(keyword.value, scope, depth + 1)
            if name in given and 0 <= (at := given.index(name) - first) < len(call.args):
                found |= self.texts(call.args[at], scope, depth + 1)
        return {text for text in found if words(text)} or set()

    # Lists of texts

    def elements(self, node: ast.AST | None, scope: Scope, depth: int) -> set[str]:
        """The texts in an expression that is a list of them; empty where that is not known."""
        key = (-1, id(node), *map(id, scope.functions))
        if node is None or depth > DEEPEST:
            return set()
        if key not in self._found:
            self._found[key] = set()
            found = self._elements(node, scope, depth)
            self._found[key] = found if len(found) <= MOST_ELEMENTS else set()  # a name that means many things means none
        return self._found[key]

    def _elements(self, node: ast.AST, scope: Scope, depth: int) -> set[str]:
        match node:
            case ast.List(elts=elts) | ast.Tuple(elts=elts) | ast.Set(elts=elts):
                return set().union(*(self.elements(item.value, scope, depth) if isinstance(item, ast.Starred) else self.texts(item, scope, depth) for item in elts))
            case ast.ListComp(elt=elt) | ast.GeneratorExp(elt=elt) | ast.SetComp(elt=elt):
                return {text for text in self.texts(elt, scope, depth) if words(text)}
            case ast.BinOp(left=left, right=right):
                return self.elements(left, scope, depth) | self.elements(right, scope, depth)
            case ast.IfExp(body=body, orelse=other):
                return self.elements(body, scope, depth) | self.elements(other, scope, depth)
            case ast.Subscript(value=value, slice=ast.Slice()) | ast.NamedExpr(value=value):
                return self.elements(value, scope, depth)
            case ast.Name(id=name):
                return self._listed(name, scope, depth)
            case ast.Call(func=function, args=args):
                if _name(function) in ("list", "sorted", "tuple", "set") and args:
                    return self.elements(args[0], scope, depth)
                found: set[str] = set()
                for target, inside in self._targets(function, scope):
                    for value in _returns(target):
                        found |= self.elements(value, inside, depth + 1)
                    for value in _yields(target):
                        found |= self.texts(value, inside, depth + 1)
                return found
        return set()

    def _listed(self, name: str, scope: Scope, depth: int) -> set[str]:
        """The texts that a list of this name gets: written at once, added here, added by functions that it is handed to, or there before."""
        found: set[str] = set()
        for body in scope.bodies():
            key = (-2, id(body), hash(name))
            if key in self._found or depth > DEEPEST:
                found |= self._found.get(key, set())
                continue
            self._found[key] = set()
            here: set[str] = set()
            for value, picked in _assigned(body, name):
                if picked is None and not (isinstance(value, ast.List) and not value.elts):
                    here |= self.elements(value, scope, depth + 1)
            if isinstance(body, ast.FunctionDef | ast.AsyncFunctionDef):
                here |= self._added(name, body, scope, depth)
            self._found[key] = here
            found |= here
        return found

    def _added(self, name: str, body: ast.FunctionDef | ast.AsyncFunctionDef, scope: Scope, depth: int) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(body):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute) and _name(node.func.value) == name and node.args:
                found |= self.texts(node.args[0], scope, depth + 1) if node.func.attr == "append" else self.elements(node.args[0], scope, depth + 1) if node.func.attr == "extend" else set()
            for at, argument in enumerate(node.args):
                if isinstance(argument, ast.Name) and argument.id == name and _name(node.func) in self.functions:
                    for target, inside in self._targets(node.func, scope):
                        if at < len(target.args.args):
                            found |= self._listed(target.args.args[at].arg, Scope((target,), inside.module, inside.stem), depth + 1)
        given = [one.arg for one in body.args.args]
        for call, around in self.calls.get(body.name, []) if name in given else ():
            if around.stem != scope.stem and (body.name.startswith("_") or len(self.functions[body.name]) > 1):
                continue
            if given.index(name) < len(call.args) and isinstance(handed := call.args[given.index(name)], ast.Name):
                found |= self._listed(handed.id, around, depth + 1)
        return found


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _product(parts: list[set[str]]) -> set[str]:
    return {"".join(choice) for choice in itertools.islice(itertools.product(*(sorted(part) for part in parts)), MOST_TEXTS)}


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _own(child)


def _returns(function: ast.AST) -> list[ast.expr]:
    return [node.value for node in _own(function) if isinstance(node, ast.Return) and node.value is not None]


def _yields(function: ast.AST) -> list[ast.expr]:
    return [node.value for node in _own(function) if isinstance(node, ast.Yield) and node.value is not None]


def _assigned(body: ast.AST, name: str) -> Iterator[tuple[ast.expr, int | str | None]]:
    """`(value, what of it)` for every assignment to a name: all of it (None), an item of a tuple, or one element of a list ("each")."""
    nodes = ast.iter_child_nodes(body) if isinstance(body, ast.Module) else _own(body)
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value, None
                elif isinstance(target, ast.Tuple):
                    for index, item in enumerate(target.elts):
                        if isinstance(item, ast.Name) and item.id == name:
                            yield node.value, index
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and _name(node.target) == name and node.value is not None:
            yield node.value, None
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name) and node.target.id == name:
            yield node.iter, "each"
