"""SandboxFusion's requests and answers, for Python, as far as they can be kept honestly.

`/run_code`: a script is run on an input. What it prints and its exit code are reported as they are; they are the
program's own words, and a program that is wrong can exit with 0.

`/submit`: a reply is judged against the tests of its problem. The answer's `accepted` is our verdict; no exit code
stands behind it, so `return_code` is null. What would change a verdict and is not kept here is refused: other
languages, an extraction of the client's own.
"""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field

from fractal.errors import InputError
from fractal.generate.extraction import extract_code
from fractal.problems.task_ids import known_id
from fractal.records import Label, Problem, Sample
from fractal.rewards.rows import problem_from_row
from fractal.sandbox.host.client import Verdict, Verifier

LIMITS_NOTE = "not used: the server's own limits of CPU time, wall time and memory hold"
Id = int | str


class CommandRunResult(BaseModel):
    """What became of one process."""

    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(BaseModel):
    """What became of a program."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


class RunCodeRequest(BaseModel):
    """A script, and what it reads."""

    code: str
    language: str
    stdin: str | None = None
    compile_timeout: Annotated[float | None, Field(description=LIMITS_NOTE)] = None
    run_timeout: Annotated[float | None, Field(description=LIMITS_NOTE)] = None
    memory_limit_MB: Annotated[int | None, Field(description=LIMITS_NOTE)] = None
    files: Annotated[dict[str, str | None], Field(description="refused: a script has no files here")] = {}
    fetch_files: Annotated[list[str], Field(description="refused")] = []
    args: Annotated[list[str], Field(description="refused")] = []


class TestConfig(BaseModel):
    """How a reply is to be judged."""

    dataset_type: str | None = None
    language: Annotated[str | None, Field(description="python, or null")] = None
    locale: str | None = None
    is_fewshot: bool | None = None
    compile_timeout: Annotated[float | None, Field(description=LIMITS_NOTE)] = None
    run_timeout: Annotated[float | None, Field(description=LIMITS_NOTE)] = None
    custom_extract_logic: Annotated[str | None, Field(description="refused: it is code for the server")] = None
    provided_data: Annotated[dict[str, Any] | None, Field(description="the problem: a row with tests")] = None
    extra: dict[str, Any] = {}


class SubmitRequest(BaseModel):
    """A reply to a problem of the server's set, or of the request's own `config.provided_data`."""

    dataset: str
    id: Id
    completion: str
    config: TestConfig = TestConfig()


class EvalTestCase(BaseModel):
    """One test."""

    passed: bool
    exec_info: RunCodeResponse
    test_info: dict[str, Any] | None = None


class EvalResult(BaseModel):
    """The verdict on a reply."""

    id: Id
    accepted: bool
    extracted_code: str
    full_code: str | None = None
    test_code: str | None = None
    tests: list[EvalTestCase]
    extracted_type: str | None = None
    extra: Annotated[dict[str, Any] | None, Field(description="status and detail of our label")] = None


def make_router(verifier: Verifier, problems: dict[str, Problem], problems_name: str, deadline_s: float) -> APIRouter:
    """The endpoints; `problems` are those of the data set `problems_name`."""
    router = APIRouter(tags=["SandboxFusion"])

    @router.post("/run_code")
    def run_code(request: RunCodeRequest) -> RunCodeResponse:
        """Run one script. Success means that it exited with 0, and says nothing about its being right."""
        if request.language != "python":
            raise HTTPException(422, f"language {request.language}: this server runs Python alone")
        for name in ("files", "fetch_files", "args"):
            if getattr(request, name):
                raise HTTPException(422, f"{name}: a script has no files and no arguments here")
        return _ran(verifier.run_script(request.code, request.stdin or "", deadline_s))

    @router.post("/submit")
    def submit(request: SubmitRequest) -> EvalResult:
        """Judge one reply."""
        problem = _problem(request, problems, problems_name)
        code = extract_code(request.completion, problem.entry_point, problem.prefix)
        sample = Sample(problem.task_id, 0, request.completion, code, "stop", 0, None, None, "http")
        (label,) = verifier.verify([sample], {problem.task_id: problem}, deadline_s)
        if label.status == "sandbox_error":
            raise HTTPException(503, f"the program has no verdict: {label.detail}")
        return _result(request.id, code, problem, label)

    return router


def _ran(verdict: Verdict) -> RunCodeResponse:
    if verdict.status == "sandbox_error":
        raise HTTPException(503, f"the program was not run: {verdict.detail}")
    output, errors, code = verdict.values or ["", verdict.detail, "1" if verdict.status == "syntax_error" else ""]
    run = CommandRunResult(
        status="TimeLimitExceeded" if verdict.status == "timeout" else "Finished",
        execution_time=verdict.seconds,
        return_code=int(code) if code else None,
        stdout=output,
        stderr=errors,
    )
    return RunCodeResponse(
        status="Success" if run.return_code == 0 else "Failed", message=verdict.detail, run_result=run
    )


def _problem(request: SubmitRequest, problems: dict[str, Problem], problems_name: str) -> Problem:
    config = request.config
    if config.language not in (None, "python"):
        raise HTTPException(422, f"config.language {config.language}: this server runs Python alone")
    if config.custom_extract_logic:
        raise HTTPException(422, "config.custom_extract_logic: it is code, and would run in the server; send the code")
    if config.provided_data is not None:
        return _provided(config.provided_data)
    if request.dataset != problems_name:
        has = f"this server has {problems_name}" if problems_name else "this server was started without --problems"
        raise HTTPException(404, f"dataset {request.dataset}: {has}; or send the row in config.provided_data")
    if (task_id := known_id(str(request.id), problems)) is not None:
        return problems[task_id]
    raise HTTPException(404, f"id {request.id}: no problem of {problems_name}")


def _provided(row: dict[str, Any]) -> Problem:
    """A row of SandboxFusion's tables: some columns are JSON text, some stand in `labels`."""
    flat = {**_decoded(row.get("labels"), dict, {}), **row}
    for name in ("test", "tests", "test_list"):
        if name in flat:
            flat[name] = _decoded(flat[name], list, flat[name])
    try:
        return problem_from_row(flat, "0")
    except InputError as error:
        raise HTTPException(422, f"config.provided_data: {error}") from error


def _decoded(value: object, kind: type, default: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return default
    return value if isinstance(value, kind) else default


def _result(name: Id, code: str, problem: Problem, label: Label) -> EvalResult:
    tests = []
    for source, status in zip(problem.tests, label.tests, strict=False):
        run = CommandRunResult(
            status="TimeLimitExceeded" if status == "timeout" else "Finished", stderr=label.detail or None
        )
        info = RunCodeResponse(status="Success" if status == "passed" else "Failed", run_result=run)
        tests.append(EvalTestCase(passed=status == "passed", exec_info=info, test_info={"test": source}))
    extra = {"status": label.status, "detail": label.detail, "cpu_seconds": label.cpu_seconds}
    return EvalResult(id=name, accepted=label.passed, extracted_code=code, tests=tests, extra=extra)
