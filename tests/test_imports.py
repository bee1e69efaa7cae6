"""Imports point one way (docs/architecture.md), and the heavy packages are loaded only where they are used."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "vllm", "transformers", "matplotlib", "sklearn", "scipy", "datasets"}
PACKAGE = ROOT / "fractal"
STAGES = ["generate", "verify", "critic", "selection", "report"]
# Modules that run a stage: only __main__, and the stage's own package, may import them.
STAGE_MODULES = {f"fractal.{name}.stage" for name in STAGES} | {
    "fractal.critic.train_stage",
    "fractal.critic.score_stage",
}
WATCHDOG = "fractal.cloud.watchdog_service"  # sent to instances as it is
SHARED = {"records", "errors", "jsonl", "rundir", "console", "options"}
# What each package may import beside itself and the shared modules.
MAY_IMPORT = {
    "__main__": {
        "problems",
        "generate",
        "sandbox",
        "verify",
        "critic",
        "selection",
        "report",
        "install",
        "images",
        "server",
        "audit",
    },
    "problems": {"sandbox"},  # what calls are made of: inside/protocol.py
    "generate": {"problems", "install"},
    "sandbox": {"install"},
    "verify": {"problems", "generate", "sandbox", "install"},
    "critic": {"problems", "generate", "install"},
    "selection": set(),
    "report": {"problems", "generate", "selection"},
    "rewards": {"problems", "generate", "sandbox"},
    "server": {"problems", "generate", "sandbox", "rewards"},
    "audit": set(),
    "images": {"install", "sandbox"},
    "cloud": {"images", "install", "problems"},
    "install": set(),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, *, at_start: bool = False) -> set[str]:
    """The names of the modules that a file imports; with `at_start`, those imported when it is loaded."""
    tree = ast.parse(path.read_text())
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if at_start and id(node) in late:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else node.module or "")
    return names


def test_imports_between_packages_point_one_way() -> None:
    wrong = []
    for name, path in MODULES.items():
        package = name.split(".")[1] if "." in name else ""
        if not package or package in SHARED:
            continue
        for other in imported(path):
            target = other.split(".")[1] if other.startswith("fractal.") else ""
            if target and target not in SHARED | {package} | MAY_IMPORT[package]:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_stage_imports_another_stages_module_that_runs_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imported(path) & STAGE_MODULES
        if name != "fractal.__main__" and name.split(".")[1] != other.split(".")[1]
    ]
    assert wrong == []


def test_there_is_no_import_circle_even_among_late_imports() -> None:
    edges = {name: {other for other in imported(path) if other in MODULES} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_what_runs_in_the_sandbox_and_what_set_up_needs_import_the_standard_library_and_their_own_package() -> None:
    seen = set()
    todo = [name for name in MODULES if name.startswith("fractal.sandbox.inside")]
    todo += ["fractal.install.setup", WATCHDOG]
    wrong = []
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        own = "fractal.sandbox.inside" if ".inside" in name else "fractal.install"
        for other in imported(MODULES[name], at_start=True):
            if other.startswith(own):
                todo.append(other)
            elif other.split(".")[0] not in sys.stdlib_module_names:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_the_watchdog_is_read_by_the_python_of_old_images() -> None:
    ast.parse(MODULES[WATCHDOG].read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    "modules",
    [
        "fractal.__main__, fractal.rundir, fractal.selection.stage, fractal.report.stage",
        "fractal.generate.stage, fractal.verify.stage, fractal.critic.train_stage, fractal.critic.score_stage",
        "fractal.cloud.run_commands, fractal.cloud.instance_commands, fractal.cloud.guard",
    ],
    ids=["command line", "stages with nothing to do", "the operator's laptop"],
)
def test_nothing_heavy_is_imported_by(modules: str) -> None:
    code = f"import sys, {modules}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folder_docker_hides_no_package() -> None:
    assert not (ROOT / "docker/__init__.py").exists()
    import docker

    assert docker.from_env is not None


def test_verify_asks_for_its_container_before_it_imports_what_takes_long(tmp_path: Path) -> None:
    """Whatever is imported before is waited for before the container begins to start."""
    samples = tmp_path / "samples.jsonl"
    samples.touch()
    words = ["verify", "--problems", "P", "--samples", str(samples), "--out", str(tmp_path / "labels.jsonl")]
    code = (
        "import os, sys\n"
        "from fractal.__main__ import run_command\n"
        "from fractal.sandbox.host import launch\n"
        "def asked(self, **options):\n"
        "    known = {name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "    print(sorted(name for name in known if not name.startswith('_')), len(sys.modules), flush=True)\n"
        "    os._exit(0)\n"
        "launch.ContainerAhead.__init__ = asked\n"
        f"run_command({words!r})\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment())
    found, count = done.stdout.rsplit(" ", 1)
    assert set(ast.literal_eval(found)) <= {"annotated_doc", "fractal", "shellingham", "typer", "typing_extensions"}
    assert int(count) < 220


def environment() -> dict[str, str]:
    """This environment's packages without the modules that their .pth files import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
