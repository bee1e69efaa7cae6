"""The generator's speed, as ratios in one run: `invoke bench --what=generate`; `python benchmarks/generate.py --help`.

On the same prompts, settings and seeds, in turns: vLLM's own `LLM.generate` with all of it at once (bare), our vLLM
engine, bare without seeds (what a seed for each sample costs), our generation stage alone and with verification beside
it, and transformers. Ratios are taken within a round, and their median is told: a machine that slows down does so for
all. Each engine lives in a process of its own and waits while another has its turn.

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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from benchmarks.verify import SHARED, BenchError, chosen, machine, order, outcome, save, show
from fractal import console, engine, generate, gpu, models
from fractal.problems import load
from fractal.records import InputError, OutsideError, Problem
from fractal.run import RunDir

ROOT = Path(__file__).resolve().parents[1]
MISSION = 90.6  # samples a second of the earlier project, 8,150 in 90 s on an A100 with a 1.5B model
TITLES = {
    "bare": "bare LLM.generate",
    "ours": "our vLLM engine",
    "unseeded": "bare, without seeds",
    "alone": "generate, stage alone",
    "overlapped": "generate with verify beside",
    "transformers": "our transformers engine",
}
RATIOS = [  # name, numerator, denominator, of what, the target
    ("ours to bare", "ours", "bare", "rate", ">= 0.95"),
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


@dataclass(frozen=True)
class Turn:
    """One contestant, once."""

    round: int  # 0 warms up and is not counted
    contestant: str
    samples: int
    tokens: int
    seconds: float
    digest: str  # of all completions by request: equal where the samples are
    verify_s: float | None = None  # alone: what verifying the same samples takes afterwards

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
        })  # fmt: skip
    ratios = []
    for name, over, under, what, target in RATIOS:
        if found := ratio(turns, over, under, what):
            ratios.append({"name": name, "median": statistics.median(found), "min": min(found), "max": max(found),
                           "target": target, "rounds": found})  # fmt: skip
    same = {t.digest for t in turns if t.contestant in ("bare", "ours")}
    return {"rows": rows, "ratios": ratios, "same_samples": len(same) == 1 if len(same) else None}


def tables(found: dict[str, Any], plan: Plan) -> list[Table]:
    first = Table(title=f"{plan.model}, n = {plan.n}, {plan.rounds} rounds", box=box.SIMPLE_HEAD, pad_edge=False)
    first.add_column("contestant")
    for column in ("samples", "tokens", "tokens/s", "min-max", "samples/s", "s"):
        first.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        rate, spread = f"{row['tokens_per_s']:,.1f}", f"{row['min']:,.1f}-{row['max']:,.1f}"
        counts, each = (f"{row['samples']:,}", f"{row['tokens']:,}"), f"{row['samples_per_s']:,.2f}"
        first.add_row(TITLES[row["contestant"]], *counts, rate, spread, each, f"{row['seconds']:,.1f}")
    second = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("ratio, within a round", "median", "min-max", "target"):
        second.add_column(column, justify="left" if column.startswith("ratio") else "right", no_wrap=True)
    for one in found["ratios"]:
        second.add_row(one["name"], f"{one['median']:.3f}", f"{one['min']:.3f}-{one['max']:.3f}", one["target"])
    return [first, second]


def remarks(found: dict[str, Any], gpu: bool) -> list[str]:
    """What the tables have no column for, a line each."""
    lines = []
    rows = {row["contestant"]: row for row in found["rows"]}
    if found["same_samples"] is not None and {"bare", "ours"} <= rows.keys():
        lines.append(f"bare and ours drew the same samples: {'yes' if found['same_samples'] else 'NO'}")
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
        print("{}", file=said)
        for line in sys.stdin:
            print(json.dumps(asdict(bench.turn(line.strip()))), file=said)
    except (InputError, OutsideError) as error:
        print(json.dumps({"error": str(error), "code": 2 if isinstance(error, InputError) else 3}), file=said)
    return 0


class Bench:
    """One engine with the requests that every contestant gets."""

    def __init__(self, plan: Plan, kind: str) -> None:
        self.plan = plan
        self.problems: list[Problem] = load(plan.problems, None, plan.limit).problems
        files = models.resolve(plan.model)
        self.sampling = generate.Sampling(plan.n, plan.temperature, 1.0, plan.max_tokens, plan.seed)
        tokenizer = generate._tokenizer(str(files.path))
        wanted = [(p, i) for p in self.problems for i in range(plan.n)]
        context = models.context_length(files.path)
        self.requests = generate._requests(wanted, tokenizer, context, self.sampling, {})
        if not self.requests:
            raise InputError(f"--problems {plan.problems}: no prompt fits the model's context.")
        longest = max(len(r.prompt) for r in self.requests)
        self.engine: Any = generate._engine(kind, files.path, self.sampling, models.preferred_dtype(), longest)

    def turn(self, contestant: str) -> Turn:
        if contestant in ("bare", "unseeded", "ours", "alone", "overlapped"):
            self.engine._llm.reset_prefix_cache()
        texts: dict[str, str] = {}
        verify_s = None
        begin = time.perf_counter()
        if contestant in ("bare", "unseeded"):
            tokens = self._bare(contestant == "bare", texts)
        elif contestant in ("alone", "overlapped"):
            return self._stage(contestant)
        else:
            tokens = 0
            for done in self.engine.generate(self.requests):
                tokens += sum(c.tokens for c in done)
                texts |= {f"{c.request.task_id}/{c.request.sample_id}": c.text for c in done}
        seconds = time.perf_counter() - begin
        return Turn(0, contestant, len(self.requests), tokens, seconds, digest(texts), verify_s)

    def _bare(self, seeded: bool, texts: dict[str, str]) -> int:
        params = [self.engine.params(r if seeded else replace(r, seed=None)) for r in self.requests]
        prompts = [{"prompt_token_ids": r.prompt} for r in self.requests]
        outputs = self.engine._llm.generate(prompts, params, use_tqdm=False)
        for request, output in zip(self.requests, outputs, strict=True):
            texts[f"{request.task_id}/{request.sample_id}"] = output.outputs[0].text
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def _stage(self, contestant: str) -> Turn:
        """The stage as `fractal run` has it, from the first request to the last sample, or label, on disk."""
        from fractal import verify
        from fractal.overlap import Overlap
        from fractal.sandbox.container import Limits

        problems = {p.task_id: p for p in self.problems}
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
                beside = overlap if contestant == "overlapped" else None
                if beside:
                    beside.start()
                generate._draw(self.engine, self.requests, problems, path, self.sampling, "m", entry, beside)
                if beside:
                    verify.run(run, Limits(), beside)
            seconds = time.perf_counter() - begin
            if contestant == "alone" and engine.problem() is None:
                begin = time.perf_counter()
                verify.run(run, Limits())
                verify_s = time.perf_counter() - begin
        return Turn(0, contestant, len(self.requests), entry["tokens"], seconds, "", verify_s)


def digest(texts: dict[str, str]) -> str:
    return generate.prompt_sha256(json.dumps(texts, sort_keys=True))


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def process(kind: str, plan: Plan, log: Path) -> Any:
    """An engine's process; yields a function from a contestant to its turn."""
    command = [sys.executable, __file__, "--worker", kind]
    with log.open("ab") as said:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)

    def ask(line: str) -> dict[str, Any]:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(line.encode() + b"\n")
            child.stdin.flush()
        answer = child.stdout.readline()
        if not answer:
            words = log.read_text(errors="replace").strip().splitlines()
            raise BenchError(f"{kind}: ended with {child.wait()}: {words[-1][:300] if words else 'it said nothing'}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise (InputError if found["code"] == 2 else OutsideError)(found["error"])
        return found

    try:
        ask(json.dumps(asdict(plan)))
        yield lambda contestant: Turn(**ask(contestant))
    finally:
        child.kill()
        child.wait()


def measure(plan: Plan) -> list[Turn]:
    """A turn that warms each engine up, and the rounds, each in an order of its own."""
    warm = {_kind(contestant): contestant for contestant in plan.contestants}  # one contestant warms an engine up
    turns: list[Turn] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="fractal-bench-") as place:
        asks: dict[str, Callable[[str], Turn]] = {}
        with console.bar("bench", len(plan.contestants) * plan.rounds + 2 * len(warm)) as bar:
            for kind in warm:
                asks[kind] = stack.enter_context(process(kind, plan, Path(place) / f"{kind}.log"))
                bar.advance(note=f"{kind} is loaded")
            for number in range(plan.rounds + 1):
                for contestant in order(plan.contestants, number, plan.seed) if number else warm.values():
                    turn = replace(asks[_kind(contestant)](contestant), round=number)
                    turns.append(turn)
                    bar.advance(note=f"{contestant} {turn.rate:.0f} tokens/s")
    return turns


def _kind(contestant: str) -> str:
    """Whose process it is."""
    return "transformers" if contestant == "transformers" else "vllm"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks/generate.py", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--model", default=models.EMBEDDED, help=f"a folder or a hub id [{models.EMBEDDED}]")
    add("--problems", help="as for fractal generate [default: ../shared/mbpp/mbpp.jsonl, else starter]")
    add("--limit", type=int, default=16, help="problems of each split [16]")
    add("--n", type=int, default=4, help="samples a problem [4]")
    add("--rounds", type=int, default=3, help="turns of each contestant [3]")
    add("--max-tokens", type=int, default=256, help="new tokens of each sample at most [256]")
    add("--temperature", type=float, default=0.8, help="[0.8]")
    add("--seed", type=int, default=0, help="of the samples and of all orders [0]")
    add("--only", help=f"some of: {','.join(TITLES)}")
    add("--quick", action="store_true", help="a smoke run: 2 problems a split, 2 samples, 24 tokens, one round")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files [runs/bench]")
    add("--worker", help=argparse.SUPPRESS)
    return found


def plan_of(given: argparse.Namespace) -> Plan:
    """The options, checked. Raises InputError."""
    contestants = chosen(given.only, TITLES)
    if min(given.limit, given.n, given.rounds) < 1:
        raise InputError("--limit, --n and --rounds must be positive.")
    generate.Sampling(given.n, given.temperature, 1.0, given.max_tokens, given.seed)
    beside = SHARED / "mbpp" / "mbpp.jsonl"
    problems = given.problems or (str(beside) if beside.exists() else "starter")
    size = {"limit": 2, "n": 2, "rounds": 1, "max_tokens": 24} if given.quick else {
        "limit": given.limit, "n": given.n, "rounds": given.rounds, "max_tokens": given.max_tokens}  # fmt: skip
    return Plan(contestants, given.model, problems, temperature=given.temperature, seed=given.seed, **size)


def available(plan: Plan) -> Plan:
    """The plan without the contestants that this machine cannot have, each with one line that says why."""
    left_out: dict[str, str] = {}
    if trouble := generate.vllm_trouble():
        left_out |= dict.fromkeys([c for c in TITLES if c != "transformers"], trouble)
    if trouble := engine.problem():
        left_out.setdefault("overlapped", trouble)
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
    load(plan.problems, None, plan.limit)
    models.resolve(plan.model)
    plan = available(plan)
    facts = machine()
    turns = measure(plan)
    found = summary(turns)
    for one in tables(found, plan):
        show(one)
    for line in remarks(found, gpu.usable()):
        console.say(line)
    return save(given.out, "generate", plan, {"machine": facts, **found, "turns": [asdict(t) for t in turns]})


def main() -> int:
    given = parser().parse_args()
    if given.worker:
        return work(given.worker)
    return outcome(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
