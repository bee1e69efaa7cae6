"""What is still to be labelled: samples and labels are read side by side, in memory that does not grow with them.

Labels stand in the order of their samples. Where one is missing among others, or is a `sandbox_error`, the sample is
run again and its new label put in that place; the labels of all samples behind the last label are appended.
"""

import glob
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fractal.errors import InputError
from fractal.generate.sample_files import FileSample
from fractal.jsonl import decode, encode, iter_lines, write_parts
from fractal.records import Label, Sample, code_sha256

ReadSamples = Callable[[], Iterable[FileSample]]  # reads them from the start
NO_VERDICT = "sandbox_error"  # the sandbox's fault: the sample is run again


@dataclass(frozen=True, slots=True)
class Plan:
    """What a labels file lacks."""

    samples: int
    redo: int  # without a verdict among the first `end` samples
    end: int  # the samples from this one on have no label: theirs are appended

    @property
    def todo(self) -> int:
        return self.redo + self.samples - self.end


class LabelReader:
    """Reads labels beside their samples."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = iter_lines(path, own=True)
        self.raw, self.number = b"", 0  # the line of the label taken last
        self._step()

    def _step(self) -> None:
        self.line = next(self._lines, None)
        self.next = None if self.line is None else decode(self.line, Label)

    def take(self, sample: Sample) -> Label | None:
        """The sample's label, if it is the next one."""
        label = self.next
        if label is None or label.sample_id != sample.sample_id or label.task_id != sample.task_id:
            return None
        assert self.line is not None
        self.raw, self.number = self.line.data, self.line.number
        self._step()
        return label


def make_plan(read: ReadSamples, labels: Path) -> Plan:
    """Compare the two files. Labels in another order than their samples are rewritten in theirs.

    Raises InputError for labels that are not of these samples; the file is then as it was.
    """
    for draft in labels.parent.glob(f".{glob.escape(labels.name)}.[0-9]*"):  # of a killed call: nobody else writes here
        draft.unlink()
    labels.with_name(f"{labels.name}.redo").unlink(missing_ok=True)  # of an earlier version of this program
    plan = compare(read(), labels)
    if plan is None:
        _sort(read, labels)
        plan = compare(read(), labels)
        assert plan is not None
    return plan


def compare(samples: Iterable[FileSample], labels: Path) -> Plan | None:
    """One pass over both files; None where the labels do not follow the samples.

    Raises InputError for a label of another program than the sample's.
    """
    reader = LabelReader(labels)
    total = redo = gap = end = 0
    for total, file_sample in enumerate(samples, 1):
        label = reader.take(file_sample.sample) if reader.next is not None else None
        if label is None:
            gap += 1
            continue
        _check_program(file_sample, label, reader)
        redo += gap + (label.status == NO_VERDICT)
        gap, end = 0, total
    return Plan(total, redo, end) if reader.next is None else None


def without_verdict(samples: Iterable[FileSample], labels: Path, end: int) -> Iterator[Sample]:
    """Those of the first `end` samples that have no verdict."""
    reader = LabelReader(labels)
    for file_sample in islice(samples, end):
        label = reader.take(file_sample.sample)
        if label is None or label.status == NO_VERDICT:
            yield file_sample.extracted()


def without_label(samples: Iterable[FileSample], end: int) -> Iterator[Sample]:
    """The samples from number `end` on."""
    return (file_sample.extracted() for file_sample in islice(samples, end, None))


def labelled(samples: Iterable[FileSample], labels: Path) -> Iterator[tuple[Sample, Label]]:
    """Samples with their labels; one without is left out. Raises InputError as `compare` does."""
    reader = LabelReader(labels)
    for file_sample in samples:
        if label := reader.take(file_sample.sample):
            yield _check_program(file_sample, label, reader), label
    if reader.next is not None:
        raise InputError(
            f"{labels}: line {reader.line.number if reader.line else 0}: task_id {reader.next.task_id}, sample_id "
            f"{reader.next.sample_id} is not among the samples, or not in their order. `fractal verify` with these "
            "files says which, and puts them in order."
        )


def redo(read: ReadSamples, labels: Path, end: int, verify: Callable[[Iterator[Sample]], Iterator[Label]]) -> None:
    """Run those of the first `end` samples that have no verdict, and put their labels in their places.

    An error of `verify` or Ctrl-C keeps the labels that came before it, and is raised again; a kill leaves the file as
    it was.
    """
    new_labels = verify(without_verdict(read(), labels, end))
    failure: BaseException | None = None

    def new_label() -> bytes | None:
        nonlocal failure
        try:
            return encode(next(new_labels)) if failure is None else None
        except BaseException as error:
            failure = error
            return None

    def lines() -> Iterator[bytes]:
        reader = LabelReader(labels)
        for file_sample in islice(read(), end):
            label = reader.take(file_sample.sample)
            if (label is None or label.status == NO_VERDICT) and (line := new_label()):
                yield line
            elif label is not None:
                yield reader.raw

    write_parts(labels, lines())
    if failure is not None:
        raise failure


def _sort(read: ReadSamples, labels: Path) -> None:
    """Rewrite labels in the order of their samples; other tools may leave them in another one."""
    lines: dict[tuple[str, int], bytes] = {}
    for line in iter_lines(labels, own=True):
        label = decode(line, Label)
        key = (label.task_id, label.sample_id)
        if key in lines:
            raise line.error(f"task_id {key[0]}, sample_id {key[1]} stands twice", "Delete one of the lines.")
        lines[key] = line.data

    def in_order() -> Iterator[bytes]:
        for file_sample in read():
            sample = file_sample.sample
            yield lines.pop((sample.task_id, sample.sample_id), b"")
        if lines:
            task_id, sample_id = min(lines)
            raise InputError(
                f"{labels}: holds a label of task_id {task_id}, sample_id {sample_id}, which is not among the "
                "samples. Name another file."
            )

    write_parts(labels, in_order())


def _check_program(file_sample: FileSample, label: Label, reader: LabelReader) -> Sample:
    """The sample, if the label is of its program. Raises InputError."""
    sample = file_sample.extracted()
    digest = code_sha256(sample.code)
    if digest != label.code_sha256:
        raise InputError(
            f"{reader.path}: line {reader.number}: is of another program than the samples now hold for task_id "
            f"{label.task_id}, sample_id {label.sample_id} (code_sha256 {label.code_sha256[:12]}, now {digest[:12]}). "
            "The samples were changed: name another file for their labels, or put the samples back."
        )
    return sample
