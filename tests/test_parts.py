"""samples.jsonl in parts: written and read as one file, wherever a part ends and whoever was killed."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.errors import InputError, RecordError
from fractal.generate.sample_files import read_samples
from fractal.jsonl import Appender, encode_all, iter_blocks, iter_lines, part_files, read_jsonl, read_keys, write_jsonl
from fractal.records import Problem, Sample
from fractal.report import check, criteria
from fractal.report import stage as report_stage
from fractal.report.inputs import NUMBERS, PAGE, TABLE
from fractal.rundir import RunDir
from fractal.selection import stage as selection_stage
from tests.test_check import finish


def sample(sample_id: int) -> Sample:
    return Sample("1", sample_id, "é" * (sample_id % 40), "", "stop", 1, None, 1, "m")


def roll(path: Path, part_bytes: int) -> int:
    """Write a file's samples anew, in parts. Returns the number of parts."""
    samples = read_jsonl(path, Sample)
    path.unlink()
    with Appender(path, part_bytes) as file:
        for one in samples:
            file.write([one])
    return len(part_files(path))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=5),
    st.integers(1, 2000),
    st.lists(st.sampled_from([b"", b"{", b'{"task_id":"1","sample_id":0', b"\xc3"]), min_size=5, max_size=5),
)
def test_each_sample_stands_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, calls: list[list[int]], part_bytes: int, torn: list[bytes]
) -> None:
    """Each call writes batches of some sizes, and is killed in the middle of a line; the next one asks what is there."""
    path = tmp_path_factory.mktemp("parts") / "samples.jsonl"
    expected: list[Sample] = []
    batches: list[bytes] = []
    for sizes, rest in zip(calls, torn, strict=False):
        assert len(read_keys(path)) == len(expected)
        with Appender(path, part_bytes) as file:
            for size in sizes:
                batch = [sample(len(expected) + i) for i in range(size)]
                file.write(batch)
                expected += batch
                batches.append(encode_all(batch))
        with part_files(path)[-1].open("ab") as last:
            last.write(rest)
        assert read_jsonl(path, Sample) == expected
    with Appender(path, part_bytes):
        pass
    assert b"".join(iter_blocks(path)) == b"".join(batches), "as if it were one file"
    files = part_files(path)
    assert all(file.stat().st_size >= part_bytes for file in files[:-1])
    lines = [(line.path, line.number) for line in iter_lines(path, own=True)]
    assert lines == [(file, i + 1) for file in files for i in range(file.read_bytes().count(b"\n"))]
    shares: list[float] = []
    many = [*iter_lines(path, own=True, watch=shares.append)]
    assert len(many) == len(expected)


def test_what_has_been_read_is_told_as_a_share_of_all_parts(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with Appender(path, 1) as file:
        for _ in range(3):
            file.write(sample(i) for i in range(9000))
    shares: list[float] = []
    assert sum(1 for _ in iter_lines(path, watch=shares.append)) == 27_000
    assert shares == sorted(shares)
    assert len(shares) == 6
    assert 0 < shares[0] < 1 / 3 < shares[2] < 2 / 3 < shares[4] < 1


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with Appender(path, 1) as file:
        for i in range(4):
            file.write([sample(i)])
    problem = Problem("1", "p", "", [], "", "f", "test")
    assert [one.sample.sample_id for one in read_samples(path, {"1": problem})] == [0, 1, 2, 3]
    last = tmp_path / "samples-00004.jsonl"
    last.touch()
    assert len(list(iter_lines(path))) == 4, "a writer was killed where it had begun a part"
    last.unlink()
    with pytest.raises(InputError, match=r"samples\.jsonl: goes on in samples-00001\.jsonl"):
        write_jsonl(path, [sample(9)])
    second = tmp_path / "samples-00001.jsonl"
    whole = second.read_bytes()
    second.write_bytes(whole[:-5])
    for own in (True, False):
        with pytest.raises(
            RecordError, match=r"samples-00001\.jsonl: its last line is cut off, and samples-00002\.jsonl"
        ):
            list(iter_lines(path, own=own))
    second.write_bytes(whole.replace(b'"tokens":1', b'"tokens":"many"'))
    with pytest.raises(RecordError, match=r"samples-00001\.jsonl: line 1: not a Sample"):
        read_jsonl(path, Sample)
    second.write_bytes(whole.replace(b'"sample_id":1', b'"sample_id":0'))
    with pytest.raises(RecordError, match=r"samples-00001\.jsonl: line 1: task_id 1, sample_id 0 stands twice"):
        read_keys(path)
    for missing in (second, path):
        missing.rename(tmp_path / "elsewhere")
        for work in (lambda: read_keys(path), lambda: Appender(path)):
            with pytest.raises(RecordError, match=f"{missing.name}: is missing, and samples-00003.jsonl is there"):
                work()
        (tmp_path / "elsewhere").rename(missing)


def test_only_a_runs_samples_have_parts(tmp_path: Path) -> None:
    for name in ("labels.jsonl", "labels-00001.jsonl", "samples-1.jsonl", "samples-00001-of-00002.jsonl"):
        (tmp_path / name).write_bytes(encode_all([sample(0)]))
    assert part_files(tmp_path / "labels.jsonl") == [tmp_path / "labels.jsonl"]
    assert part_files(tmp_path / "samples.jsonl") == [tmp_path / "samples.jsonl"]
    with Appender(tmp_path / "labels.jsonl", 1) as file:
        file.write([sample(1)])
        file.write([sample(2)])
    assert len(read_jsonl(tmp_path / "labels.jsonl", Sample)) == 3


def test_selection_and_report_are_those_of_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finish(tmp_path / "runs/toy")
    before = {name: (path / name).read_bytes() for name in ("selection.jsonl", "manifest.json", NUMBERS, PAGE, TABLE)}
    assert roll(path / "samples.jsonl", 300) > 5
    capsys.readouterr()
    with RunDir(path) as folder:
        selection_stage.run(folder)
        report_stage.run(folder)
    said = capsys.readouterr()
    assert (said.out + said.err).count("nothing to do") == 2
    assert check.run(RunDir(path)) == 0
    assert "all the same" in capsys.readouterr().out
    assert {name: (path / name).read_bytes() for name in before} == before
    (path / "selection.jsonl").unlink()
    (path / NUMBERS).unlink()
    with RunDir(path) as folder:
        selection_stage.run(folder)
        report_stage.run(folder)
        (added,) = criteria.record(folder, [criteria.parse("samples >= 11")])
        assert added.samples == len(read_jsonl(path / "samples.jsonl", Sample))
    assert (path / "selection.jsonl").read_bytes() == before["selection.jsonl"]
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy/samples-00002.jsonl").unlink()
    with pytest.raises(RecordError, match="is missing"):
        check.run(RunDir(tmp_path / "copy"))
