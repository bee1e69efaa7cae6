"""Completions beside what extraction keeps of them, for a count by eye: how often is that not what the model meant?

    python -m benchmarks.extraction --problems problems.jsonl --samples samples.jsonl --count 500

The draw is stratified by problem: round after round, one sample of each problem, in an order that the seed decides, so
that `--start 500 --count 200` shows 200 that are fresh to who has read the first 500. "-" marks a line that extraction
leaves out, "|" one that it keeps and "+" one that it changes (indentation). Nothing is judged here but what needs no
eye: does the program parse and define the entry point, was the reply cut.
"""

import argparse
import difflib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from fractal.generate.extraction import definition_pattern, extract_code
from fractal.generate.sample_files import read_samples
from fractal.problems.formats import read_problems
from fractal.problems.syntax import is_python
from fractal.records import Sample, task_order


def draw(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """All samples in the order in which they are drawn: every problem once in each round, as long as it has samples."""
    by_problem: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda s: (task_order(s.task_id), s.sample_id)):
        by_problem[sample.task_id].append(sample)
    rng = random.Random(seed)
    for group in by_problem.values():
        rng.shuffle(group)
    order = list(by_problem.values())
    rng.shuffle(order)
    return [group[i] for i in range(max(map(len, order), default=0)) for group in order if i < len(group)]


def marked(text: str, code: str) -> list[str]:
    """The reply's lines, each marked as kept or left out."""
    marks = {"- ": "-", "+ ": "+", "  ": "|"}
    compared = difflib.ndiff(text.splitlines(), code.splitlines(), None, None)
    return [f"{marks[line[:2]]} {line[2:]}" for line in compared if line[:2] in marks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=Path, required=True, help="problems in MBPP's or our own schema")
    parser.add_argument("--samples", type=Path, required=True, help="samples with completions, gzipped or not")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--start", type=int, default=0, help="leave out so many of the draw (default 0)")
    parser.add_argument("--count", type=int, default=500, help="show so many (default 500)")
    options = parser.parse_args()
    by_id = {p.task_id: p for p in read_problems(options.problems)}
    samples = [file_sample.sample for file_sample in read_samples(options.samples, by_id)]
    counts: Counter[str] = Counter()
    for sample in draw(samples, options.seed)[options.start : options.start + options.count]:
        name = by_id[sample.task_id].entry_point
        code = extract_code(sample.completion, name)
        remark = "" if definition_pattern(name).search(code) else "missing"
        remark = remark if is_python(code) else "no Python"
        cut = "cut" if sample.finish_reason == "length" else ""
        counts[" and ".join(filter(None, [remark or "defines the entry point", cut]))] += 1
        print(f"=== {sample.task_id}/{sample.sample_id} {name} {cut} {remark}".rstrip())
        print("\n".join(marked(sample.completion, code)))
    shares = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    print(f"\n{sum(counts.values())} drawn of {len(samples)}: {shares}")


if __name__ == "__main__":
    main()
