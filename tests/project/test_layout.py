"""The modules of zoext: no circle of imports, nobody uses another one's private names, none is too large."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

SOURCES = Path(__file__).parents[2] / "zoext"

#: Names of torch and of the standard library that are private by their underscore and have no public equal.
NOT_OURS = {
    "_ArgumentGroup",  # argparse: the type of what add_argument_group() returns
    "_C",  # torch
    "_DisableTorchDispatch",  # torch._C: nothing public hides an operator from the modes that watch operators
    "_all_gather_result",  # FSDP2: no public hook runs when it reads shards
    "_buffers",  # of a module: named_buffers() leaves out what is shared
    "_cdata",  # of a storage: tells storages apart
    "_foreach_add_",  # torch, as its own optimizers call them
    "_foreach_copy_",
    "_foreach_mul",
    "_foreach_sub",
    "_fsdp_param_group",  # FSDP2
    "_functorch",  # torch._C: nothing public tells whether a transform is active
    "_len_torch_function_stack",  # torch._C: nothing public tells which modes are on it
    "_pop_torch_function_stack",
    "_push_on_torch_function_stack",
    "_forward_hooks",  # of a module
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",  # of a module
    "_getframe",  # sys
    "_get_fsdp_state",  # FSDP2
    "_has_compatible_shallow_copy_type",  # torch.ops.aten
    "_is_profiler_enabled",  # torch.autograd.profiler
    "_local_tensor",  # of a DTensor: to_local() may return a view
    "_modules",  # of a module: named_children() leaves out what is shared
    "_orig_mod",  # of what torch.compile returns
    "_parameters",  # of a module: named_parameters() leaves out what is shared
    "_schema",  # of an operator: the names of its arguments
    "_sharded_param_data",  # FSDP2
    "_storage_Use_Count",  # torch._C
    "_to_sharded",  # FSDP2
    "_training_state",  # FSDP2
    "_version",  # of a tensor
}
#: Public methods of every NamedTuple.
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}

pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not beside the tests")


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


class Import(NamedTuple):
    """``target`` is a module of zoext, ``name`` what is taken from it, empty if the module itself is."""

    target: str
    name: str
    line: int

    @property
    def path(self) -> str:
        return f"{self.target}.{self.name}" if self.name else self.target


@cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        parts = path.relative_to(SOURCES.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(text), len(text.splitlines()))
    return found


def imports_of(module: Module) -> Iterator[Import]:
    """All imports from zoext: at the top, in functions and under ``TYPE_CHECKING``."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "zoext":
                    yield Import(alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = module.package.split(".")
                base = ".".join([*ancestors[: len(ancestors) - node.level + 1], *filter(None, [base])])
            if base.split(".")[0] != "zoext":
                continue
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                is_module = whole in modules() or alias.name == "_C"
                yield Import(whole, "", node.lineno) if is_module else Import(base, alias.name, node.lineno)


def place(module: Module, line: int) -> str:
    return f"{module.path.relative_to(SOURCES.parent)}:{line}"


def circles() -> list[list[str]]:
    """The strongly connected components of several modules, and modules that import themselves (Tarjan)."""
    edges = {
        name: sorted({each.target for each in imports_of(module)} & modules().keys())
        for name, module in modules().items()
    }
    found: list[list[str]] = []
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for target in edges[name]:
            if target not in numbers:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], numbers[target])
        if lowest[name] == numbers[name]:
            start = stack.index(name)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1 or name in edges[name]:
                found.append(sorted(component))

    for name in edges:
        if name not in numbers:
            visit(name)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_imports(module: Module) -> Iterator[str]:
    """What is private in a package is for that package; what is private in a module, for that module."""
    for each in imports_of(module):
        parts = each.path.split(".")
        for position, part in enumerate(parts):
            owner = ".".join(parts[:position])
            if is_private(part) and not f"{module.name}.".startswith(f"{owner}."):
                yield f"{place(module, each.line)}: imports {each.path}"
                break


def private_attributes(module: Module) -> Iterator[str]:
    """``x._name`` where x is neither ``self`` nor ``cls`` nor of a class of this module."""
    own = own_variables(module)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            holder = node.value.func if isinstance(node.value, ast.Call) else node.value
            is_own = isinstance(holder, ast.Name) and holder.id in own
            if not is_own and node.attr not in NOT_OURS | OF_NAMED_TUPLES:
                yield f"{place(module, node.lineno)}: {ast.unparse(node)}"


def own_variables(module: Module) -> set[str]:
    """Variables annotated with a class of this module, or made by it or by a function that returns one."""
    classes, makers = set(), {"cls"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef):
            classes.add(node.name)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef) and _class_of(node.returns) in classes:
            makers.add(node.name)
    own = {"self", "cls", "super"} | classes
    for node in ast.walk(module.tree):
        match node:
            case ast.arg(arg=name, annotation=annotation) if _class_of(annotation) in classes:
                own.add(name)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id=maker)))
                | ast.withitem(
                    optional_vars=ast.Name(id=name), context_expr=ast.Call(func=ast.Name(id=maker))
                )
            ) if maker in makers | classes:
                own.add(name)
    return own


def _class_of(annotation: ast.expr | None) -> str:
    return annotation.id if isinstance(annotation, ast.Name) else ""


def only_exports(module: Module) -> bool:
    """Whether it is an ``__init__`` of a docstring, imports and names."""
    return module.path.name == "__init__.py" and all(
        isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in module.tree.body
    )


def listed(violations: list[str]) -> str:
    return f"{len(violations)} of them:\n" + "\n".join(violations)


def test_imports_have_no_circle() -> None:
    found = [" - ".join(circle) for circle in circles()]
    assert not found, listed(found)


def test_private_names_are_not_imported() -> None:
    found = [each for module in modules().values() for each in private_imports(module)]
    assert not found, listed(found)


def test_private_names_are_not_read() -> None:
    found = [each for module in modules().values() for each in private_attributes(module)]
    assert not found, listed(found)


def test_the_command_uses_the_facade_of_trajectories() -> None:
    found = [
        f"{place(module, each.line)}: imports {each.path}"
        for name, module in modules().items()
        if f"{name}.".startswith("zoext.cli.")
        for each in imports_of(module)
        if each.target.startswith("zoext.trajectory.")
    ]
    assert not found, listed(found)


def sizes() -> dict[str, int]:
    return {
        str(module.path.relative_to(SOURCES.parent)): module.lines
        for name, module in modules().items()
        if not f"{name}.".startswith("zoext.cli.") and not only_exports(module)
    }


def test_files_are_not_tiny() -> None:
    small = [f"{lines} {path}" for path, lines in sorted(sizes().items(), key=lambda item: item[1])]
    assert median(sizes().values()) >= 100, f"median {median(sizes().values())}; " + listed(small)


def test_files_are_not_huge() -> None:
    large = [f"{lines} {path}" for path, lines in sizes().items() if lines > 400]
    assert not large, listed(large)
