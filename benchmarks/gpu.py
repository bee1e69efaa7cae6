"""The whole table of a GPU in one command: `invoke bench --what=gpu`, or `python benchmarks/gpu.py --help`.

How long the engine takes to start, with empty caches and again; generation against bare vLLM, vLLM's own settings,
several engines and the mission's 90.6 samples a second, with the share of the time in which the GPU computed; the
critic's epoch and its scoring, with model FLOP utilisation. It takes about half an hour of an A100. The table goes into
a Markdown file in the form of docs/log.md, the figures into JSON files beside it.

Exit codes: 0 done; 1 a measurement failed; 2 bad input or usage; 3 there is no GPU; 130 interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from benchmarks import generate as generation
from benchmarks.verify import BenchError, machine, outcome, save
from fractal import console
from fractal.errors import OutsideError
from fractal.generate import models
from fractal.install import gpu
from fractal.jsonl import write_whole

HERE = Path(__file__).parent
# Where vLLM, torch, Triton, FlashInfer and CUDA keep what they have compiled.
CACHES = (
    "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH",
)  # fmt: skip
CRITIC_PROBLEMS = 90  # of each split
CONTESTANTS = "bare,defaults,ours,alone,overlapped"


@dataclass(frozen=True)
class Plan:
    """What is asked for. The defaults are the mission: 8,150 samples of 163 problems."""

    model: str = "Qwen/Qwen2.5-Coder-1.5B-Instruct"
    problems: str = "mbpp-sanitized"
    split: str = "train,validation"
    limit: int = 1000
    n: int = 50
    rounds: int = 3
    max_tokens: int = 320
    engines: tuple[int, ...] = (2, 3)
    quick: bool = False

    @property
    def words(self) -> list[str]:
        """Options of benchmarks/generate.py."""
        words = ["--model", self.model, "--problems", self.problems, "--limit", str(self.limit), "--n", str(self.n)]
        words += ["--rounds", str(self.rounds), "--max-tokens", str(self.max_tokens)]
        return words + (["--split", self.split] if self.split else [])


QUICK = Plan(models.EMBEDDED, "starter", "test", 2, 2, 1, 16, (), quick=True)


# --- measuring --------------------------------------------------------------------------------------------------------


def start_seconds(plan: Plan) -> dict[str, float]:
    """Seconds from nothing to a loaded engine: with empty caches, and with what that has left."""
    wanted = generation.Plan(["ours"], plan.model, plan.problems, 1, 1, 1, plan.max_tokens, split=plan.split or None)
    found = {}
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(prefix="fractal-cold-") as place:
        try:
            os.environ |= {name: f"{place}/{name.lower()}" for name in CACHES}
            for name in ("cold", "warm"):
                begin = time.perf_counter()
                with generation.Process("ours", wanted, Path(place) / f"{name}.log"):
                    found[name] = time.perf_counter() - begin
                console.say(f"start, {name}: {found[name]:.1f} s")
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
    return found


def bench(script: str, words: list[str], out: Path) -> dict[str, Any]:
    """One of the other benchmarks; its figures. What it prints goes to the terminal."""
    command = [sys.executable, str(HERE / script), *words, "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    print(*lines[:-1], sep="\n", flush=True)
    if done.returncode or not lines:
        raise BenchError(f"{script} ended with exit code {done.returncode}: its output stands above.")
    found: dict[str, Any] = json.loads(Path(lines[-1]).read_text())
    return found


def measure(plan: Plan, out: Path) -> dict[str, Any]:
    values: dict[str, Any] = {"start_s": start_seconds(plan)}
    values["generate"] = bench("generate.py", [*plan.words, "--only", CONTESTANTS], out)
    values["several"] = {
        str(count): bench("generate.py", [*plan.words, "--only", "several", "--engines", str(count)], out)
        for count in plan.engines
    }
    words = ["--model", plan.model, "--problems", plan.problems]
    size = ["--quick"] if plan.quick else ["--limit", str(CRITIC_PROBLEMS), "--n", str(plan.n), "--rounds", "2"]
    values["critic"] = bench("critic.py", [*words, *size], out)
    return values


# --- the entry for the log --------------------------------------------------------------------------------------------


def entry(plan: Plan, values: dict[str, Any], facts: dict[str, Any], where: str, day: str) -> str:
    """The table as Markdown, in the form of docs/log.md. Pure."""
    rows = [(generation.TITLES[row["contestant"]], row) for row in values["generate"]["rows"]]
    rows += [(f"{generation.TITLES['several']} ({count})", one["rows"][0]) for count, one in values["several"].items()]
    text = [f"## {day}: generation and critic on {where}"]
    size = f"n = {plan.n}, at most {plan.max_tokens} tokens, temperature 0.8, {plan.rounds} rounds"
    text += [f"Setup    {plan.model}, {plan.problems} {plan.split}, {size}; {facts.get('commit') or 'no commit'}"]
    text += [f"         `invoke bench --what=gpu`; driver {gpu.driver_version() or 'none'}"]
    start = values["start_s"]
    text += [f"Result   start with empty caches {start['cold']:.0f} s, again {start['warm']:.0f} s"]
    text += [f"         {'':<40} samples/s  of {generation.MISSION}  tokens/s  GPU busy"]
    for name, row in rows:
        rate, tokens, busy = row["samples_per_s"], row["tokens_per_s"], generation.share(row["busy"]) or "-"
        text += [f"         {name:<40} {rate:>9,.1f} {rate / generation.MISSION:>8.2f} {tokens:>9,.0f} {busy:>9}"]
    text += [f"         ratios within a round{'':<21} median  low to high"]
    for one in values["generate"]["ratios"]:
        text += [f"         {one['name']:<42} {one['median']:>6.3f}  {one['min']:.3f} to {one['max']:.3f}"]
    text += [f"         {generation.verdict(values['generate']['same_samples'], gpu.usable())}"]
    text += _critic(values["critic"])
    return "\n".join(text) + "\n"


def _critic(found: dict[str, Any]) -> list[str]:
    from benchmarks.critic import TITLES

    text = [f"         {'critic':<40} samples/s   seconds  start, s   TFLOP/s   MFU"]
    for contestant, rate in found["rates"].items():
        seconds, start_s = found["seconds"][contestant], found["start_s"][contestant]
        flops, used = found["flops_per_s"].get(contestant), found["utilisation"].get(contestant)
        work = f"{flops / 1e12:>9,.2f}" if flops else ""
        row = f"{TITLES[contestant]:<40} {rate:>9,.1f} {seconds:>9,.1f} {start_s:>9,.1f} {work:>9} "
        text += [f"         {row}{generation.share(used):>5}".rstrip()]
    return text


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=(__doc__ or "").partition("\n")[0])
    add, plan = found.add_argument, Plan()
    add("--model", default=plan.model, help=f"a folder or a hub id [{plan.model}]")
    add("--problems", default=plan.problems, help=f"as for fractal generate [{plan.problems}]")
    add("--split", default=plan.split, help=f"[{plan.split}]")
    add("--limit", type=int, default=plan.limit, help=f"problems of each split [{plan.limit}]")
    add("--n", type=int, default=plan.n, help=f"samples a problem [{plan.n}]")
    add("--rounds", type=int, default=plan.rounds, help=f"turns of each contestant [{plan.rounds}]")
    add("--quick", action="store_true", help="a smoke run with the embedded model, also without a GPU")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the files [runs/bench]")
    return found


def run(given: argparse.Namespace) -> Path:
    """Measure, print, and return the path of the table."""
    if not given.quick and not gpu.usable():
        raise OutsideError(
            f"no GPU to measure: {gpu.problem() or 'torch is a build for the CPU'}. --quick tries the command."
        )
    plan = QUICK if given.quick else Plan(
        given.model, given.problems, given.split, given.limit, given.n, given.rounds
    )  # fmt: skip
    facts = machine()
    values = measure(plan, given.out)
    figures = save(given.out, "gpu", plan, {"machine": facts, **values})
    where = gpu.gpus()[0].name if gpu.usable() else "a processor without a GPU"
    text = entry(plan, values, facts, where, time.strftime("%Y-%m-%d"))
    console.say(text)
    table = figures.with_suffix(".md")
    write_whole(table, text.encode())
    return table


def main() -> int:
    return outcome(lambda: run(parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
