"""Copy an object and all code of this project that it uses into one source file, which needs only public packages.

One file, because diffusers copies no further files for a component, and only direct imports for a pipeline.
"""

import ast
import importlib.util
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def bundle(module: str, name: str) -> str:
    """Return the source of ``module.name`` with the definitions that it needs, unchanged, dependencies first.

    Annotations are not evaluated in a bundle, so the types that only annotations name are left out. Modules of this
    project must be imported at the top of a module and by name (``from kac.noise import noise``).
    """
    imports: set[str] = set()
    parts: dict[tuple[str, int], str] = {}  # by module and line
    homes: dict[str, str] = {}  # the module of each name

    def include(module: str, name: str, is_type: bool) -> None:
        statements, lines = _read(module)
        node = statements.get(name)
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = str(getattr(node, "module", name))
            if not origin.startswith(("kac.", "pipeline.")):
                alias = next(alias for alias in node.names if name in (alias.asname, alias.name))
                imports.add(ast.unparse(type(node)(**{**vars(node), "names": [alias]})))
            elif not is_type:
                include(origin, name, False)
        elif node is not None and not is_type:
            assert homes.setdefault(name, module) == module, f"{module} and {homes[name]} both define {name}."
            if (key := (module, node.lineno)) not in parts:
                parts[key] = ""
                for used, in_annotation in _names_in(node):
                    include(module, used, in_annotation)
                first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
                del parts[key]  # add it again, after its dependencies
                parts[key] = "\n".join(lines[first - 1 : node.end_lineno])

    include(module, name, False)
    head = f'"""{name} of DistillKac (Apache-2.0), with the code that it uses. The comments name the modules."""'
    text = [head, "from __future__ import annotations", "\n".join(sorted(imports))]
    for origin, group in itertools.groupby(parts, key=lambda key: key[0]):
        text.append(f"\n# {origin}\n" + "\n\n\n".join(parts[key] for key in group))
    return "\n\n".join(text) + "\n"


@cache
def _read(module: str) -> tuple[dict[str, Any], list[str]]:
    """Return a module's top-level statements by the names that they bind, and its lines."""
    text = Path(str(importlib.util.find_spec(module).origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
    statements: dict[str, Any] = {}
    for node in ast.parse(text).body:
        targets = getattr(node, "targets", [getattr(node, "target", ast.Pass())])  # of an assignment
        names = [name for target in targets for name, _ in _names_in(target)] + [getattr(node, "name", "")]
        names += [alias.asname or alias.name for alias in getattr(node, "names", ())]  # of an import
        statements.update(dict.fromkeys(names, node))
    return statements, text.splitlines()


def _names_in(node: ast.AST, in_annotation: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield each name in a statement, and whether it is in an annotation."""
    if isinstance(node, ast.Name):
        yield node.id, in_annotation
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _names_in(child, in_annotation or field in {"annotation", "returns"})
