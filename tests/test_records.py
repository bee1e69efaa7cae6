"""Records survive kills, tears and full disks; an error names the file, the line and the field."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.errors import InputError, OutsideError, RecordError
from fractal.jsonl import (
    Appender,
    KeySet,
    decode,
    decode_object,
    encode,
    read_jsonl,
    read_keys,
    read_lines,
    unique,
    write_jsonl,
    write_parts,
    write_whole,
)
from fractal.records import SPLITS, STATUSES, Choice, Label, Problem, Sample, Score, task_order
from tests.conftest import ROOT


def joined(text: str) -> str:
    """A high surrogate before a low one is one character: JSON cannot tell them apart."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


text = st.text(st.characters(exclude_categories=()), max_size=30).map(joined)  # with lone surrogates
ids = st.integers(0, 10**30)
number = st.floats(allow_nan=False, allow_infinity=False)
RECORDS: dict[type, st.SearchStrategy[Any]] = {
    Problem: st.builds(Problem, text, text, text, st.lists(text, max_size=3), text, text, st.sampled_from(SPLITS)),
    Sample: st.builds(Sample, text, ids, text, text, text, ids, st.none() | number, st.none() | ids, text),
    Label: st.builds(
        Label, text, ids, st.sampled_from(STATUSES), st.booleans(), st.lists(st.sampled_from(["passed", "failed"])),
        number, number, text, text,
    ),
    Score: st.builds(Score, text, ids, number, number),
    Choice: st.builds(Choice, text, text, st.none() | ids, number),
}  # fmt: skip


def score(task_id: int, sample_id: int = 0) -> Score:
    return Score(str(task_id), sample_id, 0.5, 0.5)


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, kind: type, data: st.DataObject
) -> None:
    records = data.draw(st.lists(RECORDS[kind], max_size=3))
    path = tmp_path_factory.mktemp("records") / "file.jsonl"
    write_jsonl(path, records)
    assert read_jsonl(path, kind) == records


def test_awkward_text_comes_back(tmp_path):
    path = tmp_path / "f.jsonl"
    for awkward in ("\ud800", "a\udc80b", "\udc00\ud800", '\ud800"\\', "\\ud800", "\0\x85\u2028\r\n"):
        choice = Choice("1", awkward, None, 1.0)
        write_jsonl(path, [choice])
        assert read_jsonl(path, Choice) == [choice]
        path.write_bytes(b"[" + encode(choice) + b"," + encode(choice) + b"]")
        assert [decode(line, Choice) for line in read_lines(path)] == [choice, choice]


def test_a_task_id_that_is_an_integer_is_read_as_its_digits(tmp_path: Path) -> None:
    """As in files of before, and of other tools: in any field order, with an escaped lone surrogate beside it."""
    path = tmp_path / "f.jsonl"
    for choice in (Choice("11", "a", None, 1.0), Choice("11", "\ud800", 3, 0.5), Choice("0", "", None, 0.0)):
        line = encode(choice).replace(f'"{choice.task_id}"'.encode(), choice.task_id.encode(), 1)
        assert json.loads(line)["task_id"] == int(choice.task_id)
        path.write_bytes(line)
        assert read_jsonl(path, Choice) == [choice]


@given(st.lists(st.integers(0, 10**30) | st.integers(0, 99)), st.sampled_from(["", "Mbpp/", "a1b", "\u0663"]))
def test_problems_are_in_the_order_of_their_numbers(numbers: list[int], prefix: str) -> None:
    names = [f"{prefix}{number}" for number in numbers]
    assert sorted(names, key=task_order) == [f"{prefix}{number}" for number in sorted(numbers)]


@given(st.lists(st.text() | st.text("0123456789/_a\u0663", max_size=6)))
def test_any_names_have_an_order(names: list[str]) -> None:
    backwards = names[::-1]
    assert sorted(names, key=task_order) == sorted(backwards, key=task_order)
    assert task_order("9" * 5000) > task_order("8" * 5000) > task_order("9" * 4999)


# ---- torn, cut and broken files --------------------------------------------------------------------------------------


def test_every_torn_end_is_cut_and_nothing_else(tmp_path: Path) -> None:
    """For each length at which a killed writer may have stopped: whole lines stay, the next ones follow cleanly."""
    scores = [score(1, i) for i in range(3)]
    whole = b"".join(map(encode, scores))
    path = tmp_path / "scores.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = scores[: whole[:length].count(b"\n")]
        assert read_jsonl(path, Score) == kept
        with Appender(path) as out:
            out.write([scores[-1]])
        assert path.read_bytes() == b"".join(map(encode, [*kept, scores[-1]]))
    path.write_bytes(encode(scores[0]) + b'{"x": "' + b"y" * 200_000)  # longer than a block
    with Appender(path):
        pass
    assert path.read_bytes() == encode(scores[0])


GOOD = json.loads(encode(score(1)))
BROKEN = [
    (json.dumps({**GOOD, "sample_id": "0"}), "Expected `int`, got `str` - at `$.sample_id`"),
    (json.dumps({**GOOD, "task_id": None}), "task_id"),
    (json.dumps({**GOOD, "task_id": True}), "task_id"),
    (json.dumps({**GOOD, "task_id": 1.5}), "task_id"),
    (json.dumps({**GOOD, "score": None}), "score"),
    (json.dumps({**GOOD, "probability": [1]}), "probability"),
    ('{"task_id": 1, "sample_id": 0, "score": 0.5}', "missing required field `probability`"),
    (json.dumps({**GOOD, "sample_id": "\ud800"}), "surrogates"),
    (json.dumps({**GOOD, "score": float("nan")}), "malformed"),
    ('{"task_id": ' + "9" * 5000 + "}", "Score"),
    ('{"task_id": 1, "sample_id": 0, "score": 1e999, "probability": 1}', "score"),
    ('{"task_id": 1, "x": ' + "[" * 100_000, "Score"),
    ('{"task_id": 1, "x": "\\ud800"', "Score"),
    ("[1]", "array"),
    ("7", "int"),
    ("{", "Score"),
    ("not JSON", "Score"),
]


def test_a_broken_line_is_named_with_its_field(tmp_path):
    path, wrong = tmp_path / "scores.jsonl", []
    for line, part in BROKEN:
        path.write_bytes(encode(score(1)) + b"\n" + line.encode() + b"\n" + encode(score(2)))
        with pytest.raises(RecordError) as caught:
            read_jsonl(path, Score)
        message = str(caught.value)
        if not message.startswith(f"{path}: line 3: not a Score: ") or part not in message or "\n" in message:
            wrong.append((line[:60], message))
    assert wrong == []
    label = Label("1", 0, "passed", True, [], 0, 0, "", "")
    path.write_bytes(encode(label).replace(b'"status":"passed"', b'"status":"fine"'))
    with pytest.raises(RecordError, match=r"line 1: .*status"):
        read_jsonl(path, Label)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(tmp_path, data):
    path = tmp_path / "any"
    for content in (data, b"\x1f\x8b" + data, b"[" + data, encode(score(1))[: len(data)] + data):
        path.write_bytes(content)
        for read in (lambda: read_jsonl(path, Score), lambda: [decode(line, Score) for line in read_lines(path)]):
            try:
                read()
            except RecordError as error:
                assert str(path) in str(error)


OBJECTS = [{"a": 1}, {"b": "é"}]


def test_json_jsonl_gzip_and_bom_are_read_alike(tmp_path: Path) -> None:
    contents = [
        json.dumps(OBJECTS).encode(),
        json.dumps(OBJECTS, indent=2).encode(),
        b"\n".join(json.dumps(o).encode() for o in OBJECTS),
        b"\r\n".join(json.dumps(o, ensure_ascii=False).encode() for o in OBJECTS) + b"\r\n\r\n",
        b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode(),
        gzip.compress(json.dumps(OBJECTS).encode(), mtime=0),
    ]
    for content in contents:
        (tmp_path / "f").write_bytes(content)
        assert [decode_object(line) for line in read_lines(tmp_path / "f")] == OBJECTS


def test_a_file_that_holds_no_records_is_refused(tmp_path: Path) -> None:
    damaged = gzip.compress(b"{}" * 999, mtime=0)[:-9]
    refused = {
        b"": "is empty",
        b"\n \n": "is empty",
        b"[]": "empty array",
        b"[{]": "not valid JSON",
        damaged: "damaged gzip",
    }
    for content, complaint in refused.items():
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(RecordError, match=complaint):
            read_lines(tmp_path / "f")
    with pytest.raises(RecordError, match="no such file"):
        read_lines(tmp_path / "none")
    with pytest.raises(RecordError, match="is a folder"):
        read_lines(tmp_path)
    with pytest.raises(RecordError, match=r"task_id 1, sample_id 0 stands twice"):
        unique([score(1), score(1)], Path("f"))


def test_damaged_gzip_is_reported(tmp_path):
    path = tmp_path / "f.gz"
    data = gzip.compress(os.urandom(40).hex().encode())
    for i in range(3, len(data)):  # every cut, and every byte turned over
        for damaged in (data[:i], data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :]):
            path.write_bytes(damaged)
            try:
                read_lines(path)
            except RecordError as error:
                assert "damaged gzip" in str(error)
            else:
                assert 3 < i < 10, "only the header's time, flags and system may differ unnoticed"


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_written_as_one(tmp_path):
    path = tmp_path / "deep" / "scores.jsonl"
    with Appender(path) as file:
        file.write([])
        file.write(score(i) for i in range(3))
        with pytest.raises(TypeError):
            file.write([score(3), object()])
    assert [record.task_id for record in read_jsonl(path, Score)] == ["0", "1", "2"]
    file.close()  # a second time does no harm
    (tmp_path / "file").touch()
    for unusable in (tmp_path, tmp_path / "file" / "scores.jsonl"):
        with pytest.raises(InputError, match="Name another file"):
            Appender(unusable)


def test_ctrl_c_in_a_write_leaves_whole_lines(tmp_path, monkeypatch):
    real = os.write

    def write(fd, data):
        real(fd, bytes(data)[:10])
        raise KeyboardInterrupt

    with Appender(tmp_path / "scores.jsonl") as file:
        file.write([score(1)])
        with monkeypatch.context() as patch:
            patch.setattr("fractal.jsonl.os.write", write)
            with pytest.raises(KeyboardInterrupt):
                file.write([score(2)])
        file.write([score(3)])
    assert read_jsonl(file.path, Score) == [score(1), score(3)]


IMPORTS = "import os, sys\nfrom pathlib import Path\nfrom fractal.jsonl import *\nfrom fractal.records import *\n"
WRITER = (
    IMPORTS
    + """
path = Path(sys.argv[1])
next_id = len(read_jsonl(path, Score))
with Appender(path) as file:
    print("ready", flush=True)
    while True:
        file.write(Score(str(i), 0, 0.5, 0.5) for i in range(next_id, next_id + 50))
        next_id += 50
"""
)


def test_a_killed_writer_goes_on(tmp_path):
    path = tmp_path / "scores.jsonl"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            cwd=tmp_path,
        )
        process.stdout.readline()
        while path.stat().st_size < 4096:
            pass
        process.kill()
        process.communicate()
        with path.open("ab") as file:  # one write is rarely torn: help it
            file.write(b'{"task_id":')
    records = read_jsonl(path, Score)
    assert [record.task_id for record in records] == list(map(str, range(len(records))))


def test_a_write_that_fails_leaves_whole_lines_and_is_resumed(tmp_path: Path) -> None:
    """The process may not grow a file beyond 1,000 bytes (EFBIG, where a full disk is ENOSPC)."""
    path = tmp_path / "s.jsonl"
    script = IMPORTS + (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "out = Appender(Path(sys.argv[1]))\n"
        "try:\n    for i in range(100):\n        out.write([Score('1', 2 * i, 0.5, 0.5), Score('1', 2 * i + 1, 0.5, 0.5)])\n"
        "except OutsideError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert "no space left" in done.stdout
    records = read_jsonl(path, Score)
    assert path.read_bytes().endswith(b"\n")
    assert [record.sample_id for record in records] == list(range(len(records)))
    assert 0 < len(records) < 200
    with Appender(path) as out:
        out.write([score(1, len(records))])
    assert len(read_jsonl(path, Score)) == len(records) + 1


def test_a_full_disk_is_resumed_after(tiny_disk):
    path, ballast = tiny_disk / "scores.jsonl", tiny_disk / "ballast"
    ballast.write_bytes(bytes(40_000))
    with Appender(path) as file:
        written = 0
        with pytest.raises(OutsideError, match=r"scores\.jsonl: no space left"):
            for written in range(10_000):
                file.write([score(written, j) for j in range(7)])
        assert path.read_bytes().endswith(b"\n")
        assert len(read_jsonl(path, Score)) == 7 * written > 0
        ballast.unlink()
        file.write([score(written, j) for j in range(7)])  # the same process may go on, too
    assert len(unique(read_jsonl(path, Score), path)) == 7 * (written + 1)


def test_replacing_a_file_on_a_full_disk_keeps_the_old_one(tiny_disk):
    path = tiny_disk / "labels.jsonl"
    write_whole(path, b"old\n")
    with pytest.raises(OutsideError, match="no space left"):
        write_whole(path, bytes(100_000))
    assert path.read_bytes() == b"old\n"
    assert [file.name for file in tiny_disk.iterdir()] == ["labels.jsonl"], "no draft is left"


def test_a_link_stays_a_link_and_a_failing_source_leaves_the_file(tmp_path):
    write_whole(tmp_path / "f", b"old\n")
    (tmp_path / "link").symlink_to("f")
    write_whole(tmp_path / "link", b"new\n")
    assert (tmp_path / "link").is_symlink()

    def parts():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_parts(tmp_path / "f", parts())
    assert (tmp_path / "f").read_bytes() == b"new\n"
    assert {file.name for file in tmp_path.iterdir()} == {"f", "link"}


# ---- memory ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["1", "2"]), st.integers(0, 9) | st.integers(-3, 10**20))))
def test_a_key_set_is_a_set(pairs):
    keys, plain = KeySet(), set()
    for pair in pairs:
        assert keys.add(*pair) is (pair not in plain)
        plain.add(pair)
        assert len(keys) == len(plain)
    backwards = KeySet()
    for pair in reversed(pairs):
        assert (backwards == keys) == (len(backwards) == len(plain))
        backwards.add(*pair)
    assert backwards == keys
    assert keys != plain
    for pair in {(task_id, i) for task_id in ("1", "2", "3") for i in range(-3, 12)} | plain:
        assert (pair in keys) == (pair in plain)
    for task_id in ("1", "2", "3"):
        for n in (0, 3, 10):
            missing = [i for i in range(n) if (task_id, i) not in plain]
            assert list(keys.missing(task_id, n)) == missing
            assert keys.count_missing(task_id, n) == len(missing)


def test_keys_are_read_without_the_rest_of_their_records(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    assert len(read_keys(path)) == 0
    path.write_bytes(encode(score(1)) + b'{"sample_id": 3, "task_id": 1, "more": [{}]}\n\n' + encode(score(2))[:-1])
    keys = read_keys(path)
    assert [("1", 0) in keys, ("1", 3) in keys, ("2", 0) in keys, len(keys)] == [True, True, False, 2]
    path.write_bytes(encode(score(1)) + encode(score(2)) + encode(score(1)))
    with pytest.raises(RecordError, match=r"s\.jsonl: line 3: task_id 1, sample_id 0 stands twice. Delete one of"):
        read_keys(path)
    path.write_bytes(b'{"task_id": "1"}\n')
    with pytest.raises(RecordError, match="line 1: not a Key: Object missing required field `sample_id`"):
        read_keys(path)


@settings(deadline=None)
@given(st.permutations(range(40)))
def test_a_key_set_of_numbers_from_0_keeps_no_numbers(numbers):
    keys = KeySet()
    assert all(keys.add("1", i) for i in numbers)
    assert keys._count == {"1": 40}
    assert not any(keys._others.values())


def test_many_lines_are_read_in_little_memory(tmp_path):
    """60 MB, gzipped and not, in less than 15 MB more than the interpreter has."""
    row = encode(Sample("1", 0, "x" * 300, "y" * 300, "stop", 1, None, None, "m"))
    (tmp_path / "plain").write_bytes(row * 100_000)
    (tmp_path / "packed").write_bytes(gzip.compress(row * 100_000, 1))
    script = IMPORTS + (
        "import resource\nkib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = kib()\n"
        "shares = []\nn = sum(1 for line in iter_lines(Path(sys.argv[1]), watch=shares.append))\n"
        "assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 1\nprint(n, kib() - before)\n"
    )
    for name in ("plain", "packed"):
        argv = [sys.executable, "-c", script, str(tmp_path / name)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        lines, kib = map(int, done.stdout.split())
        assert (lines, kib < 15_000) == (100_000, True)
