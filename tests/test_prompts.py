"""From a problem to a prompt, and from a chat reply to the program in it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal import prompts
from fractal.prompts import extract_code, fenced_blocks
from fractal.records import Problem

CODE = "def f(x):\n    return x * 2\n"
REPLIES = {
    "fence": f"```python\n{CODE}```",
    "prose around": f"Sure! Here it is:\n\n```python\n{CODE}```\n\nThis doubles `x`.",
    "no language": f"```\n{CODE}```",
    "py": f"```py\n{CODE}```",
    "language with attributes": f"```python title=x\n{CODE}```",
    "tildes": f"~~~python\n{CODE}~~~",
    "unclosed": f"```python\n{CODE}",
    "crlf": f"```python\n{CODE}```".replace("\n", "\r\n"),
    "the second block defines it": f"```bash\npip install x\n```\n```python\n{CODE}```",
    "an example of its use first": f"```python\nprint(f(1))\n```\nwith\n```python\n{CODE}```",
    "usage after": f"```python\n{CODE}```\n```python\nprint(f(3))\n```",
    "longer fence": f"````python\n{CODE}````",
    "bare code": CODE,
    "prose before bare code": f"Here is the function:\n\n{CODE}",
    "prose after bare code": f"{CODE}\nThis function doubles its argument, isn't it nice?",
    "indented fence": f"  ```python\n{CODE}  ```",
}


@pytest.mark.parametrize("name", REPLIES)
def test_the_program_is_found(name: str) -> None:
    assert extract_code(REPLIES[name], "f").strip() == CODE.strip()


HEAD = "import sys\n\nsys.setrecursionlimit(5000)\n\n\ndef f(x):\n    return g(x)\n\n\ndef g(x):\n    return x * 2\n"


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(1) == 3, 'no'\n",
        "print(f(1))\nprint(\n    f(2)\n)\n",
        'if __name__ == "__main__":\n    print(f(int(input())))\n',
        "f(None)\n",
        "assert f(1) == [\n    1,\n]\n",
        "assert f(1) == (1",  # cut at max_tokens
        "# Test cases\nassert f(1) == 'abc",
    ],
)
def test_a_models_own_tests_are_left_out(tests: str) -> None:
    found = extract_code(f"```python\n{HEAD}\n{tests}```", "f")
    assert found.strip() == HEAD.strip()


def test_a_check_function_may_stay_but_is_not_called() -> None:
    code = "def f(x):\n    return x\ndef check():\n    assert f(1) == 2\n"
    assert extract_code(code + "check()\n", "f") == code


@pytest.mark.parametrize("code", ["print('a')\ndef f(x): return x\n", "def f(x): return x\nf.cache = {}\nf.cache.clear()\n", "x = 1; assert x\n", "def f(x):\n    return ("])  # fmt: skip
def test_nothing_else_is_left_out(code: str) -> None:
    assert extract_code(f"```python\n{code}\n```", "f").strip() == code.strip()


def test_a_longer_fence_may_hold_a_shorter_one() -> None:
    code = 'def f(x):\n    """\n    ```\n    f(1)\n    ```\n    """\n    return x\n'
    assert extract_code(f"````python\n{code}````", "f") == code


def test_only_prose_is_kept_for_the_verifier_to_judge() -> None:
    assert extract_code("I cannot do that.", "f") == "I cannot do that."


lines = st.lists(
    st.text(st.characters(exclude_characters="`~\n\r", exclude_categories=["Cs"]), max_size=20), min_size=1
)


@given(lines, st.sampled_from(["", "Sure:\n\n", "1. First\n"]), st.sampled_from(["", "\nDone.", "\n\nThe end"]))
def test_what_stands_in_a_fence_comes_back_unchanged(code_lines: list[str], before: str, after: str) -> None:
    code = "\n".join(code_lines) + "\n"
    assert fenced_blocks(f"{before}```python\n{code}```{after}") == [("python", code)]
    assert extract_code(f"{before}```python\n{code}```{after}", "f") == code


@given(st.text(max_size=200) | st.text(alphabet="`~ \npydef():x=1", max_size=200))
def test_extraction_takes_any_text(text: str) -> None:
    found = extract_code(text, "f")
    assert isinstance(found, str)
    assert len(found) <= len(text) + 1


@pytest.mark.parametrize("text", ["(" * 100_000, "-" * 100_000 + "1", "x = " + "[" * 5000, "1+" * 50_000 + "1", "a\0b"])
def test_extraction_survives_what_breaks_parsers(text: str) -> None:
    extract_code(text, "f")


def test_a_prompt_shows_the_first_test_only_and_opens_the_fence() -> None:
    def template(messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    problem = Problem(1, "Double it.", CODE, ["assert f(1) == 2", "assert f(7) == 14"], "", "f", "test")
    text = prompts.render(problem, template)
    assert text.startswith("<user>Double it.")
    assert text.endswith("<assistant>```python\n")
    assert "assert f(1) == 2" in text
    assert "14" not in text
    assert CODE not in text
