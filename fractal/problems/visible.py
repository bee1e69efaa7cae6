"""The test that a prompt shows: an example, by which no other test is given away."""

from fractal.problems.values import decode_value
from fractal.records import Problem

LONGEST = 2000  # characters; a longer example is none


def visible_test(problem: Problem) -> str:
    """The first test as people would write it; "" where there is none to show, as of a check script.

    >>> visible_test(Problem("1", "", "", ["[1,2]"], "", "f", "test", kind="calls", expected=["3"]))
    'f(1, 2) == 3'
    """
    if problem.kind == "asserts":
        return "" if problem.prefix else problem.tests[0]  # a script holds all the tests
    if not problem.expected:
        return ""
    if problem.kind == "stdin":
        text = f"Input:\n{problem.tests[0].rstrip()}\nOutput:\n{problem.expected[0].rstrip()}"
    else:
        try:
            arguments = ", ".join(map(repr, decode_value(problem.tests[0])))
            text = f"{problem.entry_point}({arguments}) == {decode_value(problem.expected[0])!r}"
        except ValueError:
            return ""
    return text if len(text) <= LONGEST else ""
