"""The generator's speed, as ratios in one run: `invoke bench --what=generate`; `python benchmarks/generate.py --help`.

On the same prompts and seeds, in turns: vLLM's own `LLM.generate` with all of it at once, with our settings (bare) and
with its own (defaults); our vLLM engine, one and several of them; bare without seeds (what a seed for each sample
costs); our generation stage alone and with verification beside it; the same stage over vLLM's own output processor, in
one process (stock); and transformers. Ratios are taken within a round, and their median is told: a machine that slows
down does so for all. Each engine lives in a process of its own and waits while another has its turn; on a GPU, whose
memory holds one of them, they come one after the other.

`--instant` puts a model that answers at once in the place of the real one: what is left is the time of Python.

Exit codes: 0 done; 1 an engine failed; 2 bad input or usage; 3 something outside is missing; 130 interrupted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from benchmarks.verify import SHARED, BenchError, chosen, machine, order, outcome, save, show
from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.generate import memory, models, prompts
from fractal.generate import stage as generate_stage
from fractal.generate.backends import why_no_vllm
from fractal.generate.engine import Completion, Request, Sampling, never_stop
from fractal.install import docker_engine, gpu
from fractal.problems.sets import load
from fractal.records import Problem
from fractal.rundir import RunDir

ROOT = Path(__file__).resolve().parents[1]
MISSION = 90.6  # samples a second of the earlier project, 8,150 in 90 s on an A100 with a 1.5B model
TITLES = {
    "bare": "bare LLM.generate, our settings",
    "defaults": "bare LLM.generate, vLLM's settings",
    "ours": "our vLLM engine",
    "unseeded": "bare, without seeds",
    "stock": "stage on vLLM's output processor",
    "alone": "generate, stage alone",
    "several": "the stage on several engines",
    "overlapped": "generate with verify beside",
    "transformers": "our transformers engine",
}
KINDS = {"bare": "bare", "unseeded": "bare", "stock": "bare", "ours": "ours", "alone": "ours", "overlapped": "ours"}
INSTANT = ("bare", "stock", "ours", "alone", "several")  # of use with a model that answers at once
REPLY_CHARACTERS = 160
SEQUENCES = 1024  # decoded together by such a model, as by a GPU
RATIOS = [  # name, numerator, denominator, of what, the target
    ("ours to bare", "ours", "bare", "rate", ">= 0.95"),
    ("ours to vLLM's defaults", "ours", "defaults", "rate", ""),
    ("the stage to the same on vLLM's output processor", "alone", "stock", "rate", ""),
    ("several engines to the same", "several", "stock", "rate", ""),
    ("several engines to one", "several", "alone", "rate", ""),
    ("what seeds cost: bare to bare without", "bare", "unseeded", "rate", ""),
    ("verification hidden: wall time with to without", "overlapped", "alone", "seconds", "<= 1.05"),
    ("vLLM to transformers", "ours", "transformers", "rate", ""),
]


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    contestants: list[str]
    model: str
    problems: str
    limit: int = 16  # problems of each split
    n: int = 4
    rounds: int = 3
    max_tokens: int = 256
    temperature: float = 0.8
    seed: int = 0
    engines: int = 2  # of the contestant "several"
    instant: bool = False
    split: str | None = None


@dataclass(frozen=True)
class Turn:
    """One contestant, once."""

    round: int  # 0 warms up and is not counted
    contestant: str
    samples: int
    tokens: int
    seconds: float
    texts: list[int]  # a hash of each completion, by request: equal where the samples are; none for a stage
    verify_s: float | None = None  # alone: what verifying the same samples takes afterwards
    busy: float | None = None  # share of the time in which the GPU computed, as nvidia-smi has it

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


# --- arithmetic -------------------------------------------------------------------------------------------------------


def ratio(turns: Sequence[Turn], over: str, under: str, what: str) -> list[float]:
    """By round: one contestant's tokens per second, or seconds, in those of another."""
    found = []
    for number in sorted({t.round for t in turns if t.round}):
        mine = {t.contestant: t for t in turns if t.round == number}
        if over in mine and under in mine:
            pair = (getattr(mine[over], what), getattr(mine[under], what))
            found.append(pair[0] / pair[1])
    return found


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """A row for each contestant, and the ratios that both of their contestants have."""
    rows = []
    for contestant in TITLES:
        mine = [t for t in turns if t.contestant == contestant and t.round]
        if not mine:
            continue
        rates, seconds = [t.rate for t in mine], [t.seconds for t in mine]
        rows.append({
            "contestant": contestant, "samples": mine[0].samples, "tokens": mine[0].tokens,
            "tokens_per_s": statistics.median(rates), "min": min(rates), "max": max(rates),
            "seconds": statistics.median(seconds),
            "samples_per_s": statistics.median(t.samples / t.seconds for t in mine),
            "verify_s": statistics.median(after) if (after := [t.verify_s for t in mine if t.verify_s]) else None,
            "busy": statistics.median(busy) if (busy := [t.busy for t in mine if t.busy is not None]) else None,
        })  # fmt: skip
    ratios = []
    for name, over, under, what, target in RATIOS:
        if found := ratio(turns, over, under, what):
            ratios.append({"name": name, "median": statistics.median(found), "min": min(found), "max": max(found),
                           "target": target, "rounds": found})  # fmt: skip
    return {"rows": rows, "ratios": ratios, "same_samples": same_samples(turns)}


def same_samples(turns: Sequence[Turn]) -> float | None:
    """The share of samples that are the same text in every turn of bare and ours; None without one of these."""
    mine = {name: [t.texts for t in turns if t.contestant == name] for name in ("bare", "ours")}
    if not all(mine.values()):
        return None
    columns = list(zip(*(texts for lists in mine.values() for texts in lists), strict=True))
    return sum(len(set(column)) == 1 for column in columns) / len(columns)


def tables(found: dict[str, Any], plan: Plan) -> list[Table]:
    first = Table(title=f"{plan.model}, n = {plan.n}, {plan.rounds} rounds", box=box.SIMPLE_HEAD, pad_edge=False)
    first.add_column("contestant")
    for column in ("samples", "tokens", "tokens/s", "min-max", "samples/s", "s", "GPU busy"):
        first.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        rate, spread = f"{row['tokens_per_s']:,.1f}", f"{row['min']:,.1f}-{row['max']:,.1f}"
        counts, each = (f"{row['samples']:,}", f"{row['tokens']:,}"), f"{row['samples_per_s']:,.2f}"
        seconds = f"{row['seconds']:,.1f}"
        first.add_row(TITLES[row["contestant"]], *counts, rate, spread, each, seconds, share(row["busy"]))
    second = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("ratio, within a round", "median", "min-max", "target"):
        second.add_column(column, justify="left" if column.startswith("ratio") else "right", no_wrap=True)
    for one in found["ratios"]:
        second.add_row(one["name"], f"{one['median']:.3f}", f"{one['min']:.3f}-{one['max']:.3f}", one["target"])
    return [first, second]


def verdict(same: float, gpu: bool) -> str:
    """How far bare and ours drew the same samples, and whether that is as it should be."""
    if same == 1:
        return "bare and ours drew the same samples: yes"
    if not gpu:
        return f"bare and ours drew the same samples: NO, {1 - same:.1%} differ"
    return (
        f"bare and ours drew the same text for {same:.1%} of the samples. On a GPU no two runs need agree to the bit: "
        "logits in bfloat16 depend on which samples are computed together"
    )


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def remarks(found: dict[str, Any], gpu: bool) -> list[str]:
    """What the tables have no column for, a line each."""
    lines = []
    rows = {row["contestant"]: row for row in found["rows"]}
    if (same := found["same_samples"]) is not None:
        lines.append(verdict(same, gpu))
    if verify_s := rows.get("alone", {}).get("verify_s"):
        lines.append(f"verified after generation instead, with the sandbox's start: {verify_s:.1f} s more")
    if gpu and "ours" in rows:
        rate = rows["ours"]["samples_per_s"]
        lines.append(f"{rate:.1f} samples/s, {rate / MISSION:.2f} of the mission's {MISSION}")
    return lines


# --- an engine's process ----------------------------------------------------------------------------------------------


def work(kind: str) -> int:
    """Load what the first line of standard input describes, then take turns: a contestant's name a line."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    plan = Plan(**json.loads(sys.stdin.readline()))
    try:
        bench = Bench(plan, kind)
        print(json.dumps({"start_s": bench.start_s}), file=said)
        for line in sys.stdin:
            print(json.dumps(asdict(bench.turn(line.strip()))), file=said)
    except (InputError, OutsideError) as error:
        print(json.dumps({"error": str(error), "code": 2 if isinstance(error, InputError) else 3}), file=said)
    return 0


class Bench:
    """One engine with the requests that every contestant gets."""

    def __init__(self, plan: Plan, kind: str) -> None:
        self.plan = plan
        self.problems: list[Problem] = load(plan.problems, plan.split, plan.limit).problems
        files = models.resolve(plan.model)
        self.sampling = Sampling(plan.n, plan.temperature, 1.0, plan.max_tokens, plan.seed)
        tokenizer = prompts.load_tokenizer(str(files.path))
        context = models.context_length(files.path)
        self.requests = list(prompts.build_requests(self.problems, tokenizer, context, self.sampling, {}))
        if not self.requests:
            raise InputError(f"--problems {plan.problems}: no prompt fits the model's context.")
        dtype, length = models.preferred_dtype(), max(len(r.prompt) for r in self.requests) + plan.max_tokens
        options: dict[str, Any] = {}
        if plan.instant:
            answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in replies(self.problems)]
            executor = "benchmarks.instant.Instant"
            options = {"distributed_executor_backend": executor, "additional_config": {"answers": answers}}
        size = SEQUENCES if plan.instant else None
        begin = time.perf_counter()
        self.engine: Any
        if kind in ("ours", "several"):
            from fractal.generate.vllm_processes import EngineProcesses

            count = plan.engines if kind == "several" else 1
            budget = memory.gpu_budget() if count > 1 else None
            self.engine = EngineProcesses(
                files.path, self.sampling, dtype, length, size, engines=count, budget_bytes=budget, options=options
            )
        elif kind == "bare":
            from fractal.generate.vllm import VllmEngine

            self.engine = VllmEngine(files.path, self.sampling, dtype, length, size, options=options)
        elif kind == "defaults":
            self.engine = Defaults(files.path, self.sampling)
        else:
            from fractal.generate.transformers import TransformersEngine

            self.engine = TransformersEngine(files.path, self.sampling, dtype, length)
        self.start_s = time.perf_counter() - begin

    def turn(self, contestant: str) -> Turn:
        texts: dict[tuple[str, int], str] = {}
        begin = time.perf_counter()
        if contestant in ("bare", "unseeded", "defaults"):
            tokens = self._bare(contestant != "unseeded", texts)
        elif contestant in ("alone", "overlapped", "several", "stock"):
            return self._stage(contestant)
        else:
            tokens = 0
            for done in self.engine.generate(self.requests):
                tokens += sum(c.tokens for c in done)
                texts |= {(c.request.task_id, c.request.sample_id): c.text for c in done}
        seconds = time.perf_counter() - begin
        hashes = [zlib.crc32(texts[key].encode("utf-8", "surrogatepass")) for key in sorted(texts)]
        return Turn(0, contestant, len(self.requests), tokens, seconds, hashes)

    def _bare(self, seeded: bool, texts: dict[tuple[str, int], str]) -> int:
        params = [self.engine.params(r if seeded else replace(r, seed=None)) for r in self.requests]
        asked = [{"prompt_token_ids": r.prompt} for r in self.requests]
        outputs = self.engine._llm.generate(asked, params, use_tqdm=False)
        for request, output in zip(self.requests, outputs, strict=True):
            texts[request.task_id, request.sample_id] = output.outputs[0].text
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def _stage(self, contestant: str) -> Turn:
        """The stage as `fractal run` has it, from the first request to the last sample, or label, on disk."""
        from fractal.sandbox.host.limits import Limits
        from fractal.verify import stage as verify_stage
        from fractal.verify.overlap import Overlap

        problems = {p.task_id: p for p in self.problems}
        source = Stock(self.engine) if contestant == "stock" else self.engine
        verify_s = None
        with (
            tempfile.TemporaryDirectory(prefix="fractal-bench-") as place,
            RunDir(Path(place) / "r", create=True) as run,
        ):
            run.set_problems(self.problems)
            entry: dict[str, Any] = {}
            path = run.file("samples.jsonl")
            begin = time.perf_counter()
            with Overlap(run, Limits()) as overlap:
                follower = overlap.begin() if contestant == "overlapped" else None
                generate_stage.draw(source, self.requests, problems, path, self.sampling, "m", entry, follower)
            if follower:
                verify_stage.run(run, Limits(), overlap)
            seconds = time.perf_counter() - begin
            if contestant == "alone" and not self.plan.instant and docker_engine.problem() is None:
                begin = time.perf_counter()
                verify_stage.run(run, Limits())
                verify_s = time.perf_counter() - begin
        return Turn(0, contestant, len(self.requests), entry["tokens"], seconds, [], verify_s)


def replies(problems: list[Problem]) -> list[str]:
    """References one after the other, as replies of about 70 tokens (the mission's), with the fence that ends them."""
    found, text = [], ""
    for problem in problems:
        text += problem.reference.strip() + "\n\n"
        if len(text) > REPLY_CHARACTERS:
            found.append(text.rstrip() + prompts.FENCE_END)
            text = ""
    return found or [text.rstrip() + prompts.FENCE_END]


class Defaults:
    """vLLM as its user gets it who names a model and nothing else."""

    def __init__(self, path: Path, sampling: Sampling) -> None:
        from fractal.generate.vllm import VllmEngine

        from vllm import LLM  # isort: skip

        self._llm = LLM(str(path), disable_log_stats=True)
        self._sampling = sampling
        self.params = lambda request: VllmEngine.params(self, request)  # type: ignore[arg-type]


class Stock:
    """Reads what vLLM's own output processor makes of each step, in the process that writes the files."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def generate(self, requests: list[Request], stopped: Callable[[], bool] = never_stop) -> Iterator[list[Completion]]:
        llm_engine = self._loaded._llm.llm_engine
        under_way = {f"{r.task_id}/{r.sample_id}": r for r in requests}
        for name, request in under_way.items():
            prompt = {"prompt_token_ids": request.prompt}
            llm_engine.add_request(name, prompt, self._loaded.params(request))
        while llm_engine.has_unfinished_requests() and not stopped():
            done = []
            for output in llm_engine.step():
                one = output.outputs[0]
                stop, count = one.finish_reason == "stop", len(one.token_ids)
                request = under_way[output.request_id]
                done.append(Completion(request, one.text, stop, count, float(one.cumulative_logprob)))
            if done:
                yield done

    def close(self) -> None: ...


# --- the command ------------------------------------------------------------------------------------------------------


class Process:
    """An engine's process. A context manager: left, it is ended."""

    def __init__(self, kind: str, plan: Plan, log: Path) -> None:
        self.kind = kind
        self._log = log
        with log.open("ab") as said:
            command = [sys.executable, __file__, "--worker", kind]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        try:
            self.start_s = float(self._ask(json.dumps(asdict(plan)))["start_s"])
        except BaseException:
            self.__exit__()
            raise

    def turn(self, contestant: str) -> Turn:
        return Turn(**self._ask(contestant))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write(line.encode() + b"\n")
            self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            words = self._log.read_text(errors="replace").strip().splitlines()
            last = words[-1][:300] if words else "it said nothing"
            raise BenchError(f"{self.kind}: ended with {self._child.wait()}: {last}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise (InputError if found["code"] == 2 else OutsideError)(found["error"])
        return found

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()


class Busy:
    """Watches how busy the first GPU is while something runs: `share`, afterwards; None where there is none."""

    def __init__(self) -> None:
        self.share: float | None = None
        self._watch: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Busy":
        if gpu.usable():
            query = ["--id=0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
            self._watch = subprocess.Popen(["nvidia-smi", *query], stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch:
            self._watch.terminate()
            said, _ = self._watch.communicate()
            if figures := [float(line) for line in said.splitlines() if line.strip().isdecimal()]:
                self.share = statistics.mean(figures) / 100


def measure(plan: Plan) -> tuple[list[Turn], dict[str, float]]:
    """A turn that warms each engine up, and the rounds, each in an order of its own; and seconds to load, by kind."""
    kinds = {_kind(contestant): contestant for contestant in plan.contestants}  # one contestant warms an engine up
    turns: list[Turn] = []
    start_s: dict[str, float] = {}
    together = [[kind] for kind in kinds] if gpu.usable() else [list(kinds)]
    with (
        tempfile.TemporaryDirectory(prefix="fractal-bench-") as place,
        console.bar("bench", len(plan.contestants) * plan.rounds + 2 * len(kinds)) as bar,
    ):
        for group in together:
            with ExitStack() as stack:
                loaded: dict[str, Process] = {}
                for kind in group:
                    loaded[kind] = stack.enter_context(Process(kind, plan, Path(place) / f"{kind}.log"))
                    start_s[kind] = loaded[kind].start_s
                    bar.advance(note=f"{kind} is loaded")
                for number in range(plan.rounds + 1):
                    mine = [contestant for contestant in plan.contestants if _kind(contestant) in group]
                    warm = [kinds[kind] for kind in group]
                    for contestant in order(mine, number, plan.seed) if number else warm:
                        with Busy() as busy:
                            turn = loaded[_kind(contestant)].turn(contestant)
                        turn = replace(turn, round=number, busy=busy.share)
                        turns.append(turn)
                        bar.advance(note=f"{contestant} {turn.rate:.0f} tokens/s")
    return turns, start_s


def _kind(contestant: str) -> str:
    """Whose process it is."""
    return KINDS.get(contestant, contestant)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks/generate.py", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--model", default=models.EMBEDDED, help=f"a folder or a hub id [{models.EMBEDDED}]")
    add("--problems", help="as for fractal generate [default: ../shared/mbpp/mbpp.jsonl, else starter]")
    add("--split", help="as for fractal generate [all]")
    add("--limit", type=int, default=16, help="problems of each split [16]")
    add("--n", type=int, default=4, help="samples a problem [4]")
    add("--rounds", type=int, default=3, help="turns of each contestant [3]")
    add("--max-tokens", type=int, default=256, help="new tokens of each sample at most [256]")
    add("--temperature", type=float, default=0.8, help="[0.8]")
    add("--seed", type=int, default=0, help="of the samples and of all orders [0]")
    add("--engines", type=int, default=2, help="engines of the contestant several [2]")
    add("--instant", action="store_true", help="a model that answers at once: what Python costs")
    add("--only", help=f"some of: {','.join(TITLES)}")
    add("--quick", action="store_true", help="a smoke run: 2 problems a split, 2 samples, 24 tokens, one round")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files [runs/bench]")
    add("--worker", help=argparse.SUPPRESS)
    return found


def plan_of(given: argparse.Namespace) -> Plan:
    """The options, checked. Raises InputError."""
    contestants = chosen(given.only, TITLES)
    if given.instant and not given.only:
        contestants = list(INSTANT)
    if given.instant and (wrong := [c for c in contestants if c not in INSTANT]):
        raise InputError(f"--instant with --only {wrong[0]}: of no use; what can be had: {', '.join(INSTANT)}.")
    if min(given.limit, given.n, given.rounds, given.engines) < 1:
        raise InputError("--limit, --n, --rounds and --engines must be positive.")
    Sampling(given.n, given.temperature, 1.0, given.max_tokens, given.seed)
    beside = SHARED / "mbpp" / "mbpp.jsonl"
    problems = given.problems or (str(beside) if beside.exists() else "starter")
    size = {"limit": 2, "n": 2, "rounds": 1, "max_tokens": 24} if given.quick else {
        "limit": given.limit, "n": given.n, "rounds": given.rounds, "max_tokens": given.max_tokens}  # fmt: skip
    more = {"engines": given.engines, "instant": given.instant, "split": given.split}
    return Plan(contestants, given.model, problems, temperature=given.temperature, seed=given.seed, **size, **more)


def available(plan: Plan) -> Plan:
    """The plan without the contestants that this machine cannot have, each with one line that says why."""
    left_out: dict[str, str] = {}
    if trouble := why_no_vllm():
        left_out |= dict.fromkeys([c for c in TITLES if c != "transformers"], trouble)
    if trouble := docker_engine.problem():
        left_out.setdefault("overlapped", trouble)
    if not gpu.usable():
        left_out.setdefault("defaults", "vLLM's own settings take 92 % of a machine's memory")
        if not plan.instant:
            left_out.setdefault("several", "one engine fills all processors")
    for contestant in plan.contestants:
        if contestant in left_out:
            console.warn(f"bench: left out {contestant}: {left_out[contestant]}")
    contestants = [c for c in plan.contestants if c not in left_out]
    if not contestants:
        raise OutsideError("no contestant is left.")
    return replace(plan, contestants=contestants)


def run(given: argparse.Namespace) -> Path:
    """Measure, print, and return the path of the figures."""
    plan = plan_of(given)
    load(plan.problems, plan.split, plan.limit)
    models.resolve(plan.model)
    plan = available(plan)
    facts = machine()
    turns, start_s = measure(plan)
    found = summary(turns)
    for one in tables(found, plan):
        show(one)
    for line in remarks(found, gpu.usable()):
        console.say(line)
    values = {"machine": facts, **found, "start_s": start_s, "turns": [asdict(replace(t, texts=[])) for t in turns]}
    return save(given.out, "generate", plan, values)


def main() -> int:
    given = parser().parse_args()
    if given.worker:
        return work(given.worker)
    return outcome(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
