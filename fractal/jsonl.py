"""JSONL files: reading with the file, line and field of an error; appending and replacing without half-written lines.

`read_jsonl` reads one of our own files, `iter_lines` any JSON or JSONL file, gzipped or not. `Appender` adds lines so
that a kill or a full disk never leaves half a line behind a whole one. What the records hold is in records.py.

A run's samples.jsonl is written in parts: once one has PART_BYTES, the next is samples-00001.jsonl, and so on. Reading
samples.jsonl reads all its parts, as if they were one file.
"""

import errno
import gzip
import hashlib
import io
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import msgspec

from fractal.errors import InputError, OutsideError, RecordError

BLOCK = 1 << 18  # bytes read or written at once
PARTED = "samples.jsonl"  # the file of a run that is written in parts
PART_BYTES = 256 << 20  # from which on no more is added to a part
LATER_PARTS = "samples-[0-9][0-9][0-9][0-9][0-9].jsonl"  # names of its parts but the first, for glob and fnmatch
_encoder = msgspec.json.Encoder()
# First bytes of files that people give for JSON, and what to do with them.
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, expected JSON or JSONL, gzipped or not. Unpack it and give the file in it.",
    b"\xff\xfe": "UTF-16 text, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.",
    b"\xfe\xff": "UTF-16 text, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, expected JSON or JSONL, gzipped or not. Unpack it: zstd -d.",
    b"BZh": "compressed with bzip2, expected JSON or JSONL, gzipped or not. Unpack it: bunzip2.",
    b"\xfd7zX": "compressed with xz, expected JSON or JSONL, gzipped or not. Unpack it: unxz.",
    b"PAR1": "a Parquet file, expected JSON or JSONL. Convert it: datasets.Dataset.from_parquet(FILE).to_json(OUT).",
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Keyed(Protocol):
    """A record of one sample."""

    @property
    def task_id(self) -> str: ...
    @property
    def sample_id(self) -> int: ...


T = TypeVar("T")
K = TypeVar("K", bound=Keyed)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a JSONL file, or one element of a JSON array, with its position for messages."""

    path: Path
    number: int  # 1-based line; for an array, 1-based element
    kind: Literal["line", "element"]
    data: bytes

    def error(self, message: str, remedy: str = "Correct it and run the command again.") -> RecordError:
        return RecordError(f"{self.path}: {self.kind} {self.number}: {message}. {remedy}")


def part_path(path: Path, number: int) -> Path:
    """The name of a part: samples.jsonl, samples-00001.jsonl, …"""
    return path.with_name(f"{path.stem}-{number:05}{path.suffix}") if number else path


def part_files(path: Path) -> list[Path]:
    """The files that samples.jsonl consists of, in order; of another name, and where there is none, the file itself.

    Raises RecordError where one is missing among them.
    """
    if path.name != PARTED:
        return [path]
    numbers = [int(file.stem[-5:]) for file in path.parent.glob(LATER_PARTS)]
    files = [part_path(path, number) for number in range(max(numbers, default=0) + 1)]
    for file in files if numbers else ():
        if not file.exists():
            raise RecordError(
                f"{file}: is missing, and {files[-1].name} is there. Restore it from a copy, or fetch the run again."
            )
    return files


def iter_lines(path: Path, *, own: bool = False, watch: Callable[[float], None] | None = None) -> Iterator[Line]:
    """The records of a JSONL file, or of a JSON array, one by one and not yet decoded; gzipped or not, by content.

    Raises RecordError if there are none. In one of our `own` files a torn last line (a killed writer) is left out, and
    a file that is missing or empty holds no records: that is how every stage starts. `watch` is called now and then
    with the share of the file that has been read. An array is read as a whole. Of a file in parts all are read; only
    the last one can have a torn line, so one at the end of another is damage: RecordError.
    """
    files = part_files(path)
    if len(files) == 1:
        yield from _iter_file(path, own, watch)
        return
    sizes = [file.stat().st_size for file in files]
    for number, file in enumerate(files):
        if number < len(files) - 1 and not _ends_whole(file):
            raise RecordError(
                f"{file}: its last line is cut off, and {files[number + 1].name} goes on. Restore it from a copy, or "
                "fetch the run again."
            )
        if sizes[number]:  # a writer was killed where it had begun the last part
            share = partial(_watch_part, watch, sum(sizes[:number]), sizes[number], sum(sizes)) if watch else None
            yield from _iter_file(file, own, share)


def _watch_part(watch: Callable[[float], None], before: int, size: int, total: int, share: float) -> None:
    """Tell `watch` the share of all parts, from that of one with `size` bytes and `before` in front of it."""
    watch((before + share * size) / total)


def _ends_whole(path: Path) -> bool:
    """Whether a file ends with a whole line; an empty one does."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return file.read() in (b"", b"\n")


def iter_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, of all its parts one after the other, in blocks; none where there is no file."""
    for part in part_files(path):
        if part.exists():
            with part.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    yield block


def file_digest(path: Path) -> "hashlib._Hash":
    """sha256 over the bytes of a file, of all its parts, wherever one ends; of nothing where there is no file."""
    total = hashlib.sha256()
    for block in iter_blocks(path):
        total.update(block)
    return total


def _iter_file(path: Path, own: bool, watch: Callable[[float], None] | None) -> Iterator[Line]:
    if own and not path.exists():
        return
    empty = True
    try:
        with path.open("rb", buffering=0) as raw:
            file = io.BufferedReader(raw, BLOCK)
            beginning = file.peek(4)[:4]
            for mark, refused in OTHER_FORMATS.items():
                if beginning.startswith(mark):
                    raise RecordError(f"{path}: is {refused}")
            gzipped = beginning[:2] == b"\x1f\x8b"
            lines: Iterable[bytes] = io.BufferedReader(gzip.GzipFile(fileobj=file), BLOCK) if gzipped else file
            size = os.fstat(raw.fileno()).st_size if watch else 0
            for number, data in enumerate(lines, 1):
                if number == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if not data or data.isspace():
                    continue
                if own and data[-1] != 10:
                    return
                if empty and not own and data.lstrip()[:1] == b"[":
                    yield from _array(path, data + b"".join(lines))
                    return
                empty = False
                if watch and size and number % 4096 == 0:
                    watch(raw.tell() / size)
                yield Line(path, number, "line", data)
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file. Check the path.") from None
    except IsADirectoryError:
        raise RecordError(f"{path}: is a folder, expected a file.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(f"{path}: damaged gzip file: {error}. Fetch it again.") from error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror}.") from error
    if empty and not own:
        raise RecordError(f"{path}: is empty, expected one JSON object a line.")


def read_lines(path: Path) -> list[Line]:
    """All of `iter_lines`."""
    return list(iter_lines(path))


def decode(line: Line, kind: type[T]) -> T:
    """One record from its line. Raises RecordError with the field and what was expected."""
    try:
        try:
            return cast(T, parse(line.data, kind))
        except msgspec.ValidationError:
            return cast(T, _parse_integer_id(line.data, kind))
    except MALFORMED as error:
        # msgspec: "Expected `int`, got `str` - at `$.task_id`", or where the JSON itself is malformed
        raise line.error(f"not a {kind.__name__}: {error}") from error


def decode_object(line: Line) -> dict[str, Any]:
    """A line of a foreign format as a plain dict; NaN and Infinity as Python's json has them. Raises RecordError."""
    try:
        value = parse(line.data, Any, python=True)
    except MALFORMED as error:
        raise line.error(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise line.error(f"expected a JSON object, got {type(value).__name__}")
    return value


def _array(path: Path, data: bytes) -> list[Line]:
    """The elements of a JSON array, undecoded where msgspec can split it. Raises RecordError."""
    try:
        elements = _elements(data)
    except MALFORMED as error:
        raise RecordError(f"{path}: not valid JSON: {error}.") from error
    if not elements:
        raise RecordError(f"{path}: is an empty array, expected at least one object.")
    return [Line(path, i, "element", element) for i, element in enumerate(elements, 1)]


def _elements(data: bytes) -> list[bytes]:
    try:
        return [bytes(raw) for raw in msgspec.json.decode(data, type=list[msgspec.Raw])]
    except msgspec.DecodeError:
        values = parse(data, Any, python=True)
        if not isinstance(values, list):
            raise
        return [json.dumps(value).encode("ascii") for value in values]


MALFORMED = (msgspec.DecodeError, UnicodeError, RecursionError)  # what parse raises


def parse(data: bytes, kind: Any, *, python: bool = False) -> Any:
    """JSON as a value of a type. msgspec refuses escaped lone surrogates, which `encode` writes: json reads those.

    `python`: what Python's json writes beyond JSON is read, too: NaN, Infinity, and numbers beyond any float.
    """
    try:
        return _decoder(kind).decode(data)
    except msgspec.DecodeError as error:
        if not python and b"\\ud" not in data.lower():
            raise
        try:
            value = json.loads(data)
        except ValueError:
            raise error from None
    return msgspec.convert(value, kind)


def _parse_integer_id(data: bytes, kind: Any) -> Any:
    """A record whose task_id is an integer, as files had it once and as MBPP has it: its digits are the name."""
    value = parse(data, Any)
    if isinstance(value, dict) and type(value.get("task_id")) is int:
        return msgspec.convert(value | {"task_id": str(value["task_id"])}, kind)
    return parse(data, kind)


@lru_cache(maxsize=64)
def _decoder(kind: Any) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(kind)


def iter_jsonl(path: Path, kind: type[T]) -> Iterator[T]:
    """The records of one of our own files one by one, see `iter_lines`. Raises RecordError."""
    return (decode(line, kind) for line in iter_lines(path, own=True))


def read_jsonl(path: Path, kind: type[T]) -> list[T]:
    """All of `iter_jsonl`."""
    return list(iter_jsonl(path, kind))


def encode(record: object) -> bytes:
    """One JSON line. Lone surrogates (possible in programs) are escaped, so any str survives."""
    try:
        return _encoder.encode(record) + b"\n"
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(record)).encode("ascii") + b"\n"


def encode_all(records: Iterable[object]) -> bytes:
    """Their JSON lines, at once."""
    records = list(records)
    try:
        return _encoder.encode_lines(records)
    except UnicodeEncodeError:
        return b"".join(map(encode, records))


def unique(records: Iterable[K], path: Path) -> dict[tuple[str, int], K]:
    """Records by (task_id, sample_id). Raises RecordError on a duplicate."""
    by_key: dict[tuple[str, int], K] = {}
    for record in records:
        key = (record.task_id, record.sample_id)
        if key in by_key:
            raise RecordError(f"{path}: task_id {key[0]}, sample_id {key[1]} stands twice. Delete one of the lines.")
        by_key[key] = record
    return by_key


@dataclass(frozen=True, slots=True)
class Key:
    """What a record of one sample is known by; the record's other fields are skipped when it is read as this."""

    task_id: str
    sample_id: int


class KeySet:
    """A set of (task_id, sample_id), in few bytes: for each problem a count of those from 0 on, and the others.

    A million samples that are numbered from 0 within each problem take no more memory than the problems.

    >>> keys = KeySet()
    >>> keys.add("11", 0), keys.add("11", 0), ("11", 0) in keys
    (True, False, True)
    """

    def __init__(self) -> None:
        self._count: dict[str, int] = {}  # sample_id 0..count-1 are in
        self._others: dict[str, set[int]] = {}
        self._size = 0

    def add(self, task_id: str, sample_id: int) -> bool:
        """Whether the key is new."""
        count = self._count.get(task_id, 0)
        others = self._others.get(task_id)
        if sample_id == count:
            count += 1
            while others and count in others:
                others.remove(count)
                count += 1
            self._count[task_id] = count
        elif 0 <= sample_id < count or (others and sample_id in others):
            return False
        elif others is None:
            self._others[task_id] = {sample_id}
        else:
            others.add(sample_id)
        self._size += 1
        return True

    def __contains__(self, key: tuple[str, int]) -> bool:
        task_id, sample_id = key
        return 0 <= sample_id < self._count.get(task_id, 0) or sample_id in self._others.get(task_id, ())

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeySet):
            return NotImplemented
        return self._size == other._size and self._count == other._count and self._gaps() == other._gaps()

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _gaps(self) -> dict[str, set[int]]:
        return {task_id: others for task_id, others in self._others.items() if others}

    def missing(self, task_id: str, n: int) -> Iterator[int]:
        """Which of sample_id 0..n-1 the problem lacks, in order; the set must not change meanwhile."""
        others = self._others.get(task_id, ())
        return (i for i in range(self._count.get(task_id, 0), n) if i not in others)

    def count_missing(self, task_id: str, n: int) -> int:
        """How many `missing` gives, without counting up to n."""
        present = sum(0 <= i < n for i in self._others.get(task_id, ()))
        return max(0, n - self._count.get(task_id, 0)) - present


def read_keys(path: Path) -> KeySet:
    """The keys of one of our own files, read line by line. Raises RecordError on a duplicate."""
    keys = KeySet()
    for line in iter_lines(path, own=True):
        key = decode(line, Key)
        if not keys.add(key.task_id, key.sample_id):
            raise line.error(
                f"task_id {key.task_id}, sample_id {key.sample_id} stands twice", "Delete one of the lines."
            )
    return keys


class Appender:
    """Appends records to a JSONL file, each batch with one write; a torn last line is cut off at opening.

    Of a file in parts it appends to the last one, and begins another before the batch that finds `part_bytes` there.
    Raises OutsideError when the disk is full; the file then ends with its last whole line.
    """

    def __init__(self, path: Path, part_bytes: int | None = None) -> None:
        self.path, self._part_bytes = path, part_bytes or PART_BYTES
        files = part_files(path)
        self._part = len(files) - 1
        self._open(files[-1])

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise InputError(f"{path}: cannot be made: {error.strerror}. Name another file.") from error
        self._size = self._cut_torn_line()

    def _cut_torn_line(self) -> int:
        """Cut what follows the last newline, reading back from the end. Returns the file's size."""
        size = end = os.fstat(self._fd).st_size
        while end > 0:
            start = max(0, end - (1 << 16))
            block = os.pread(self._fd, end - start, start)
            newline = block.rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            os.ftruncate(self._fd, end)
        return end

    def write(self, records: Iterable[object]) -> None:
        data = encode_all(records)
        if data and self._size >= self._part_bytes and self.path.name == PARTED:
            self.close()
            self._part += 1
            self._open(part_path(self.path, self._part))
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            self._size += len(data)
        except BaseException as error:  # Ctrl-C as well: the next write must not join half a line
            os.ftruncate(self._fd, self._size)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise OutsideError(
                    f"{self.path}: no space left on the disk. What was written is whole; make room and run the "
                    "same command again, it goes on where it stopped."
                ) from error
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_whole(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace a file by one rename, so that a reader or a kill never sees half of it. Raises OutsideError.

    `mode`: the file's permissions; without it the umask decides.
    """
    write_parts(path, [data], mode=mode)


def write_parts(path: Path, parts: Iterable[bytes], *, mode: int | None = None) -> None:
    """`write_whole` for what need not be in memory at once; if `parts` raises, the file stays as it was.

    Raises InputError for a file that has further parts, with which the new one would be read.
    """
    if later := part_files(path)[1:]:
        raise InputError(
            f"{path}: goes on in {later[0].name}. Name another file, or move this one away with its parts."
        )
    target = path.resolve()  # what a link points to, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with draft.open("wb", BLOCK) as out:
            if mode is not None:
                os.fchmod(out.fileno(), mode)
            out.writelines(parts)
            out.flush()
            os.fsync(out.fileno())
        draft.replace(target)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise OutsideError(f"{path}: no space left on the disk. Make room and run the command again.") from error
        raise


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    """Replace a JSONL file as a whole."""
    write_parts(path, map(encode, records))
