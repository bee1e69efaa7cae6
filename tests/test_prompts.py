"""From a problem to a prompt, and from a chat reply to the program in it."""

import ast
import json
import time
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import extraction
from fractal.generate import prompts
from fractal.generate.answer import INVISIBLE
from fractal.generate.extraction import _longest_program, extract_code
from fractal.generate.fences import FENCE_MARKS, fenced_blocks
from fractal.generate.self_tests import without_self_tests
from fractal.problems.syntax import is_python
from fractal.records import Problem

F = "def f(a):\n    return a\n"
HEAD = "import sys\n\nsys.setrecursionlimit(5000)\n\n\ndef f(x):\n    return g(x)\n\n\ndef g(x):\n    return x * 2\n"


SELF_TESTS = [
    "assert f(1) == 3, 'no'\n",
    "print(f(1))\nprint(\n    f(2)\n)\n",
    'if __name__ == "__main__":\n    print(f(int(input())))\n',
    "f(None)\n",
    "assert f(1) == [\n    1,\n]\n",
    "assert f(1) == (1",  # cut at max_tokens
    "# Test cases\nassert f(1) == 'abc",
]


def test_a_models_own_tests_are_left_out() -> None:
    kept = {tests: extract_code(f"```python\n{HEAD}\n{tests}```", "f").strip() for tests in SELF_TESTS}
    assert [tests for tests, code in kept.items() if code != HEAD.strip()] == []


PAIRS = "def count_pairs(nums):\n    return len(nums) // 2\n"


BROKEN_TESTS = [
    # replies of Qwen2.5-Coder-0.5B, shortened: task 142, cut; 65, its test does not parse; 103; 592; 781
    "# Function to check the correctness\ndef check_function():\n    assert count_pairs([1,2,3,",
    "# Checks it\ndef check():\n    assert count_pairs(([1, 2]) == 1\n\n# Running the check\ncheck()\n",
    'def check_pairs():\n    assert count_pairs([3]) == 0, "Test case 1 failed"\n    print("',
    "# Check function\nassert count_pairs([3]) == 0\n\n# Another one\n# of two lines\nassert count_pairs([]) == 0",
    "# Test the function\nassert count_pairs([3]) == 0\n\n# Example usage:\nresult = count_pairs([1,",
    "assert count_pairs([3]) == 0\nclass Test(TestCase):\n    @",
]


def test_what_a_model_adds_to_test_its_program_does_not_break_it() -> None:
    wrong = []
    for rest in BROKEN_TESTS:
        for end in ("\n", "\n```"):
            if extract_code(f"```python\n{PAIRS}\n{rest}{end}", "count_pairs").strip() != PAIRS.strip():
                wrong.append(rest + end)
    assert wrong == []


ENTRY_POINTS = ["class f:\n    pass\n", "f = lambda a: a\n", "def f_of(a):\n    return a\n"]


def test_tests_are_left_out_whatever_the_entry_point_is() -> None:
    reply = "```python\n{}# Check it\nassert f(1) == 1\n```"
    assert [code for code in ENTRY_POINTS if extract_code(reply.format(code), "f") != code] == []


NO_PYTHON = [
    "def f(a):\n    return a))\n\nassert f(1) == 1\n",  # task 560
    "def f(a):\n    return a\n)\n",
    "def f(a):\n    x = [1,\ndef g():\n    pass\n",
    "import\n\ndef f(a):\n    return a\n\nassert f(1) == 1\n",
    "def g(a):\n    return (\n",
]


def test_a_program_that_does_not_parse_is_not_repaired() -> None:
    assert [code for code in NO_PYTHON if extract_code(f"```python\n{code}```", "f") != code] == []


def test_a_check_function_may_stay_but_is_not_called() -> None:
    code = "def f(x):\n    return x\ndef check():\n    assert f(1) == 2\n"
    assert extract_code(code + "check()\n", "f") == code


KEPT = [
    "print('a')\ndef f(x): return x\n",
    "def f(x): return x\nf.cache = {}\nf.cache.clear()\n",
    "x = 1; assert x\n",
    "def f(x):\n    return (",
]


def test_nothing_else_is_left_out() -> None:
    assert [code for code in KEPT if extract_code(f"```python\n{code}\n```", "f").strip() != code.strip()] == []


def test_a_longer_fence_may_hold_a_shorter_one() -> None:
    code = 'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x\n'
    assert extract_code(f"````python\n{code}````", "f") == code


def test_only_prose_is_kept_for_the_verifier_to_judge() -> None:
    assert extract_code("I cannot do that.", "f") == "I cannot do that."


def test_extraction_survives_what_breaks_parsers() -> None:
    for text in ("(" * 100_000, "-" * 100_000 + "1", "x = " + "[" * 5000, "1+" * 50_000 + "1", "a\0b"):
        extract_code(text, "f")


def test_a_prompt_shows_the_first_test_only_and_opens_the_fence() -> None:
    def template(messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    problem = Problem("1", "Double it.", F, ["assert f(1) == 2", "assert f(7) == 14"], "", "f", "test")
    text = prompts.render(problem, template)
    assert text.startswith("<user>Double it.")
    assert text.endswith("<assistant>```python\n")
    assert "assert f(1) == 2" in text
    assert "14" not in text
    assert F not in text


G = "def g(a):\n    return f(a) + 1\n"


DOC = 'def f(a):\n    """Echo.\n\n    ```\n    f(1)\n    ```\n    """\n    return a\n'


TRAPS = [
    (f"```python\n{F}```", F),
    (f"```py\n{F}```", F),
    (f"```python title=x\n{F}```", F),
    (f"```\n{F}```", F),
    (f"```Python3 \n{F}``` \n", F),
    (f"~~~python\n{F}~~~", F),
    (f"~~~python\n{F}", F),
    (f"Sure! Here it is:\n\n```python\n{F}```\nIt returns its argument, don't you think?", F),
    (f"````python\n{F}```\nnot the end\n````", F),
    (f"```python\n{F}", F),
    (f"```python\n{F}``", F),
    (f"```python\n{F}```".replace("\n", "\r\n"), F),
    # several blocks
    (f"```python\n{G}```\nand\n```python\n{F}```", F),
    (f"```bash\npip install f\n```\n```python\n{G}```", G),
    (f"```\nf(1)\n```\n```\n{G}```", G),
    (f"First:\n```python\n{F}```\nUse it:\n```python\nf(1)\n```\nIt prints:\n```text\n1\n```", F),
    (f"```python\nf(1) == f (1)\n```\n```python\n{F}```", F),
    ("```python\nclass f:\n    pass\n```", "class f:\n    pass\n"),
    ("```python\nf = lambda a: a\n```", "f = lambda a: a\n"),
    ("```python\nasync def f(a): pass\n```", "async def f(a): pass\n"),
    # fences where a naive reader trips
    (f"```python\n{DOC}```", DOC),
    (DOC, DOC),
    (f"{DOC}\nmark = '```'\n", f"{DOC}\nmark = '```'\n"),
    ("```python\ns = '```'\ndef f(a): pass\n``` x\n```", "s = '```'\ndef f(a): pass\n``` x\n"),
    (f"```python\n```python\n{F}```", F),
    (f"```python\n\n```\n```python\n{F}```", F),
    ("1. Write it:\n\n   ```python\n   def f(a):\n       return a\n   ```\n2. Use it.", F),
    ("- So:\n\n\t```python\n\tdef f(a):\n\t    return a\n\t```\n", F),
    (f"Here is the code: ```python\n{F}```\nThis works.", F),
    (f"Here is the code: ```python\n{F}```\n```python\nf(1)\n```", F),
    # no fence
    (F, F),
    (f"Here is the function:\n\n{F}", F),
    (f"Here is the function:\n\n{F}\nIt's simple, isn't it?", F),
    (f"import of goods\nfrom the shop:\nimport math\n{F}", f"import math\n{F}"),
    (f"x = the argument, so\n{F}\nx = done, so there", F),
    (f"Here:\n\n@cache\n{F}", f"@cache\n{F}"),
    ("I cannot do that.", "I cannot do that."),
    ("", ""),
    ("```python\n```", ""),
    ("```python\n", ""),
]


def test_the_program_is_found_where_a_naive_reader_trips():
    assert [reply for reply, code in TRAPS if extract_code(reply, "f") != code] == []


def test_an_entry_point_is_no_pattern():
    assert extract_code("```\ndef f(): pass\n```\n```python\nx\n```", ".*") == "x\n"


# Pieces of which replies and programs consist, well formed or not.
LINES = st.sampled_from(
    [
        "def f(a):",
        "    return a",
        "    '''text",
        "    '''",
        "",
        "# ``",
        "x = (1,",
        ")",
        "@cache",
        "class A:",
        "    pass",
        "import math",
        "if x:",
        "else:",
        "s = '\\d'",
        "\u2028",
        "Sure, here it's:",
        "Thanks",
        "\tx = 1",
        "\x0c",
        "\\",
    ]
)


FENCES = st.sampled_from(["```", "```python", "~~~", "   ```", "````", "text ```python", "``` x", "        ```", "\r"])


PROSE = st.lists(st.sampled_from(["Sure! Here it is:", "", "It's simple.", "1. Call `f`."]), max_size=3).map("\n".join)


PROGRAMS = st.lists(LINES, min_size=1, max_size=12).map(lambda lines: "\n".join(lines) + "\n")


@settings(deadline=None)
@given(PROGRAMS | st.text(min_size=1), PROSE, PROSE, st.sampled_from(["```", "~~~", "`````"]))
@example("def f(): 0\n", "", "", "```")
def test_a_fenced_program_comes_back_without_its_tests(program, before, after, fence):
    code = program.replace("\r", "\n").rstrip("\n") + "\n"
    if FENCE_MARKS.search(code) or not code.strip() or code.lstrip("\n")[0] in INVISIBLE + " \t":
        return
    for opening in (f"{fence}python", fence):
        reply = f"{before}\n{opening}\n{code}{fence}\n{after}"
        assert fenced_blocks(reply) == [(opening.strip("`~"), code, True)]
        if fence != "~~~" or not is_python(reply):
            found = extract_code(reply, "f")
            if is_python(code):
                assert found == without_self_tests(code, "f")
            else:
                lines = iter(code.split("\n"))
                assert all(line in lines for line in found.split("\n")), "not repaired, at most cut"


@given(st.lists(LINES | FENCES, max_size=15).map("\n".join) | st.text() | st.text(alphabet="`~ \npydef():x=1"))
@settings(max_examples=300, deadline=None)
def test_any_reply_gives_some_program(reply):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        code = extract_code(reply, "f")
        assert isinstance(code, str)
        if is_python(code) and "~~~" not in code:
            assert extract_code(code, "f") == code, "a program is its own extraction"
    assert not seen, "a program's warnings are not the user's"


@settings(deadline=None)
@given(st.lists(LINES | st.sampled_from(["def g():", "f(1)", "assert f(", "# Test"]), max_size=12).map("\n".join))
def test_lines_are_only_ever_left_out(code):
    found = without_self_tests(code, "f")
    rest = iter(code.split("\n"))
    assert all(line in rest for line in found.rstrip("\n").split("\n")), "the lines that stay, in their order"
    assert found == code or is_python(found)


def longest_by_trying_all(text):
    lines = text.split("\n")
    for end in range(len(lines), 0, -1):
        try:
            ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError):
            continue
        return "\n".join(lines[:end]).rstrip() + "\n"
    return ""


@pytest.mark.filterwarnings("ignore")
@given(st.lists(LINES, min_size=1, max_size=12).map("\n".join))
@settings(max_examples=300, deadline=None)
def test_the_longest_program_is_the_longest(text):
    assert _longest_program(text)[0].strip() == longest_by_trying_all(text).strip()


def test_long_replies_are_no_burden():
    reply = "x = the\n" * 5_000 + F + "so it's\n" * 5_000
    assert isinstance(extract_code(reply, "f"), str)
    assert extract_code("Well:\n" + F + "so it's\n" * 5_000, "f") == F
    endless = F + "@g\n" * 5_000  # each cut takes one line and breaks again
    assert extract_code(f"```python\n{endless}```", "f") == endless


LONG = {  # each took more than 15 s, some minutes, in one version or another of the code
    "backticks": "`" * 50_000 + "x y",
    "spaces behind a fence": "```" + " " * 50_000 + "x y`",
    "line separators": "```\n" + "\u2028" * 50_000 + "x",
    "tags in tags": "<answer>" * 5_000,
    "calls of helpers": F + "".join(f"def g{i}(a):\n    return g{i - 1}(a)\ng{i}(1)\n" for i in range(1, 300)),
    "asserts": F + "".join(f"x{i} = f({i})\nassert x{i} == {i}\n" for i in range(500)),
    "blocks that need the next": "".join(f"```python\ndef g{i}(a):\n    return g{i + 1}(a)\n```\n" for i in range(200))
    + "```python\ndef f(a):\n    return g0(a)\n```\n",
    "a deep expression": F + "x = f(" + "1+" * 5_000 + "1)\n",
}


@pytest.mark.timeout(120)
def test_no_reply_takes_time_that_grows_with_its_square():
    start = time.process_time()
    taken = {}
    for name, reply in LONG.items():
        before = time.process_time()
        assert isinstance(extract_code(reply, "f", F), str)
        taken[name] = round(time.process_time() - before, 1)
    assert time.process_time() - start < 20, taken  # 2 s on a quiet machine


def test_completions_are_drawn_by_problem_and_shown_beside_what_is_kept(tmp_path, capsys, monkeypatch):
    problem = {"prompt": "Echo.", "reference": F, "tests": ["assert f(1) == 1"], "setup": "", "entry_point": "f"}
    replies = {11: ["```python\n" + F + "assert f(2) == 2\n```", "I cannot.", "```python\nx\n```"], 12: [F]}
    of_problem = [{"task_id": i, "split": "test", **problem} for i in replies]
    samples = [{"task_id": i, "completion": text} for i, texts in replies.items() for text in texts]
    for name, lines in (("problems", of_problem), ("samples", samples)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def shown(*options: str) -> str:
        files = ["--problems", str(tmp_path / "problems"), "--samples", str(tmp_path / "samples")]
        monkeypatch.setattr("sys.argv", ["extraction", *files, *options])
        extraction.main()
        return str(capsys.readouterr().out)

    everything = shown()
    assert "- ```python\n| def f(a):\n|     return a\n- assert f(2) == 2\n- ```\n" in everything
    assert "4 drawn of 4: 2 defines the entry point, 1 missing, 1 no Python" in everything
    assert shown() == everything
    first, rest = shown("--count", "2"), shown("--start", "2")
    heads = [line for line in everything.splitlines() if line.startswith("===")]
    assert [line for line in (first + rest).splitlines() if line.startswith("===")] == heads
    assert {head.split("/")[0] for head in heads[:2]} == {"=== 11", "=== 12"}, "each problem once before any twice"
