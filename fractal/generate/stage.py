"""Stage 1: problems -> samples.jsonl. Draws n completions for each problem and extracts the program from each.

It decides which samples are missing and with which seed; an engine decodes. Its memory grows with the problems, not
with the samples: of those that are there it holds the keys (KeySet), and requests are made as the engine takes them.
Engines are imported only when a sample is missing, because importing vLLM takes ten seconds.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.generate import memory, models, prompts
from fractal.generate.backends import choose_backend
from fractal.generate.engine import Completion, Engine, RayCluster, Sampling, Server, SizedRequests
from fractal.generate.extraction import extract_code
from fractal.generate.interrupt import DeferredInterrupt
from fractal.generate.vllm_processes import EngineProcess, EngineProcesses
from fractal.jsonl import Appender, read_keys
from fractal.problems.sets import ProblemSet
from fractal.records import Problem, Sample
from fractal.rundir import RunDir


class SampleFollower(Protocol):
    """Follows the samples as they are written: verification beside generation (verify/overlap.py)."""

    def update(self, bar: console.Bar, expected: int, written: int) -> None:
        """`written` more samples, of `expected` that are to be drawn, are whole on disk; `bar` shows the drawing."""


def run(
    folder: RunDir,
    problem_set: ProblemSet,
    model: str,
    sampling: Sampling,
    backend: str = "auto",
    *,
    batch: int | None = None,
    engines: int | None = None,
    server: Server | None = None,
    cluster: RayCluster | None = None,
    follow: Callable[[], SampleFollower] | None = None,
) -> None:
    """Draw the samples that are missing.

    batch: samples decoded together; None to derive it from free memory. engines: of vLLM that share the GPU; None to
    derive it from the model's size. server: for backend openai. cluster: where Ray runs the engines; None: this process
    runs them. follow: called before the model is loaded, if samples are missing; what it returns is updated as they are
    written.

    Raises InputError, OutsideError, and KeyboardInterrupt; finished samples are written in each case.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch {batch}: must be at least 1.")
    if engines is not None and not 1 <= engines <= 16:
        raise InputError(f"--engines {engines}: must be from 1 to 16.")
    previous = folder.manifest["config"].get("generate", {})
    backend = choose_backend(backend, previous.get("backend"))
    if engines is not None and backend != "vllm":
        raise InputError(f"--engines {engines}: goes with --backend vllm, and here {backend} draws. Leave it out.")
    if cluster:
        check_ray(backend, engines)
    files: models.ModelFiles | None = None
    dtype = None
    began = time.monotonic()
    if backend == "openai":
        if server is None:
            raise InputError(
                "--backend openai: give --base-url, the address of the server, as http://localhost:8000/v1."
            )
        if not previous:  # a wrong name must not become the run's
            connect(model, sampling, server)
            if server.tokenizer:
                prompts.load_tokenizer(server.tokenizer)
        name = model
        source = {"model": model, "revision": None, "weights_sha256": None, "tokenizer": server.tokenizer}
        address = {"base_url": server.base_url}
    else:
        files, dtype = models.resolve(model), models.preferred_dtype()
        name = files.name
        source = {"model": name, "revision": files.revision, "weights_sha256": files.digest}
        address = {}
    weights_seconds = round(time.monotonic() - began, 3)
    folder.configure("problems", {"name": problem_set.name, "digest": problem_set.digest})
    config = source | {"backend": backend, "dtype": dtype, "prompt_version": prompts.VERSION} | address
    folder.configure("generate", config | asdict(sampling), free=("n", "base_url"))
    folder.keep_model_path(name, server.tokenizer if server and server.tokenizer and not files else model)
    folder.set_problems(problem_set.problems)
    path = folder.file("samples.jsonl")
    done = read_keys(path)
    skipped: dict[str, str] = folder.manifest["stages"].get("generate", {}).get("skipped", {})
    missing = {
        problem.task_id: count
        for problem in problem_set.problems
        if problem.task_id not in skipped and (count := done.count_missing(problem.task_id, sampling.n))
    }
    if not missing:
        console.say(f"generate: {len(done)} samples are there, nothing to do")
        return
    follower = follow() if follow else None
    with folder.stage("generate", "samples.jsonl") as entry, ExitStack() as cleanup:
        console.say(
            f"generate: {sum(missing.values())} samples of {len(missing)} problems with {name} "
            f"({backend}{f', {dtype}' if dtype else ''}); {len(done)} are there"
        )
        began, process = time.monotonic(), None
        if backend == "vllm" and not cluster:  # it imports vLLM while the prompts are tokenised here
            with console.quiet("starting vLLM"):
                process = cleanup.enter_context(EngineProcess())
        tokenizer_name = str(files.path) if files else server.tokenizer if server else None
        tokenizer = prompts.load_tokenizer(tokenizer_name) if tokenizer_name else None
        # model_max_length is huge where a tokenizer states none
        context = models.context_length(files.path) if files else int(getattr(tokenizer, "model_max_length", 1 << 40))
        skipped = dict(skipped)
        requests = prompts.build_requests(problem_set.problems, tokenizer, context, sampling, skipped, done)
        if skipped:
            entry["skipped"] = skipped
        folder.save()
        if requests.prompts:
            if files and dtype and cluster:
                length = requests.longest + sampling.max_tokens
                load = partial(load_here, backend, files.path, sampling, dtype, length, batch)
                engine = start_cluster(cluster, load, problem_set.problems)
            elif files and dtype:
                engine = load_engine(backend, files.path, sampling, dtype, requests, batch, engines, process)
            else:
                assert server is not None
                engine = connect(model, sampling, server)
            entry["start_up"] = {
                "weights_seconds": weights_seconds,  # until they were found, or fetched from the hub
                "load_seconds": round(time.monotonic() - began, 3),  # until the engine was ready
            }
            try:
                draw(engine, requests, problem_set.by_id(), path, sampling, name, entry, follower)
            finally:
                engine.close()
    if skipped:
        console.warn(
            f"generate: {len(skipped)} problems skipped, their prompts do not fit the model's context with "
            f"{sampling.max_tokens} new tokens: {', '.join(list(skipped)[:20])}"
        )


def load_engine(
    backend: str,
    path: Path,
    sampling: Sampling,
    dtype: str,
    requests: prompts.MissingRequests,
    batch: int | None = None,
    engines: int | None = None,
    process: EngineProcess | None = None,
) -> Engine:
    """Load the model in `path`, with room for the longest of `requests`; vLLM's in `process`. Raises OutsideError.

    What the libraries print while they load goes to the stage's log.
    """
    length = requests.longest + sampling.max_tokens
    with console.quiet("loading the model"):
        if backend == "vllm":
            count = engines or memory.engines_here(path, dtype, len(requests))
            budget = memory.gpu_budget() if count > 1 else None
            return EngineProcesses(
                path, sampling, dtype, length, batch, engines=count, budget_bytes=budget, first=process
            )
        return load_here(backend, path, sampling, dtype, length, batch)


def load_here(backend: str, path: Path, sampling: Sampling, dtype: str, length: int, batch: int | None) -> Engine:
    """Load the model in `path` in this process. Raises OutsideError."""
    if backend == "vllm":
        from fractal.generate.vllm import VllmEngine

        return VllmEngine(path, sampling, dtype, length, batch)
    from fractal.generate.transformers import TransformersEngine

    return TransformersEngine(path, sampling, dtype, length, batch)


def check_ray(backend: str, engines: int | None) -> None:
    """Raises InputError for options that do not go with Ray's, OutsideError where it is not installed."""
    if backend == "openai":
        raise InputError("--ray, --gpus: go with --backend vllm or transformers; a server spreads its requests itself.")
    if engines is not None:
        raise InputError(f"--engines {engines}: does not go with --ray and --gpus: each GPU has one engine.")
    if importlib.util.find_spec("ray") is None:
        raise OutsideError("--ray, --gpus: the package ray is not installed; pip install 'fractal[fleet]' installs it.")


def start_cluster(cluster: RayCluster, load: Callable[[], Engine], problems: list[Problem]) -> Engine:
    """Engines that Ray runs. Raises OutsideError."""
    with console.quiet("starting Ray"):
        from fractal.generate.ray import RayEngines

        return RayEngines(cluster, load, CodeExtractor({p.task_id: (p.entry_point, p.prefix) for p in problems}))


def connect(model: str, sampling: Sampling, server: Server) -> Engine:
    """The engine of a served model, checked. Raises InputError, OutsideError."""
    from fractal.generate.openai import OpenAiEngine

    engine = OpenAiEngine(model, sampling, server)
    engine.check()
    return engine


def draw(
    engine: Engine,
    requests: SizedRequests,
    problems: dict[str, Problem],
    path: Path,
    sampling: Sampling,
    model: str,
    entry: dict[str, Any],
    follower: SampleFollower | None = None,
) -> None:
    """Append samples to `path` as they finish; counts and times go to `entry`, the stage's entry in the manifest.

    Raises KeyboardInterrupt after a signal, once all finished samples are written.
    """
    tokens = count = 0
    start = time.monotonic()
    entry |= {name: value for name in ("batch", "engines") if (value := getattr(engine, name, None))}
    try:
        total = len(requests)
        with DeferredInterrupt() as interrupt, Appender(path) as out, console.bar("generate", total) as bar:
            if follower:
                follower.update(bar, total, 0)
            for completions in engine.generate(requests, interrupt.received):
                if not count:
                    entry.setdefault("start_up", {})["first_sample_at"] = round(time.time(), 3)
                out.write(to_sample(c, problems[c.request.task_id], sampling, model) for c in completions)
                count += len(completions)
                tokens += sum(completion.tokens for completion in completions)
                if follower:
                    follower.update(bar, total, len(completions))
                bar.advance(len(completions), f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    finally:
        seconds = time.monotonic() - start
        entry["tokens"] = int(entry.get("tokens", 0)) + tokens
        entry["decode_seconds"] = round(float(entry.get("decode_seconds", 0.0)) + seconds, 3)
        if placement := getattr(engine, "ray", None):
            entry["ray"] = placement
    console.say(
        f"generate: {count} samples, {tokens} tokens in {seconds:.0f} s "
        f"({tokens / seconds:.1f} tokens/s, {count / seconds:.2f} samples/s)"
    )
    if interrupt.received():
        raise KeyboardInterrupt


def reply_of(completion: Completion) -> str:
    """The model's reply, with the fence that the prompt opened."""
    if completion.request.prompt:  # the prompt was rendered here, and its last line opened a fence
        return prompts.OPENING + completion.text + (prompts.FENCE_END if completion.stopped else "")
    return completion.text


@dataclass(frozen=True)
class CodeExtractor:
    """Takes the program out of a completion, in the process of the engine that drew it."""

    problems: dict[str, tuple[str, str]]  # entry point and prefix by task_id

    def __call__(self, completion: Completion) -> str:
        return extract_code(reply_of(completion), *self.problems[completion.request.task_id])


def to_sample(completion: Completion, problem: Problem, sampling: Sampling, model: str) -> Sample:
    reply, request, code = reply_of(completion), completion.request, completion.code
    return Sample(
        task_id=problem.task_id,
        sample_id=request.sample_id,
        completion=reply,
        code=extract_code(reply, problem.entry_point, problem.prefix) if code is None else code,
        finish_reason="stop" if completion.stopped else "length",
        tokens=completion.tokens,
        sum_logprob=None if completion.sum_logprob is None else round(completion.sum_logprob, 6),
        seed=request.seed,
        model=model,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        prompt_sha256=prompt_sha256(request.text),
    )


@lru_cache(maxsize=1024)
def prompt_sha256(text: str) -> str:
    """sha256 of a prompt, as Sample records it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
