"""Imports point one way, and configs stay light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dsv3_jax"
# A module imports only from layers to its left, or from its own.
LAYERS = (
    ["config", "axes", "runtime"],
    ["sharding"],
    ["ops"],
    ["kernels"],
    ["parallel"],
    ["layers"],
    ["models"],
    ["data"],
    ["interop"],
    ["evaluation"],
    ["training"],
    ["planning", "analysis", "inference"],
    ["ablation"],
    ["command_line"],
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.quick
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_left(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "dsv3_jax" and len(parts) > 1:
            assert RANK[parts[1]] < RANK[own] or parts[1] == own, f"{path} imports {name}"
        assert parts[0] not in ("torch", "transformers"), f"{path} imports a peer"


@pytest.mark.quick
def test_configs_import_only_the_config_module():
    for path in (ROOT / "configs").rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] in ("dsv3_jax", "pathlib", "dataclasses"), f"{path} imports {name}"
            assert not name.startswith("dsv3_jax") or name == "dsv3_jax.config", f"{path} imports {name}"


@pytest.mark.quick
def test_loading_a_config_imports_no_jax():
    code = "import sys; from dsv3_jax.config import load; load('configs/tiny.py'); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
