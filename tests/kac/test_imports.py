"""kac is plain PyTorch: none of its modules imports Ray, MLflow, pipeline or jobs."""

import ast
import json
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kac

FOREIGN = {"ray", "mlflow", "pipeline", "jobs"}
ROOT = Path(kac.__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(kac.__path__, "kac."))


def test_importing_every_module_loads_no_foreign_package():
    code = """
        import importlib, json, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *MODULES], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(json.loads(result.stdout))
    assert {"kac", "torch", "numpy"} <= loaded
    assert not loaded & FOREIGN


def imported(source: str) -> set[str]:
    """Return the top-level packages that a module imports, including inside functions."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.partition(".")[0]
        for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    }


def test_the_search_finds_imports_inside_functions():
    assert imported("def f():\n    from ray.data import x\n    import mlflow.pytorch as m") == {"ray", "mlflow"}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_a_foreign_package_inside_functions(name):
    path = ROOT / name.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert not imported(source) & FOREIGN


def test_the_walk_finds_all_modules():
    files = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in (ROOT / "kac").rglob("*.py")
    }
    assert {name.removesuffix(".__init__") for name in files} == {"kac", *MODULES}
