"""The architecture as rules on the source: layers, heavy imports, forbidden calls, sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mera_ds"
LAYERS = (
    {
        *("errors", "files", "places", "settings", "mergeconfig", "config", "plan"),
        *("batch", "distributed", "log", "machine"),
    },
    {"media", "shards", "manifest", "checkpoint", "deltas", "identity", "registry", "doctor"},
    {"data", "model", "merge", "recipes", "pocket"},
    {"features", "plugin"},
    {"train", "evaluate"},
    {"methods"},
    {"sequence", "modality"},
    {"estimate", "report", "cli"},
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
PEERS_MAY_IMPORT = (0, 1, 7)
"""Layers whose units build on each other (never in a circle); in the others they may not."""
WITHOUT_TORCH = (
    *("errors", "files", "places", "settings", "mergeconfig", "config", "plan", "methods"),
    *("machine", "manifest", "media", "doctor", "estimate", "report", "cli"),
)
READ_TORCH_FILES = (
    *("mera_ds/pocket/", "mera_ds/model/official.py"),
    "mera_ds/recipes/torch_files.py",
)
"""Where files that others made with `torch.save` are imported."""
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "launch").glob("*.py"))]

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def label(path: Path) -> str:
    """Name a file in messages and test ids."""
    return str(path.relative_to(ROOT))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes, those below `if TYPE_CHECKING:` left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from [other, *statements(other)]
            continue
        yield child
        yield from statements(child)


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, in functions too."""
    found: set[str] = set()
    for node in statements(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}:{node.lineno} imports relatively"
            assert node.module is not None
            found |= {_module_of(node.module, alias.name) for alias in node.names}
    return found


def _module_of(module: str, name: str) -> str:
    """`from a.b import c` imports a.b.c if that is a module of ours, and a.b otherwise."""
    inner = ROOT.joinpath(*module.split("."), name)
    is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
    return f"{module}.{name}" if is_module else module


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "mera_ds"}


def unit(module: str) -> str:
    """Return the part of the package that a layer names; `mera_ds` itself is below all."""
    return [*module.split("."), ""][1]


def test_every_unit_of_the_package_is_in_the_table() -> None:
    units = {unit(module_name(path)) for path in MODULES} - {""}
    assert units == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_a_module_imports_only_lower_layers(path: Path) -> None:
    mine = unit(module_name(path))
    for name in own_imports(path):
        other = unit(name)
        if other in ("", mine):
            continue
        assert LEVEL[other] <= LEVEL[mine], f"{mine} imports {name} from a higher layer"
        if LEVEL[other] == LEVEL[mine]:
            assert LEVEL[mine] in PEERS_MAY_IMPORT, f"{mine} imports its peer {name}"


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module_name(path): {name for name in own_imports(path) if not _is_own_package(path, name)}
        for path in MODULES
    }
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' → '.join([*trail, module])}"
        if module not in finished:
            for other in graph[module]:
                visit(other, (*trail, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def _is_own_package(path: Path, name: str) -> bool:
    """A module may use what its package's `__init__` defined before it was imported."""
    return module_name(path).startswith(f"{name}.")


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=label)
def test_methods_know_only_configuration_and_plans(path: Path) -> None:
    known = {"methods", "config", "mergeconfig", "settings", "plan", "errors"}
    assert {unit(name) for name in own_imports(path)} <= known


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_it_imports_without_torch(name: str) -> None:
    result = _python(f"import mera_ds.{name}")
    assert result.returncode == 0, result.stderr


def test_help_is_printed_without_torch() -> None:
    result = _python("from mera_ds.cli import main; main(['--help'])")
    assert result.returncode == 0, result.stderr
    assert "usage: mera-ds" in result.stdout


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python in which every import of torch fails."""
    block = "import sys; sys.modules['torch'] = None; "
    return subprocess.run(
        [sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def users_of(package: str) -> set[str]:
    return {
        label(path)
        for path in SOURCES
        if any(name.split(".")[0] == package for name in imports(path))
    }


def test_only_the_engine_imports_deepspeed() -> None:
    assert users_of("deepspeed") == {"mera_ds/train/engine.py", "mera_ds/train/setup.py"}


def test_only_shards_know_tar_files() -> None:
    """But for the recipes that open the archives they get their sources from."""
    others = {name for name in users_of("tarfile") if not name.startswith("mera_ds/shards/")}
    assert others == {
        "mera_ds/recipes/official/sources.py",
        "mera_ds/recipes/pocket/sources.py",
    }


@pytest.mark.parametrize(
    "package", ["pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"]
)
def test_no_pickle(package: str) -> None:
    assert users_of(package) == set()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def argument(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_nothing_that_could_run_code_is_read(path: Path) -> None:
    for name, call in calls(path):
        place = f"{label(path)}:{call.lineno}"
        if name == "torch.load":
            assert label(path).startswith(READ_TORCH_FILES), place
            assert argument(call, "weights_only") == "True", place
        elif name in ("np.load", "numpy.load"):
            assert argument(call, "allow_pickle") == "False", place
        elif name == "yaml.load":
            assert argument(call, "Loader") == "_Loader", place
        elif name.startswith("Auto") and name.endswith(".from_pretrained"):
            assert argument(call, "trust_remote_code") in (None, "False"), place
            if label(path).startswith("mera_ds/model/"):
                assert argument(call, "local_files_only") == "True", place
        assert name not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), place
        assert argument(call, "shell") in (None, "False"), place


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_only_commands_print(path: Path) -> None:
    if label(path).startswith(("mera_ds/cli/", "launch/")):
        return
    printed = [call.lineno for name, call in calls(path) if name in ("print", "sys.stdout.write")]
    assert printed == []


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            first = min([node.lineno, *(entry.lineno for entry in node.decorator_list)])
            assert (node.end_lineno or 0) - first < 80, f"{node.name} is too long"
