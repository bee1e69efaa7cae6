"""APPS and TACO: `input_output` is JSON text, for standard input, or for calls where it has `fn_name`."""

from typing import Any

from fractal.jsonl import Line
from fractal.problems.fields import json_field, refuse, seconds, task_id, text, unix_lines
from fractal.problems.solutions import AS_APPS, IMPORTS, first_python, target
from fractal.problems.values import encode_value
from fractal.records import Problem


def problem_from_apps(line: Line, value: dict[str, Any]) -> Problem:
    """One problem; the reference is the first of its solutions that is Python 3."""
    tests = json_field(line, value, "input_output")
    if not isinstance(tests, dict) or not isinstance(tests.get("inputs"), list) or not tests["inputs"]:
        raise line.error(
            "field input_output: expected JSON text with inputs and outputs; a problem without tests has no verdict"
        )
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(outputs, list) or len(outputs) != len(inputs):
        raise line.error("field input_output: expected as many outputs as inputs")
    solutions = json_field(line, value, "solutions", [])
    reference = first_python(solutions if isinstance(solutions, list) else [])
    starter = text(line, value, "starter_code", default="") if value.get("starter_code") else ""
    name = tests.get("fn_name")
    if name is not None and not isinstance(name, str):
        raise line.error("field input_output: fn_name is no name")
    if name:
        kind_inputs = [_call(line, args) for args in inputs]
        kind_outputs = [_expected(output) for output in outputs]
    else:
        kind_inputs, kind_outputs = [_lines(line, i) for i in inputs], [_lines(line, o) for o in outputs]
    question = text(line, value, "question").strip()
    return Problem(
        task_id=task_id(line, value, "task_id", "problem_id", "id"),
        prompt=f"{question}\n\nBegin with:\n{starter.rstrip()}" if starter.strip() else question,
        reference=IMPORTS + reference if reference and name else reference,
        tests=kind_inputs,
        setup="",
        entry_point=target(name, starter, reference) if name else "",
        split="test",
        kind="calls" if name else "stdin",
        expected=kind_outputs,
        compare=AS_APPS if name else "",
        test_limit_s=seconds(line, value, "time_limit"),
        prefix=IMPORTS if name else "",
    )


def problem_from_code_contests(line: Line, value: dict[str, Any]) -> Problem:
    """One problem of deepmind/code_contests: its public, private and generated tests."""
    for field, what in (("input_file", "reads a file"), ("output_file", "writes a file")):
        if value.get(field):
            refuse(line, "CodeContests", field, f"a program that {what} instead of standard input and output cannot be "
                   "judged. Leave the problem out")  # fmt: skip
    inputs, outputs = [], []
    for field in ("public_tests", "private_tests", "generated_tests"):
        tests = value.get(field) or {"input": [], "output": []}
        if (
            not isinstance(tests, dict)
            or not isinstance(tests.get("input"), list)
            or not isinstance(tests.get("output"), list)
        ):
            raise line.error(f"field {field}: expected input and output, a list of texts each")
        inputs += tests["input"]
        outputs += tests["output"]
    solutions = value.get("solutions") or {}
    languages, programs = solutions.get("language", []), solutions.get("solution", [])
    python3 = [p for language, p in zip(languages, programs, strict=False) if language in (3, "PYTHON3")]
    return stdin_problem(
        line, task_id(line, value, "task_id", "name"), text(line, value, "description"), inputs, outputs,
        reference=first_python(python3), test_limit_s=seconds(line, value, "time_limit"),
    )  # fmt: skip


def problem_from_pairs(line: Line, value: dict[str, Any], tests: Any) -> Problem:
    """One problem with lists of inputs and outputs, or with a list of {"input": text, "output": text}."""
    if isinstance(tests, list) and all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        inputs, outputs = [test["input"] for test in tests], [test["output"] for test in tests]
        extra = {key for test in tests for key in test} - {"input", "output", "type", "testtype"}
        kinds = {str(test.get("type", test.get("testtype", "stdin"))) for test in tests}
        if extra or kinds - {"stdin", "stdin_stdout"}:
            refuse(line, "a list of input and output", "tests", f"{', '.join(sorted(extra or kinds))}: not known. Name "
                   "the tests in one of the formats of docs/formats.md")  # fmt: skip
    else:
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
    programs = value.get("solutions", value.get("solution", ""))
    return stdin_problem(
        line, task_id(line, value, "task_id", "id", "name"),
        text(line, value, "problem", "prompt", "question", "description", default=""), inputs, outputs,
        reference=first_python(programs if isinstance(programs, list) else [programs]),
        test_limit_s=seconds(line, value, "time_limit"),
    )  # fmt: skip


def stdin_problem(
    line: Line, name: str, prompt: str, inputs: Any, outputs: Any, *, reference: str, test_limit_s: float | None
) -> Problem:
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise line.error("the tests: expected as many outputs as inputs, and at least one")
    return Problem(
        task_id=name, prompt=prompt.strip(), reference=reference, tests=[_lines(line, i) for i in inputs], setup="",
        entry_point="", split="test", kind="stdin", expected=[_lines(line, o) for o in outputs],
        test_limit_s=test_limit_s,
    )  # fmt: skip


def _lines(line: Line, value: Any) -> str:
    """A text, or the lines of one."""
    if isinstance(value, list):
        value = "\n".join(map(str, value))
    if not isinstance(value, str):
        raise line.error(f"an input or output: expected a text, got {type(value).__name__}")
    return unix_lines(value)


def _call(line: Line, args: Any) -> str:
    if not isinstance(args, list):
        raise line.error(f"field input_output: expected a list of arguments, got {type(args).__name__}")
    return encode_value([_integer_keys(arg) if i == 0 else arg for i, arg in enumerate(args)])


def _expected(output: Any) -> str:
    if isinstance(output, list) and output:
        return encode_value([_integer_keys(output[0]), *output[1:]])
    return encode_value(_integer_keys(output))


def _integer_keys(value: Any) -> Any:
    """JSON has no integers for keys: a dict whose keys are digits has integers, as APPS's testing_util.py takes it."""
    try:
        return {int(key): item for key, item in value.items()} if isinstance(value, dict) else value
    except ValueError:
        return value
