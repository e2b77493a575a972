"""Which settings a tree of Python files reads: what `x.size` reads depends on the class that `x` is known to hold.

What a name holds follows from annotations (of parameters, attributes, returned values), from calls of a class and from
assignments and loops over what is known. A container of settings counts as the settings. Text in strings, attributes of
other objects, and what a class's own checks look at, `__post_init__` and `_check...`, are no reading.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping

Classes = frozenset[str]
NONE: Classes = frozenset()
SAME = {"replace", "copy", "deepcopy", "values", "items", "get", "pop", "sorted", "list", "tuple", "next", "iter"}
"""Calls that give what their first argument, or what they are a method of, holds."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parts_of(block: ast.AST) -> tuple[list[ast.AST], list[ast.AST]]:
    """A block's own nodes, in order, and the functions and classes in it."""
    own: list[ast.AST] = []
    inner: list[ast.AST] = []
    left = [*reversed(list(ast.iter_child_nodes(block)))]
    while left:
        node = left.pop()
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            inner.append(node)
        else:
            own.append(node)
            left += reversed(list(ast.iter_child_nodes(node)))
    return own, inner


class Tree:
    """What the classes and functions of some files hold and give, and which of their fields are read.

    Attributes:
        read: (class, field) for each field that is read.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.read: set[tuple[str, str]] = set()
        modules = [ast.parse(text) for text in files]
        nodes = [node for module in modules for node in ast.walk(module)]
        self.classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        self.held: dict[tuple[str, str], Classes] = defaultdict(frozenset)
        """What an attribute of a class holds."""
        self.given: dict[str, Classes] = defaultdict(frozenset)
        """What a function or method of a name returns."""
        for node in nodes:
            if isinstance(node, Function):
                self.given[node.name] |= self.named(node.returns)
            elif isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        self.held[node.name, part.target.id] |= self.named(part.annotation)
                    elif isinstance(part, Function) and "property" in map(ast.unparse, part.decorator_list):
                        self.held[node.name, part.name] |= self.named(part.returns)
        self.parts: dict[ast.AST, tuple[list[ast.AST], list[ast.AST]]] = {}
        known = -1
        while known < (known := len(self.read) + sum(map(len, self.held.values()))):  # until there is no more to know
            for module in modules:
                self.look(module, {}, "")

    def named(self, annotation: ast.AST | None) -> Classes:
        """The classes that an annotation names."""
        if annotation is None:
            return NONE
        words = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
        words |= {n.attr for n in ast.walk(annotation) if isinstance(n, ast.Attribute)}
        return frozenset(words & self.classes)

    def look(self, block: ast.AST, outside: Mapping[str, Classes], owner: str) -> None:
        """Look through a module, class or function, whose names hold what those outside it do, and its own."""
        names: dict[str, Classes] = dict(outside)
        if isinstance(block, Function | ast.Lambda):
            of = block.args
            for argument in (*of.posonlyargs, *of.args, *of.kwonlyargs):
                names[argument.arg] = self.named(argument.annotation)
            if owner and of.args and of.args[0].arg in ("self", "cls"):
                names[of.args[0].arg] = frozenset({owner})
        if block not in self.parts:
            self.parts[block] = parts_of(block)
        own, inner = self.parts[block]
        for _ in range(2):  # a comprehension uses its names before it says what they are
            for node in own:
                self.bind(node, names)
        for node in own:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.read |= {(cls, node.attr) for cls in self.value(node.value, names)}
        for node in inner:
            if isinstance(node, ast.ClassDef):
                self.look(node, names, node.name)
            elif not (isinstance(node, Function) and owner and node.name.startswith(("__post_init__", "_check"))):
                self.look(node, names, owner if isinstance(block, ast.ClassDef) else "")

    def bind(self, node: ast.AST, names: dict[str, Classes]) -> None:
        """Note what a statement's or a comprehension's names hold."""
        if isinstance(node, ast.AnnAssign):
            self.assign(node.target, self.named(node.annotation), None, names)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, self.value(node.value, names), node.value, names)
        elif isinstance(node, ast.NamedExpr):
            self.assign(node.target, self.value(node.value, names), None, names)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            self.assign(node.target, self.value(node.iter, names), None, names)

    def assign(self, target: ast.AST, found: Classes, value: ast.AST | None, names: dict[str, Classes]) -> None:
        """Note that a target holds what was found, of a value if it is known."""
        if isinstance(target, ast.Name) and found:
            names[target.id] = names.get(target.id, NONE) | found
        elif isinstance(target, ast.Attribute):
            for cls in self.value(target.value, names):
                self.held[cls, target.attr] |= found
        elif isinstance(target, ast.Tuple | ast.List):
            one_each = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
            for i, part in enumerate(target.elts):
                if one_each:
                    self.assign(part, self.value(value.elts[i], names), value.elts[i], names)
                else:
                    self.assign(part, found, None, names)

    def value(self, node: ast.AST, names: Mapping[str, Classes]) -> Classes:
        """The classes of which an expression may give one, or several in a container."""
        if isinstance(node, ast.Name):
            return names.get(node.id, NONE)
        if isinstance(node, ast.Attribute):
            return NONE.union(*(self.held[cls, node.attr] for cls in self.value(node.value, names)))
        if isinstance(node, ast.Call):
            return self.called(node, names)
        if isinstance(node, ast.Subscript | ast.Starred | ast.Await | ast.NamedExpr):
            return self.value(node.value, names)
        parts: list[ast.expr] = []
        if isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.BoolOp):
            parts = node.values
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            parts = node.elts
        elif isinstance(node, ast.Dict):
            parts = node.values
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            parts = [node.elt]
        elif isinstance(node, ast.DictComp):
            parts = [node.value]
        return NONE.union(*(self.value(part, names) for part in parts))

    def called(self, node: ast.Call, names: Mapping[str, Classes]) -> Classes:
        """What a call gives."""
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in self.classes:
            return frozenset({name})
        if name == "from_dict" and node.args:
            return self.named(node.args[0])
        if name == "getattr" and len(node.args) > 1:
            of = self.value(node.args[0], names)
            return NONE.union(*(held for (cls, _), held in self.held.items() if cls in of))
        found = self.given[name]
        if name in SAME:
            within = [function.value] if isinstance(function, ast.Attribute) else []
            found = found.union(*(self.value(part, names) for part in (*within, *node.args[:1])))
        return found
