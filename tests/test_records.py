"""Records survive kills, tears and full disks; what is wrong with a file is said with its place."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.records import (
    SPLITS,
    STATUSES,
    Appender,
    Choice,
    Label,
    OutsideError,
    Problem,
    RecordError,
    Sample,
    Score,
    decode_object,
    encode,
    read_jsonl,
    read_lines,
    unique,
    write_jsonl,
)

text = st.text(st.characters(), max_size=30)  # lone surrogates included
ids = st.integers(0, 2**53)
number = st.floats(allow_nan=False, allow_infinity=False)
RECORDS: dict[type, st.SearchStrategy[Any]] = {
    Problem: st.builds(Problem, ids, text, text, st.lists(text, max_size=3), text, text, st.sampled_from(SPLITS)),
    Sample: st.builds(Sample, ids, ids, text, text, text, ids, st.none() | number, st.none() | ids, text),
    Label: st.builds(
        Label, ids, ids, st.sampled_from(STATUSES), st.booleans(), st.lists(st.sampled_from(["passed", "failed"])),
        number, number, text, text,
    ),
    Score: st.builds(Score, ids, ids, number, number),
    Choice: st.builds(Choice, ids, text, st.none() | ids, number),
}  # fmt: skip


@settings(max_examples=60)
@given(st.data())
@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, kind: type, data: st.DataObject
) -> None:
    records = data.draw(st.lists(RECORDS[kind], max_size=3))
    path = tmp_path_factory.mktemp("records") / "file.jsonl"
    write_jsonl(path, records)
    assert read_jsonl(path, kind) == records


def test_every_torn_end_is_cut_and_nothing_else(tmp_path: Path) -> None:
    """For each length at which a killed writer may have stopped: whole lines stay, the next ones follow cleanly."""
    scores = [Score(1, i, 0.5, 0.25) for i in range(3)]
    whole = b"".join(map(encode, scores))
    for length in range(len(whole) + 1):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes(whole[:length])
        kept = scores[: whole[:length].count(b"\n")]
        assert read_jsonl(path, Score) == kept
        with Appender(path) as out:
            out.write([scores[-1]])
        assert path.read_bytes() == b"".join(map(encode, [*kept, scores[-1]]))


def test_a_torn_end_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(encode(Score(1, 1, 0.0, 0.5)) + b'{"x": "' + b"y" * 200_000)
    with Appender(path):
        pass
    assert path.read_bytes() == encode(Score(1, 1, 0.0, 0.5))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"task_id": 1, "sample_id": 0, "score": 0.5}\n', r"line 1: not a Score: .*probability"),
        (b'\n{"task_id": "1", "sample_id": 0, "score": 0.5, "probability": 1}\n', r"line 2: .*Expected `int`.*task_id"),
        (b'{"task_id": 1, "sample_id\n', r"line 1: "),
        (b"\xff\xfe\n", r"line 1: "),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=rf"scores\.jsonl: {complaint}"):
        read_jsonl(path, Score)


def test_an_unknown_status_is_no_label(tmp_path: Path) -> None:
    label = {
        "task_id": 1,
        "sample_id": 0,
        "status": "fine",
        "passed": True,
        "tests": [],
        "seconds": 0,
        "cpu_seconds": 0,
    }
    (tmp_path / "l.jsonl").write_text(json.dumps({**label, "detail": "", "code_sha256": ""}) + "\n")
    with pytest.raises(RecordError, match=r"line 1: .*status"):
        read_jsonl(tmp_path / "l.jsonl", Label)


def test_a_duplicate_is_refused() -> None:
    with pytest.raises(RecordError, match=r"task_id 1, sample_id 0 stands twice"):
        unique([Score(1, 0, 0.0, 0.5), Score(1, 0, 1.0, 0.5)], Path("f"))


OBJECTS = [{"a": 1}, {"b": "é"}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS).encode(),
        json.dumps(OBJECTS, indent=2).encode(),
        b"\n".join(json.dumps(o).encode() for o in OBJECTS),
        b"\r\n".join(json.dumps(o, ensure_ascii=False).encode() for o in OBJECTS) + b"\r\n\r\n",
        b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode(),
        gzip.compress(json.dumps(OBJECTS).encode()),
    ],
)
def test_json_jsonl_gzip_and_bom_are_read_alike(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    assert [decode_object(line) for line in read_lines(tmp_path / "f")] == OBJECTS


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"[]", "empty array"),
        (b"[{]", "not valid JSON"),
        (gzip.compress(b"{}" * 999)[:-9], "damaged gzip"),
        (None, "no such file"),
    ],
)
def test_a_file_that_holds_no_records_is_refused(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(RecordError, match=complaint):
        read_lines(tmp_path / "f")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is a folder"):
        read_lines(tmp_path)


def test_a_full_disk_leaves_whole_lines_and_is_resumed(tmp_path: Path) -> None:
    """A real failing write: the process may not grow a file beyond 1,000 bytes (EFBIG, where a full disk is ENOSPC)."""
    path = tmp_path / "s.jsonl"
    script = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom fractal.records import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "out = Appender(Path(sys.argv[1]))\n"
        "try:\n    for i in range(100):\n        out.write([Score(1, 2 * i, 0.5, 0.5), Score(1, 2 * i + 1, 0.5, 0.5)])\n"
        "except OutsideError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    found = read_jsonl(path, Score)
    assert path.read_bytes().endswith(b"\n")
    assert [s.sample_id for s in found] == list(range(len(found)))
    assert 0 < len(found) % 2 + len(found) < 200
    with Appender(path) as out:
        out.write([Score(1, len(found), 0.5, 0.5)])
    assert len(read_jsonl(path, Score)) == len(found) + 1


def test_a_full_file_system_says_so(tmp_path: Path) -> None:
    """A real full disk: /dev/full answers every write with ENOSPC."""
    import os

    from fractal import records

    out = Appender(tmp_path / "f")
    os.close(out._fd)
    out._fd = os.open("/dev/full", os.O_WRONLY)
    original, records.os.ftruncate = records.os.ftruncate, lambda *_: None  # /dev/full cannot be truncated
    try:
        with pytest.raises(OutsideError, match="no space left"):
            out.write([Score(1, 1, 0.0, 0.5)])
    finally:
        records.os.ftruncate = original
        os.close(out._fd)
