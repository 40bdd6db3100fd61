"""The rules of the house, read from the source: what may import what, and what no file may do."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("hpc/**/*.py"), *ROOT.glob("galdist/**/*.py")])
SPECTRAL = {"galdist/simulations/cola.py", "galdist/statistics/spectra.py"}

DOORS = {
    "torch.distributed": {"hpc/ddp.py"},
    "submitit": {"hpc/slurm.py"},
    "dask_jobqueue": {"hpc/cluster.py"},
    **{
        f"{package}.{kind}": {"hpc/cluster.py"}
        for package in ("distributed", "dask.distributed")
        for kind in ("Client", "LocalCluster", "SpecCluster", "SSHCluster", "Scheduler", "Worker", "Nanny")
    },
    "mpi4py": {"hpc/mpi.py"},
    "nbodykit": SPECTRAL,
    "pmesh": SPECTRAL,
}
"""Module, or a name in one -> the only files that may use it."""

INSIDE_FUNCTIONS = {"nbodykit", "pmesh", "mpi4py", "matplotlib", "distributed", "dask.distributed"}
"""Never at the top of a module: importing them changes the process, or costs a command line too much."""
LIGHT = {"galdist/cli.py", "galdist/__init__.py", "galdist/__main__.py"}
"""What `galdist --help` imports: nothing at their top but the standard library, typer and galdist itself."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether inside a function; imports for types alone are left out."""
    for child in ast.iter_child_nodes(node):
        if only_for_types(child):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield child.module or "", inside
            yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
        else:
            yield from imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@cache
def reached(path: Path) -> set[str]:
    """Attributes of all kinds, as they are written."""
    return {ast.unparse(node) for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}


def uses(path: Path, package: str) -> bool:
    """Imported, or reached through its parent as ``torch.distributed`` is."""
    return any(within(module, package) for module, _ in imports(tree(path))) or (
        "." in package and any(within(text, package) for text in reached(path))
    )


def test_there_is_something_to_check() -> None:
    assert {"hpc/launch.py", "galdist/pipeline.py"} <= {name(path) for path in FILES}


@pytest.mark.parametrize("package", DOORS)
def test_one_door_for_each_runtime(package: str) -> None:
    users = {name(path) for path in FILES if uses(path, package)}
    assert users <= DOORS[package], f"only {sorted(DOORS[package])} may use {package}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_hpc_knows_no_galaxies(path: Path) -> None:
    if name(path).startswith("hpc/"):
        found = [module for module, _ in imports(tree(path)) if within(module, "galdist")]
        assert not found, "galdist imports hpc, never the reverse"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_is_imported_late(path: Path) -> None:
    plots = ("galdist/report/plots.py", "galdist/report/halo_plots.py")
    allowed = {"matplotlib"} if name(path) in plots else set()
    found = [
        module
        for module, inside in imports(tree(path))
        if not inside and any(within(module, package) for package in INSIDE_FUNCTIONS - allowed)
    ]
    assert not found, "import it inside the function that needs it"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_command_line_starts_light(path: Path) -> None:
    import sys

    if name(path) not in LIGHT:
        return
    found = {module.partition(".")[0] for module, inside in imports(tree(path)) if not inside}
    assert found <= {*sys.stdlib_module_names, "typer", "galdist"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_orchestrator_does_not_import_stages(path: Path) -> None:
    """They are named by strings; their modules are loaded to check their configuration, and nowhere else."""
    orchestrator = {"cli", "config", "display", "pipeline", "plan", "provenance", "stages", "status"}
    if path.parent.name != "galdist" or path.stem not in orchestrator:
        return
    science = [
        module
        for module, _ in imports(tree(path))
        if within(module, "galdist")
        and len(module.split(".")) > 2
        and (ROOT / "galdist" / module.split(".")[1]).is_dir()
    ]
    assert not science


@pytest.mark.parametrize("path", FILES, ids=name)
def test_errors_are_not_swallowed(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: say which errors"
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            caught = ast.unparse(node.type)
            assert not (silent and caught in ("Exception", "BaseException")), f"line {node.lineno}"
            assert not any(isinstance(s, ast.Pass) for s in node.body), (
                f"line {node.lineno}: contextlib.suppress"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            broad = {ast.unparse(argument) for argument in node.args} & {"Exception", "BaseException"}
            assert not broad, f"line {node.lineno}: suppresses everything"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_from_elsewhere_cannot_run_code(path: Path) -> None:
    loads_unsafe = {
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "yaml.load_all",
        "eval",
        "exec",
        "os.system",
    }
    for text, call in calls(path):
        assert text not in loads_unsafe, f"line {call.lineno}: {text}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if text == "torch.load":
            assert keywords.get("weights_only") == "True", (
                f"line {call.lineno}: torch.load without weights_only"
            )
        if text in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle", "False") == "False", f"line {call.lineno}"
        assert keywords.get("shell", "False") == "False", f"line {call.lineno}: a shell"
    found = [
        m for m, _ in imports(tree(path)) if m.partition(".")[0] in ("pickle", "dill", "joblib", "marshal")
    ]
    assert not found, "pickles run code when they are read"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nobody_listens_to_the_network(path: Path) -> None:
    """Servers bind to loopback unless told otherwise."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "0.0.0.0" not in node.value, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_public_names_are_documented(path: Path) -> None:
    source = tree(path)
    assert ast.get_docstring(source) or not source.body, "a module says what it is for"
    for node in source.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            members = node.body if isinstance(node, ast.ClassDef) and not node.bases else []
            for member in members:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    plain = any(ast.unparse(mark).endswith("property") for mark in member.decorator_list)
                    assert ast.get_docstring(member) or plain, f"{node.name}.{member.name} has no docstring"


def test_stages_are_named_by_their_place() -> None:
    """Every stage of the table is a function of that name in that file."""
    from galdist.stages import STAGES

    for stage in STAGES.values():
        module, _, function = stage.function.partition(":")
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        defined = {node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)}
        assert function in defined, f"{stage.function} is not there"
