"""Who may import what: the laptop needs no torch, the sandbox image nothing but the standard library."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "vllm", "transformers", "matplotlib", "sklearn", "scipy", "datasets"}


@pytest.mark.parametrize("module", ["fractal.__main__", "fractal.verify", "fractal.run", "fractal.generate", "fractal.train", "fractal.score", "fractal.doctor"])  # fmt: skip
def test_a_stage_with_nothing_to_do_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["fractal.chain", "fractal.rented", "fractal.cloud.guard"])
def test_the_operators_laptop_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


STAGES = {"generate", "verify", "train", "score", "selection", "report", "critic"}


@pytest.mark.parametrize(("room", "others"), [("cloud", {"images", *STAGES}), ("images", {"cloud", *STAGES})])
def test_rooms_do_not_import_each_other(room: str, others: set[str]) -> None:
    for path in (ROOT / "fractal" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                found += [f"{node.module}.{a.name}" for a in node.names]
            assert (
                not {word for name in found if name.startswith("fractal.") for word in name.split(".")[1:2]} & others
            ), path


def test_what_runs_in_the_sandbox_imports_the_standard_library_and_its_own_folder() -> None:
    from fractal.sandbox import source

    for name in source.files():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in found:
                assert module.startswith("fractal.sandbox") or module.split(".")[0] in sys.stdlib_module_names, (
                    name,
                    module,
                )


@pytest.mark.slow
@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy", "--strict"]])
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_folder_docker_hides_no_package() -> None:
    assert not (ROOT / "docker/__init__.py").exists()
    import docker

    assert docker.from_env is not None
