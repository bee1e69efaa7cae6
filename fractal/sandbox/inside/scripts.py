"""Tests by standard input and output: the program is a script, run once for each test in a process of its own.

Its output is compared here, where no program can reach the text that is expected. The first test that does not hold
decides, and is the last one that is run. Trusted, in the judge; standard library only.
"""

from typing import Any

from fractal.sandbox.inside.candidate_process import CandidateProcess, ProgramRun, ScriptFiles, Slot
from fractal.sandbox.inside.protocol import pack

SPARE_OUTPUT = 1 << 20  # bytes that a script may print beyond twice what is expected; with more it is wrong anyway
TRACEBACK = b"Traceback (most recent call last):"


def run_script(
    slot: Slot, compiled: str, text: str, expected: str, atol: float, limits: dict[str, Any], deadline: float
) -> tuple[str, str, ProgramRun]:
    """One test of a script: a status, its detail, and the run for its facts.

    `compiled` is what a candidate compiled; `deadline` by time.monotonic, for this test.
    """
    most = 2 * len(expected.encode("utf-8", "surrogatepass")) + SPARE_OUTPUT
    run, files = _run(slot, compiled, text, most, limits, deadline)
    status, detail = _status(run, files, expected, atol)
    return status, detail, run


def record_script(
    slot: Slot, compiled: str, text: str, limits: dict[str, Any], deadline: float
) -> tuple[list[str], ProgramRun]:
    """What a script does, without a verdict: standard output, standard error, and its exit code or "".

    A program can exit with any code and print anything: neither says that it is right.
    """
    run, files = _run(slot, compiled, text, SPARE_OUTPUT, limits, deadline)
    code = "" if run.exit_code is None or files.overflow else str(run.exit_code)
    return [files.output.decode("utf-8", "replace"), run.output.decode("utf-8", "replace"), code], run


def _run(
    slot: Slot, compiled: str, text: str, most: int, limits: dict[str, Any], deadline: float
) -> tuple[ProgramRun, ScriptFiles]:
    files = ScriptFiles(text, most)
    try:
        candidate = CandidateProcess(slot, limits, shared=False, script=files)
        try:
            run = ProgramRun(candidate, limits["cpu_s"], limits["wall_s"], deadline)
            run.endpoint.send_frames(pack(["script", compiled]))
            run.finish_script()
        finally:
            candidate.end()
    finally:
        files.close()
    return run, files


def _status(run: ProgramRun, files: ScriptFiles, expected: str, atol: float) -> tuple[str, str]:
    if files.overflow:
        return "failed", f"printed more than {files.most:,} bytes"
    if run.ended is not None and run.exit_code != 0:
        if run.exit_code == 1 and TRACEBACK in run.output:
            last = run.output.decode("utf-8", "replace").strip().rpartition("\n")[2]
            run.output = b""  # the detail says it
            return ("memory" if last.startswith("MemoryError") else "error"), last[:500]
        return run.ended, run.detail
    printed = files.output.decode("utf-8", "replace")
    if same_output(printed, expected, atol):
        return "passed", ""
    return "failed", f"printed {_short(printed)}, expected {_short(expected)}"


def same_output(printed: str, expected: str, atol: float) -> bool:
    """Whether a contest's checker takes one text for the other.

    Lines are compared token by token; white space at the ends of lines and between tokens, and empty lines do not
    count. With `atol`, numbers may differ by that much, absolutely or relative to the expected one.
    """
    if printed == expected:
        return True
    ours, theirs = _tokens(printed), _tokens(expected)
    if ours == theirs:
        return True
    if not atol or [*map(len, ours)] != [*map(len, theirs)]:
        return False
    pairs = ((a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    return all(a == b or _close(a, b, atol) for a, b in pairs)


def _tokens(text: str) -> list[list[str]]:
    return [tokens for line in text.splitlines() if (tokens := line.split())]


def _close(printed: str, expected: str, atol: float) -> bool:
    try:
        ours, theirs = float(printed), float(expected)
    except ValueError:
        return False
    return abs(ours - theirs) <= atol * max(1.0, abs(theirs))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
