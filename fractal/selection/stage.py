"""Stage 5: labels, scores, outputs -> selection.jsonl: which sample each strategy picks, on the measured splits."""

from fractal import console
from fractal.errors import InputError
from fractal.jsonl import write_jsonl
from fractal.rundir import RunDir
from fractal.selection.outcomes import count_unscored, read_outcomes
from fractal.selection.splits import SEEN, join_splits, measured_splits, parse_splits
from fractal.selection.strategies import choose

FILES = ("problems.jsonl", "samples.jsonl", "labels.jsonl", "scores.jsonl", "outputs.jsonl")  # that decide


def run(folder: RunDir, on: str | None = None) -> None:
    """Write selection.jsonl for the splits in `on` ("test,validation"); by default those of the last time.

    Raises InputError where no sample has been labelled, or none of a split that `on` names.
    """
    before = folder.manifest["config"].get("select", {})
    names = before.get("on") if on is None else parse_splits(on)
    config = {"on": names, "inputs": folder.digest(*FILES)}
    if before == config and folder.file("selection.jsonl").exists():
        console.say("select: the choices are there, nothing to do")
        return
    problems = folder.problems()
    labels = folder.labels()
    labelled = {problems[label.task_id].split for label in labels if label.task_id in problems}
    if missing := [split for split in names or () if split not in labelled]:
        known = ", ".join(sorted(labelled)) or "none"
        raise InputError(f"--on {','.join(names or ())}: the run has no labelled {missing[0]} problem, only {known}.")
    splits = measured_splits({"select": config}, problems.values(), labels)
    with folder.stage("select", "selection.jsonl"):
        evaluated = read_outcomes(folder, splits)
        choices = choose(evaluated)
        write_jsonl(folder.file("selection.jsonl"), choices)
        strategies = {choice.strategy for choice in choices}
        chosen = {choice.task_id for choice in choices}
        console.say(f"select: {len(strategies)} strategies on {len(chosen)} {join_splits(splits)} problems")
    if unscored := count_unscored(evaluated):
        console.warn(
            f"select: {unscored:,} usable {join_splits(splits)} {'sample has' if unscored == 1 else 'samples have'} no "
            f"score: the critic ranks them last. `fractal score --run {folder.path}` scores them."
        )
    if "train" in splits:
        console.warn(f"select: {SEEN}")
    folder.manifest["config"]["select"] = config
    folder.save()
