"""The shape of the code: imports point one way, files and functions stay small, the light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdtune"

# docs/architecture.md, "Who may import whom": a package may import packages of lower layers only.
LAYERS: dict[str, int] = {
    **dict.fromkeys(["constants", "errors", "log", "paths", "escape", "model_files", "_assets", "__init__"], 0),
    **dict.fromkeys(["config", "models", "losses", "tokenizers", "download"], 1),
    **dict.fromkeys(["data", "checkpoint"], 2),
    **dict.fromkeys(["distributed", "generation"], 3),
    **dict.fromkeys(["teachers", "training", "evaluation"], 4),
    **dict.fromkeys(["sweeps"], 5),
}
CLI_MAY_IMPORT = {
    "constants",
    "errors",
    "log",
    "paths",
    "escape",
    "_assets",
    "__init__",
    "config",
    "data",
    "download",
    "training",
    "_cli",
}

SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "_recipes" not in p.parts)
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def part_of(path: Path) -> str:
    """Name of the package or module right below kdtune/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names right below kdtune/ that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write kdtune.…"
            names += [
                f"{node.module}.{alias.name}" if node.module == "kdtune" else node.module or "" for alias in node.names
            ]
    return {name.split(".")[1] for name in names if name.startswith("kdtune.")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    for other in imported_parts(path) - {part}:
        if other == "__version__":
            continue
        if part in ("_cli", "__main__"):
            assert other in CLI_MAY_IMPORT, (
                f"_cli imports kdtune.{other}; it may reach recipes by path and torch only inside functions"
            )
        else:
            assert other in LAYERS and part in LAYERS, f"kdtune.{part} or kdtune.{other} has no layer"
            assert LAYERS[other] < LAYERS[part] or LAYERS[part] == 0, (
                f"kdtune.{part} (layer {LAYERS[part]}) imports kdtune.{other} (layer {LAYERS[other]})"
            )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_stand_alone(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert "recipes" not in {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}, (
        "a recipe imports another"
    )
    assert [n.name for n in tree.body if isinstance(n, ast.ClassDef)] == ["Config"], "one class, the frame"
    assert ast.get_docstring(tree)
    # The frame documents each of its keys; what is read as the recipe comes after it.
    assert len(text.splitlines()) - text.split("class Config")[1].split("@config.entry_point")[0].count("\n") <= 250


@pytest.mark.parametrize("path", SOURCES + RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 420, f"{len(lines)} lines: one room or two?"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring.splitlines())
            # A recipe's run is the one function that is read as a page.
            limit = 110 if path in RECIPES and node.name == "run" else 65
            assert length <= limit, f"{node.name} has {length} lines"


def test_only_config_load_imports_omegaconf() -> None:
    users = [p for p in SOURCES + RECIPES if "import omegaconf" in p.read_text() or "from omegaconf" in p.read_text()]
    assert users == [PACKAGE / "config" / "load.py"]


def test_import_kdtune_imports_nothing_heavy() -> None:
    code = "import sys, kdtune; print([m for m in ('torch', 'omegaconf', 'yaml', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
