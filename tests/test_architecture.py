"""The shape of the code: imports point one way, files and functions stay small, the light commands stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kdtune"

# docs/architecture.md: a package may import packages of lower layers only.
LAYERS: dict[str, int] = {
    **dict.fromkeys(
        [
            "constants",
            "errors",
            "log",
            "paths",
            "escape",
            "json_files",
            "gguf_file",
            "tensor_types",
            "_assets",
            "__init__",
        ],
        0,
    ),
    **dict.fromkeys(["config", "distributed", "models", "losses", "tokenizers", "download"], 1),
    **dict.fromkeys(["data", "checkpoint"], 2),
    **dict.fromkeys(["parallel", "generation", "runs"], 3),
    **dict.fromkeys(["teachers", "rollouts", "pruning", "planner"], 4),
    **dict.fromkeys(["training", "evaluation"], 5),
    **dict.fromkeys(["sweeps"], 6),
    **dict.fromkeys(["reports"], 7),
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
    "planner",
    "teachers",
    "training",
    "_cli",
}

# Lines of a file, and of a function without its docstring.
FILE_LINES, FUNCTION_LINES = 400, 60
# The training recipes are read in a few minutes: all of a file is counted.
RECIPE_LINES = {"knowledge_distillation.py": 150, "finetune.py": 120}

SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "_recipes" not in p.parts)
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def part_of(path: Path) -> str:
    """Name of the package or module right below kdtune/ that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> set[str]:
    """Dotted names that a module imports; a relative import is its dots and name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imported_parts(path: Path) -> set[str]:
    """Names right below kdtune/ that a file imports."""
    names = imported_modules(ast.parse(path.read_text()))
    assert not [name for name in names if name.startswith(".")], f"{path}: relative import; write kdtune.…"
    return {name.split(".")[1] for name in names if name.startswith("kdtune.")}


def forbidden_import(part: str, other: str) -> str | None:
    """Why the part of kdtune may not import the other one; None where it may."""
    if other in ("__version__", part):
        return None
    if part in ("_cli", "__main__"):
        allowed = other in CLI_MAY_IMPORT
        return (
            None if allowed else f"_cli imports kdtune.{other}; it may reach recipes by path and torch inside functions"
        )
    if not {part, other} <= LAYERS.keys():
        return f"kdtune.{part} or kdtune.{other} has no layer"
    # The single modules of the ground floor share it.
    if LAYERS[other] < LAYERS[part] or LAYERS[other] == LAYERS[part] == 0:
        return None
    return f"kdtune.{part} (layer {LAYERS[part]}) imports kdtune.{other} (layer {LAYERS[other]})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert not [reason for other in imported_parts(path) if (reason := forbidden_import(part_of(path), other))]


@pytest.mark.parametrize("path", [p for p in SOURCES if LAYERS.get(part_of(p)) == 0], ids=lambda p: p.name)
def test_the_ground_floor_needs_the_standard_library_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    packages = {name.split(".")[0] for name in imported_modules(tree)}
    assert packages <= {*sys.stdlib_module_names, "kdtune"}


@pytest.mark.parametrize(
    ("part", "other", "is_allowed"),
    [
        ("errors", "escape", True), ("training", "models", True), ("_cli", "config", True), ("data", "data", True),
        ("errors", "models", False), ("json_files", "config", False), ("models", "losses", False),
        ("models", "checkpoint", False), ("distributed", "checkpoint", False), ("_cli", "models", False), ("new", "errors", False),
    ],
)  # fmt: skip
def test_an_import_that_points_upwards_or_sideways_is_found(part: str, other: str, is_allowed: bool) -> None:
    assert (forbidden_import(part, other) is None) == is_allowed


def imported_recipes(tree: ast.AST) -> set[str]:
    """Imports of other recipes: from the checkout's folder, from the wheel's, relative, or as a script beside this one."""
    beside = "|".join(path.stem for path in RECIPES)
    return {name for name in imported_modules(tree) if re.match(rf"recipes\b|kdtune\._recipes\b|\.|({beside})\b", name)}


@pytest.mark.parametrize(
    "line",
    ["from recipes.finetune import run", "import recipes.finetune", "from recipes import finetune", "import finetune",
     "from finetune import run", "from . import finetune", "from kdtune._recipes.finetune import run", "from kdtune import _recipes"],
)  # fmt: skip
def test_an_import_of_a_recipe_is_found(line: str) -> None:
    assert imported_recipes(ast.parse(f"def f():\n    {line}"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipes_stand_alone(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert not imported_recipes(tree), "a recipe imports another"
    assert [n.name for n in tree.body if isinstance(n, ast.ClassDef)] == ["Config"], "one class, the schema"
    assert ast.get_docstring(tree)


FAMILY_FILES = ("gemma", "granite", "llama", "mistral", "olmo", "phi", "qwen", "smollm3")
# What reads, writes, spreads, plans and prunes a model asks its config for the family; the decoder itself knows none.
FAMILY_BLIND = [
    path
    for path in SOURCES
    if part_of(path)
    in ("checkpoint", "distributed", "parallel", "teachers", "training", "planner", "pruning", "losses", "generation")
    or (part_of(path) == "models" and path.stem not in (*FAMILY_FILES, "families", "known_families", "builders"))
]


def named_families(tree: ast.AST) -> set[str]:
    """Identifiers and strings, not docstrings, that name a model family. llama.cpp is a program, llama3 a rope_type."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs}
    found |= {getattr(n, key, None) for n in ast.walk(tree) for key in ("id", "attr", "name", "arg", "module")}
    return {
        text
        for text in found
        if isinstance(text, str)
        and re.search(r"(?i)(llama|mi(ni)?stral|olmo|qwen|gemma|granite|smollm|phi3)(?!3\b|\.cpp|-gguf)", text)
    }


@pytest.mark.parametrize("path", FAMILY_BLIND, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_a_familys_own_file_names_it(path: Path) -> None:
    assert not named_families(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "line", ["from kdtune.models.llama import LLAMA", "from kdtune.models import llama", "convert = models.LLAMA.hf_keys",
             "keys['llama.vocab_size']", "architecture == 'LlamaForCausalLM'"],
)  # fmt: skip
def test_a_named_family_is_found(line: str) -> None:
    assert named_families(ast.parse(line))
    assert not named_families(ast.parse('def f():\n    """As in Llama."""\n    raise ValueError("use llama.cpp")'))


@pytest.mark.parametrize("path", SOURCES + RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    of_recipe = path.name if path in RECIPES else ""
    assert len(lines) <= RECIPE_LINES.get(of_recipe, FILE_LINES), f"{len(lines)} lines: one room or two?"
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring.splitlines())
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize(
    "part", ["distributed", "models", "losses", "tokenizers", "checkpoint", "parallel", "generation"]
)
def test_what_models_are_built_and_run_with_takes_objects(part: str) -> None:
    """Config nodes are for recipes, the functions that take their `cfg`, and checks of it."""
    users = [path for path in SOURCES if part_of(path) == part and "config" in imported_parts(path)]
    assert users == ([PACKAGE / "parallel" / "checks.py"] if part == "parallel" else [])


def test_only_config_load_imports_omegaconf() -> None:
    users = [p for p in SOURCES + RECIPES if "import omegaconf" in p.read_text() or "from omegaconf" in p.read_text()]
    assert users == [PACKAGE / "config" / "load.py"]


@pytest.mark.parametrize("module", ["kdtune", "kdtune._cli.main"])
def test_what_starts_every_command_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'omegaconf', 'yaml', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_slow_test_says_why() -> None:
    for path in ROOT.glob("tests/**/*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        marks = {
            node.lineno for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow"
        }
        explained = {
            node.lineno
            for node in nodes
            if isinstance(node, ast.Call)
            and re.fullmatch(r"pytest\.mark\.slow\((['\"])(\S+ +){4,}\S+\1\)", ast.unparse(node))
        }
        assert marks == explained, (
            f'{path}: @pytest.mark.slow("reason") says in a sentence why `make test` does without it'
        )


def test_a_recipe_imports_little() -> None:
    """Files of kdtune that importing the KD recipe takes, before a run needs more; the limit only goes down."""
    code = (
        "import runpy, sys; runpy.run_path('recipes/knowledge_distillation.py', run_name='recipe'); "
        "print(sum(name.partition('.')[0] == 'kdtune' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 80
