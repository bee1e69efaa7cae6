"""Which names of a test belong to the program, and what the judge keeps for itself."""

import math
import sys
from typing import Any

import pytest

from fractal.sandbox.inside import candidate_seccomp
from fractal.sandbox.inside.suite import prepare


def problem(reference: str, *tests: str, setup: str = "", entry_point: str = "f") -> dict[str, Any]:
    found = {"reference": reference, "tests": list(tests), "setup": setup, "entry_point": entry_point}
    return {"kind": "asserts", **found}


def test_a_builtin_in_a_test_is_never_the_programs() -> None:
    assert prepare(problem("def f(x): return x", "assert set(f([1])) == set([1])")).names == ["f"]


def test_an_entry_point_may_have_a_builtins_name() -> None:
    found = prepare(problem("def sum(a, b): return a", "assert sum(1, 2) == 1", entry_point="sum"))
    assert found.names == ["sum"]


def test_helper_classes_of_the_reference_are_the_programs() -> None:
    found = prepare(problem("class Pair: pass\ndef f(x): return 1", "assert f([Pair()]) == 1"))
    assert found.names == ["Pair", "f"]


def test_a_module_that_the_reference_imports_is_the_judges_own() -> None:
    found = prepare(problem("import sys\ndef f(x): return 1", "assert f(1) == sys.getsizeof(1)"))
    assert found.own == {"sys": sys}
    assert found.names == ["f", "sys"]


def test_names_from_an_import_are_the_judges_own() -> None:
    found = prepare(
        problem("from math import pi, sqrt as root\ndef f(x): return x", "assert f(4) == root(16) < pi + 1")
    )
    assert found.own == {"pi": math.pi, "root": math.sqrt}


def test_a_package_that_the_reference_imports_is_the_judges_own_where_a_test_uses_it() -> None:
    import numpy

    reference = "import numpy as np\nimport os.path\nimport no_such_module as x\ndef f(x): return x"
    found = prepare(problem(reference, "assert np.allclose(f(1), os.path.sep) and x.y"))
    assert found.own["np"] is numpy
    assert found.own["os"].__name__ == "os"
    assert "x" not in found.own
    assert set(found.names) == {"f", "np", "os", "x"}


def test_names_that_setup_or_test_bind_are_not_looked_up_in_the_program() -> None:
    found = prepare(problem("def f(x): return x", "for case in data:\n    assert f(case) == case", setup="data = [1]"))
    assert found.names == ["f"]


def test_imports_and_names_of_the_setup_reach_the_program() -> None:
    found = prepare(problem("def f(x): return x", "assert f(1) == 1", setup="import math\nimport subprocess\nx = 1"))
    assert found.given.lines == ["import math", "x = 1"]


def test_tests_that_are_not_python_are_a_syntax_error() -> None:
    with pytest.raises(SyntaxError):
        prepare(problem("def f(): pass", "assert f( =="))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_whole_program_with_jumps_inside_it(machine: str) -> None:
    """Every classic BPF jump lands on an instruction, and the last one returns."""
    import struct

    raw = candidate_seccomp.seccomp_filter(machine)
    lines = [struct.unpack_from("HBBI", raw, at) for at in range(0, len(raw), 8)]
    for place, (code, yes, no, _) in enumerate(lines):
        if code & 0x07 == 0x05:
            assert place + 1 + max(yes, no) < len(lines)
    assert lines[-1][0] == 0x06


def test_a_machine_without_known_numbers_has_no_filter() -> None:
    with pytest.raises(KeyError):
        candidate_seccomp.seccomp_filter("vax")


def test_system_call_numbers_agree_with_the_kernels_headers() -> None:
    """Every number of this machine's table, against <asm/unistd.h> as the C compiler sees it."""
    import platform
    import re
    import shutil
    import subprocess

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    done = subprocess.run([compiler, "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", "/dev/null"], capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        pytest.skip("no kernel headers")
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", done.stdout)}
    table = candidate_seccomp.FORBIDDEN[platform.machine()] | {
        "clone": candidate_seccomp.CLONE[platform.machine()],
        "socketpair": candidate_seccomp.SOCKETPAIR[platform.machine()],
        "sendto": candidate_seccomp.SENDTO[platform.machine()],
        "clone3": candidate_seccomp.CLONE3,
    }
    assert {name: number for name, number in table.items() if name in known} == {
        n: known[n] for n in table if n in known
    }
    assert len(table.keys() & known.keys()) > 40
