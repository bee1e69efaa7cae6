"""The host's end without a sandbox: which programs count as the same."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.sandbox.host.limits import Limits
from fractal.sandbox.host.program_key import normal_form, program_key

LINES = [
    "x = 1", "y = 'a#b'", 'z = "it\'s # no comment"', "if x:", "    y = 2", "def f(a):", "    return a", "s = '\\'#'",
    "t = 'a\\\\'", "u = [1,", "     2]", "v = ''", "w = f'{x}#'", 'd = """a', '# b"""', "r = r'\\'", "k = x + \\", "  1",
    "q = x + \\ ",
]  # fmt: skip
COMMENTS = ["", "  ", "\t", "# c", "  # it's", '#"""', "# \\", "\n", "\n\n# d", "\f", "\r"]
programs = st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(COMMENTS)), max_size=6).map(
    lambda pairs: "\n".join(line + comment for line, comment in pairs)
)


def meaning(text: str) -> object:
    """What the compiler makes of a program, line numbers aside; None if it does not compile."""
    try:
        return _bare(compile(text, "<program>", "exec", dont_inherit=True))
    except (SyntaxError, ValueError):
        return None


def _bare(code: types.CodeType) -> types.CodeType:
    constants = tuple(_bare(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_linetable=b"", co_firstlineno=1, co_consts=constants)


@given(programs, programs)
def test_programs_of_one_normal_form_mean_the_same(one: str, other: str) -> None:
    assert meaning(normal_form(one)) == meaning(one)
    if normal_form(one) == normal_form(other):
        assert meaning(one) == meaning(other)


@pytest.mark.parametrize(
    "other",
    [
        "def f(x):\n    return x\n\n\n",
        "\n# a comment\ndef f(x):  # another\n    # and one more\n    return x",
        "def f(x):   \r\n\r\n    return x\r\n",
    ],
)
def test_comments_and_layout_do_not_make_another_program(other: str) -> None:
    assert program_key(b"p", other) == program_key(b"p", "def f(x):\n    return x\n")


@pytest.mark.parametrize(
    "other", ["def f(x):\n  return x\n", "def f(y):\n    return y\n", "def f(x):\n    return 'x'\n"]
)
def test_other_programs_are_others(other: str) -> None:
    assert program_key(b"p", other) != program_key(b"p", "def f(x):\n    return x\n")


def test_the_same_program_for_another_problem_is_another_one() -> None:
    assert program_key(b"p", "x") != program_key(b"q", "x")


@pytest.mark.parametrize("bad", [{"cpu_s": 0}, {"wall_s": -1}, {"memory_mib": 1}, {"file_mib": 0}, {"cpu_s": 1e9}])
def test_limits_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Limits(**bad)  # type: ignore[arg-type]
