"""Jobs as data: what the engine's words mean, what a failure means, names."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.cloud import jobs, options
from fractal.cloud.remote_host import RemoteError, failure, transferred
from fractal.errors import InputError


def line(status: str = "exited", code: int = 0, oom: bool = False, **labels: str) -> str:
    label = {jobs.JOB_LABEL: "all-1", jobs.RUN_LABEL: "demo", jobs.ARGUMENTS_LABEL: '["--stage", "all"]'} | labels
    state = {"Status": status, "ExitCode": code, "OOMKilled": oom, "StartedAt": "2026-11-25T10:00:00.1Z"}
    return json.dumps([label, state])


def test_the_engines_words_become_jobs() -> None:
    (job,) = jobs.parse(line("exited", 137, True))
    assert (job.id, job.run, job.arguments) == ("all-1", "demo", ("--stage", "all"))
    assert (job.ended, job.exit_code, job.out_of_memory) == (True, 137, True)
    assert [job.state for job in jobs.parse("\n".join(map(line, ("running", "paused", "created", "dead"))))] == [
        "running", "running", "created", "exited",
    ]  # fmt: skip
    assert jobs.parse("") == []


def test_a_job_waits_for_those_before_it_that_have_not_ended() -> None:
    labels = jobs.job_labels("b", "mine", ("python", "a b.py"), is_command=True, after=("all-1", "gone"))
    (waiting,) = jobs.parse(line("running", **labels))
    assert (waiting.is_command, waiting.after, waiting.command) == (True, ("all-1", "gone"), "python 'a b.py'")
    for state, expected in (("running", ["all-1"]), ("exited", [])):
        (before,) = jobs.parse(line(state))
        assert before.command == "fractal run --stage all"
        assert waiting.waits_for([before, waiting]) == expected


@given(st.text(max_size=80))
def test_no_words_of_an_engine_give_a_traceback(text: str) -> None:
    try:
        jobs.parse(text)
    except RemoteError as error:
        assert "\n" not in str(error)


FAILURES = [  # exit code, killed by the kernel, end of the output, part of the diagnosis
    (1, False, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "smaller --model"),
    (1, False, "ValueError: No available memory for the cache blocks.", "GPU's memory is full"),
    (1, False, "ModuleNotFoundError: No module named 'vllm'", "lacks the package vllm"),
    (137, True, "", "kernel killed"),
    (137, False, "", "killed"),
    (139, False, "", "segmentation fault"),
    (3, False, "fractal: no space left on the disk (x).", "disk of the instance is full"),
    (125, False, 'could not select device driver "" with capabilities: [[gpu]]', "invoke wait"),
]


def test_a_failure_is_named_with_its_remedy() -> None:
    for code, out_of_memory, tail, text in FAILURES:
        (job,) = jobs.parse(line("exited", code, out_of_memory))
        assert text in (jobs.diagnose(job, tail) or ""), tail


def test_the_remedy_for_a_command_of_the_users_is_a_commands() -> None:
    (job,) = jobs.parse(line(code=1, **jobs.job_labels("b", "mine", ("python",), is_command=True)))
    assert "--package=wandb==VERSION" in (jobs.diagnose(job, "ModuleNotFoundError: No module named 'wandb'") or "")
    assert "exec --resume=mine" in (jobs.diagnose(job, "torch.OutOfMemoryError: CUDA out of memory.") or "")


def test_success_and_what_explained_itself_get_no_diagnosis() -> None:
    (done,), (told,) = jobs.parse(line(code=0)), jobs.parse(line(code=2))
    assert jobs.diagnose(done, "CUDA out of memory, but caught") is None
    assert jobs.diagnose(told, "fractal: --n 0: must be above 0.") is None


def test_a_runs_name_is_valid_on_the_instance() -> None:
    for name in ("a b", "..", "-x", "ä", "x" * 65, "a/.."):
        with pytest.raises(InputError, match="cannot be a run's name"):
            options.check_name(Path("runs") / name)
    assert options.check_name(Path("runs/mbpp-0.5B_1")) == "mbpp-0.5B_1"


def test_ids_of_one_second_differ() -> None:
    ids = {jobs.new_id("all") for _ in range(50)}
    assert len(ids) > 45
    assert all(options.RUN_NAME.fullmatch(job) for job in ids)


def test_a_full_disk_is_named() -> None:
    assert "is full" in str(failure("lambda", "x", "write: No space left on device"))
    assert "cannot make a folder: no" in str(failure("lambda", "make a folder", "\nno\n"))


def test_what_rsync_sent() -> None:
    stats = "Number of regular files transferred: 1,003\nTotal transferred file size: 12,345,678 bytes\n"
    assert transferred(stats) == "1003 files, 12.3 MB"
    assert transferred("") == "0 files, 0.0 MB"
