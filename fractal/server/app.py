"""The server's own endpoint: programs with their problems to labels. SandboxFusion's are in sandbox_fusion.py."""

from typing import Annotated

import msgspec
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

import fractal
from fractal.errors import InputError
from fractal.generate.extraction import extract_code
from fractal.problems.task_ids import known_id
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.client import SandboxError, Verifier
from fractal.server import sandbox_fusion
from fractal.server.gate import Gate

MAX_SAMPLES = 4096  # in a request
DEADLINE_S = 60.0  # for a request, at most
MAX_BYTES = 64 << 20
MAX_REQUESTS = 16  # at once


class Strict(BaseModel):
    """A field that is not known is refused, not dropped."""

    model_config = ConfigDict(extra="forbid")


def _digits(value: object) -> object:
    return str(value) if type(value) is int else value


def _problem_with_digits(value: object) -> object:
    return value | {"task_id": _digits(value["task_id"])} if isinstance(value, dict) and "task_id" in value else value


TaskId = Annotated[str, BeforeValidator(_digits)]  # an integer is its digits


class Program(Strict):
    """One program to judge."""

    task_id: Annotated[TaskId, Field(description="a problem's of this request, or of the set that the server has")]
    sample_id: Annotated[int | None, Field(description="default: its place in the request")] = None
    code: Annotated[str | None, Field(description="the program")] = None
    completion: Annotated[str | None, Field(description="or a chat reply that holds it")] = None


class VerifyRequest(Strict):
    """A batch."""

    samples: Annotated[list[Program], Field(max_length=MAX_SAMPLES)]
    problems: list[Annotated[Problem, BeforeValidator(_problem_with_digits)]] = []
    deadline_s: Annotated[float, Field(gt=0, description="what is not decided then is a sandbox_error")] = DEADLINE_S


class VerifyResponse(BaseModel):
    """The labels, in the order of the samples."""

    labels: list[Label]


def make_app(
    verifier: Verifier,
    problems: dict[str, Problem] | None = None,
    *,
    problems_name: str = "",
    token: str | None = None,
    deadline_s: float = DEADLINE_S,
    max_bytes: int = MAX_BYTES,
    max_requests: int = MAX_REQUESTS,
) -> FastAPI:
    """The application: `problems` are those that requests may name by their task_id alone."""
    known = problems or {}
    app = FastAPI(title="Fractal", version=fractal.__version__, summary="Verdicts that a program cannot forge.")
    app.add_middleware(Gate, token=token, max_bytes=max_bytes, max_requests=max_requests)
    app.include_router(sandbox_fusion.make_router(verifier, known, problems_name, deadline_s))

    @app.exception_handler(InputError)
    def input_error(_: object, error: InputError) -> Response:
        return _detail(422, str(error))

    @app.exception_handler(SandboxError)
    def sandbox_error(_: object, error: SandboxError) -> Response:
        return _detail(503, str(error))

    @app.get("/health")
    def health() -> dict[str, object]:
        """Whether the server lives, and the problem set that it has."""
        return {"slots": verifier.slots, "problems": problems_name, "problem_count": len(known)}

    @app.post("/verify", response_model=VerifyResponse)
    def verify(request: VerifyRequest) -> Response:
        """Run programs against the tests of their problems. The answer has a label for each sample, in their order."""
        in_request = {problem.task_id: problem for problem in request.problems}
        by_id = {**known, **in_request} if known else in_request
        samples = [_sample(number, program, by_id) for number, program in enumerate(request.samples)]
        labels = list(verifier.verify(samples, by_id, min(request.deadline_s, deadline_s)))
        return Response(msgspec.json.encode({"labels": labels}), media_type="application/json")

    return app


def _sample(number: int, program: Program, problems: dict[str, Problem]) -> Sample:
    task_id = known_id(program.task_id, problems)
    if task_id is None:
        raise HTTPException(422, f"samples[{number}]: no problem has task_id {program.task_id!r}")
    if (program.code is None) == (program.completion is None):
        raise HTTPException(422, f"samples[{number}]: expected either code or completion")
    problem = problems[task_id]
    text = program.completion or ""
    code = extract_code(text, problem.entry_point, problem.prefix) if program.code is None else program.code
    sample_id = number if program.sample_id is None else program.sample_id
    return Sample(task_id, sample_id, text, code, "stop", 0, None, None, "http")


def _detail(status: int, text: str) -> Response:
    return Response(msgspec.json.encode({"detail": text}), status, media_type="application/json")
