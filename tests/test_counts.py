"""What a person is told of the labels: counts that add up, and what was lost."""

import io
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from fractal.jsonl import write_jsonl
from fractal.records import STATUSES, Label
from fractal.verify import counts as verify_counts
from fractal.verify.counts import CountedLabel, Tally

seen = st.builds(
    CountedLabel, st.integers(1, 30).map(str), st.integers(0, 5), st.sampled_from(STATUSES), st.text(max_size=5)
)


def shown(what: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(what)
    return file.getvalue()


def counted(*labels: CountedLabel) -> Tally:
    counts = Tally()
    for one in labels:
        counts.add(one)
    return counts


@given(st.lists(seen, max_size=60))
def test_counts_add_up(labels: list[CountedLabel]) -> None:
    counts = counted(*labels)
    assert counts.total == len(labels) == sum(of.total() for of in counts.problems.values())
    assert counts.statuses == Counter(one.status for one in labels)
    assert len(counts.lost) == min(counts.errors, verify_counts.MAX_LISTED)
    rows = shown(verify_counts.problem_table(counts, complete=True)).splitlines()[2:]
    assert len(rows) == len(counts.problems)
    assert sum(int(row.split()[1]) for row in rows) == len(labels)
    assert sum(int(row.split()[2]) for row in rows) == counts.statuses["passed"]
    bars = shown(verify_counts.status_table(counts)).splitlines()[1:]
    assert sum(int(row.split()[1]) for row in bars) == len(labels)


def test_the_hardest_come_first_with_their_most_common_failure() -> None:
    labels = [
        CountedLabel(str(task), i, "passed" if i < task else "failed" if i else "error", "")
        for task in range(13)
        for i in range(12)
    ]
    text = shown(verify_counts.problem_table(counted(*labels))).splitlines()
    assert text[0].startswith("13 problems: 1 solved by all their samples, 1 by none; the 10 hardest")
    assert text[2].split() == ["0", "12", "0", "0.0", "%", "failed", "11"]
    assert text[4].split() == ["2", "12", "2", "16.7", "%", "failed", "10"]
    assert len(text) == 12
    assert len(shown(verify_counts.problem_table(counted(*labels), complete=True)).splitlines()) == 15


def test_the_summary_line() -> None:
    labels = [
        CountedLabel("1", i, "passed" if i < 614 else "timeout" if i < 635 else "failed", "") for i in range(1000)
    ]
    assert verify_counts.summary(counted(*labels), 1000, 20.0) == (
        "verify: 1,000 samples, 61.4 % pass, 2.1 % timeout, 0 lost, 20 s, 50 a second"
    )
    assert "1,000 samples (10 now), " in verify_counts.summary(counted(*labels), 10, 0.0)


def test_the_first_twenty_losses_are_told_one_by_one() -> None:
    labels = [CountedLabel("7", i, "sandbox_error", f"reason {i}\nmore") for i in range(23)]
    lines = verify_counts.lost_lines(counted(*labels))
    assert lines[0] == "sandbox_error: task_id 7, sample_id 0: reason 0"
    assert lines[20:] == ["... and 3 more"]
    assert verify_counts.lost_lines(counted(*labels[:20]))[-1] == "sandbox_error: task_id 7, sample_id 19: reason 19"
    assert verify_counts.lost_lines(counted()) == []


def test_a_file_is_counted_and_a_torn_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "l"
    assert verify_counts.count(path).total == 0
    write_jsonl(path, [Label("1", i, "passed", True, [], 0.0, 0.0, "", "") for i in range(3)])
    path.write_bytes(path.read_bytes()[:-2])
    assert verify_counts.count(path).statuses == {"passed": 2}
