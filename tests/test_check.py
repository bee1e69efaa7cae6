"""`fractal report --check` and LOG.md: a finished run, recomputed; then changed in every way, and found out."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from fractal.errors import InputError
from fractal.jsonl import write_jsonl
from fractal.report import check, criteria, run_log
from fractal.report import stage as report_stage
from fractal.report.inputs import NUMBERS, PAGE, TABLE
from fractal.report.run_log import COLUMNS
from fractal.rundir import RunDir
from fractal.selection import stage as selection_stage
from tests import pages

GENERATED = {"seconds": 10.0, "end": "2026-11-24T10:00:00+00:00", "tokens": 99, "decode_seconds": 9.0}


def finish(path: Path) -> Path:
    """A run folder as the stages leave it, from records made by hand; selection and report are the real ones."""
    with RunDir(path, create=True) as folder:
        criteria.record(folder, [criteria.parse("critic_gain > 0.9"), criteria.parse("samples >= 10")])
        for name, records in zip(("problems", "samples", "labels", "scores"), pages.run(tests=6, n=4), strict=True):
            write_jsonl(folder.file(f"{name}.jsonl"), records)
        folder.file("critic").mkdir(exist_ok=True)
        epochs = [{"epoch": i, "train_loss": 0.7 - i / 10, "val_acc": 0.5 + i / 10, "chosen": i == 2} for i in (1, 2)]
        write_jsonl(folder.file("critic/metrics.jsonl"), epochs)
        folder.manifest["config"]["generate"] = {"model": "tiny/model", "n": 4, "seed": 0}
        folder.manifest["stages"]["generate"] = dict(GENERATED)
        folder.manifest["stages"]["verify"] = {"seconds": 2.0, "end": "2026-11-24T11:00:00+00:00"}
        folder.manifest["created"] = "2026-11-24T09:00:00+00:00"
        folder.save()
        selection_stage.run(folder)
        report_stage.run(folder)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture
def finished(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "elsewhere"))


def state(path):
    return {one: (one.stat().st_mtime_ns, one.is_file() and one.read_bytes()) for one in sorted(path.rglob("*"))}


def differences(path):
    folder = RunDir(path)
    folder.load()
    return check.compare(folder)[1]


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_all_is_the_same_and_nothing_is_touched(finished, capsys):
    """Also in another folder, by another name; the lock is free for others."""
    before = state(finished)
    assert check.run(RunDir(finished)) == 0
    assert int(capsys.readouterr().out.split(" figures, all the same")[0].replace(",", "")) > 200
    assert state(finished) == before


def test_the_report_does_not_depend_on_when_it_is_written_and_is_written_again_only_for_a_reason(original, finished):
    (finished / PAGE).unlink()
    with RunDir(finished) as folder:
        report_stage.run(folder)
        for name in (PAGE, TABLE, NUMBERS):
            assert (finished / name).read_bytes() == (original / name).read_bytes()
        before = state(finished / "report")
        report_stage.run(folder)
        assert state(finished / "report") == before
        criteria.record(folder, [criteria.parse("auc > 0")])
        report_stage.run(folder)
    assert "auc &gt; 0" in (finished / PAGE).read_text()
    assert differences(finished) == []
    numbers = json.loads((finished / NUMBERS).read_text())
    assert numbers["date"] >= "2026-11-24T11:00:00+00:00"
    assert "report" not in numbers["seconds"]


def test_a_changed_figure_is_named_with_both_values_and_the_last_bits_are_not(finished, capsys):
    mean = json.loads((finished / NUMBERS).read_text())["strategies"]["critic"]["pass_rate"]["mean"]

    def change(value):
        value["strategies"]["critic"]["pass_rate"]["mean"] = mean + 1e-8
        value["strategies"]["random"]["pass_rate"]["mean"] += 2**-50
        value["details"]["by_problem"][0]["passed"] += 1
        value["labels"]["passed"] = str(value["labels"]["passed"])
        del value["tokens_per_s"]

    edit(finished / NUMBERS, change)
    assert check.run(RunDir(finished)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"strategies.critic.pass_rate.mean: report {mean + 1e-8!r}, recomputed {mean!r}" in lines
    assert "tokens_per_s: report nothing, recomputed 11.0" in lines
    assert any(line.startswith("details.by_problem[7].passed: report ") for line in lines)
    assert any(line.startswith("labels.passed: report ") for line in lines)
    assert lines[-2].startswith(f"{finished}: 4 of ")


def test_changed_labels_choices_page_or_criteria_show(finished, capsys):
    labels = (finished / "labels.jsonl").read_bytes()
    passed = [{**json.loads(line), "status": "passed", "passed": True} for line in labels.splitlines()]
    write_jsonl(finished / "labels.jsonl", passed)
    assert check.run(RunDir(finished)) == 1
    out = capsys.readouterr().out
    for text in (
        "strategies.critic.pass_rate.mean: report ",
        "selection.jsonl: task_id ",
        "since the report was made: labels.jsonl",
    ):
        assert text in out
    (finished / "labels.jsonl").write_bytes(labels)
    choices = (finished / "selection.jsonl").read_text().splitlines(keepends=True)
    (finished / "selection.jsonl").write_text("".join(choices[1:]))
    assert differences(finished)[0].startswith("selection.jsonl: task_id 7, critic: sample_id: report nothing")
    (finished / "selection.jsonl").write_text("".join(choices))
    page = (finished / PAGE).read_bytes()
    (finished / PAGE).write_bytes(page.replace(b"random", b"chance", 1))
    assert [difference.split(":")[0] for difference in differences(finished)] == [PAGE]
    (finished / PAGE).write_bytes(page)
    edit(finished / "manifest.json", lambda value: value["criteria"][0].update(value=0.0))
    assert any(difference.startswith("criteria[") for difference in differences(finished))


def test_of_a_report_by_other_code_the_numbers_are_compared(finished, capsys):
    edit(finished / "manifest.json", lambda value: value["config"]["report"].update(code="older"))
    (finished / PAGE).write_bytes((finished / PAGE).read_bytes().replace(b"random", b"chance", 1))

    def change(value):
        value["headline"] = "in other words"
        value["details"]["left_by_older_code"] = 1

    edit(finished / NUMBERS, change)
    assert check.run(RunDir(finished)) == 0
    assert "made by other code than this" in capsys.readouterr().out
    edit(finished / NUMBERS, lambda value: value.update(samples=1))
    assert [difference.split(":")[0] for difference in differences(finished)] == ["samples"]


def test_a_damaged_report_or_records_that_are_gone_are_told_in_one_line(finished):
    for name, message in ((NUMBERS, "is cut short"), (NUMBERS, "is missing"), (PAGE, "is missing")):
        file = finished / name
        content = file.read_bytes()
        file.unlink()
        if message == "is cut short":
            file.write_bytes(content[:-9])
        before = state(finished)
        with pytest.raises(InputError, match=f"{file.name}: {message}.*Restore it, or write the report again"):
            check.run(RunDir(finished))
        assert state(finished) == before
        file.write_bytes(content)
    (finished / "scores.jsonl").unlink()
    assert check.run(RunDir(finished)) == 1
    (finished / "labels.jsonl").unlink()
    with pytest.raises(InputError, match="has no labels"):
        check.run(RunDir(finished))


def test_a_run_without_a_report(tmp_path):
    with RunDir(tmp_path / "r", create=True) as folder:
        folder.save()
    with pytest.raises(InputError, match="has no finished report to check"):
        check.run(RunDir(tmp_path / "r"))


def test_cost_of_the_report_itself_does_not_count(tmp_path, monkeypatch):
    """On a rented machine the manifest's cost goes on growing while the report is written."""
    monkeypatch.setenv("FRACTAL_PRICE_USD_PER_HOUR", "3600000")
    path = finish(tmp_path / "r")
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["cost_usd"] > json.loads((path / NUMBERS).read_text())["cost_usd"] > 0
    assert differences(path) == []


# ---- LOG.md ----------------------------------------------------------------------------------------------------------


def rows(path):
    table = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return [cells for cells in table if cells[0] not in ("| date", "| ---")]


def test_each_finished_run_has_its_row(original, tmp_path):
    (cells,) = rows(original.parent / "LOG.md")
    numbers = json.loads((original / NUMBERS).read_text())
    assert len(cells) == len(COLUMNS)
    assert (cells[1], cells[3], cells[10]) == ("toy", "12 x 4", "1 of 2")
    assert f"{100 * numbers['strategies']['critic']['pass_rate']['mean']:.1f}" in cells[6]
    assert cells[-1] == f"{original.parent.name}/toy/summary.json (test) |"
    with RunDir(Path(shutil.copytree(original, tmp_path / "toy"))) as folder:
        del folder.manifest["config"]["report"]
        report_stage.run(folder)
        report_stage.run(folder)
    assert len(rows(tmp_path / "LOG.md")) == 1


def cells(run="toy", rate="1 %", date="2026-11-25"):
    return [date, run, *["x"] * (len(COLUMNS) - 3), rate]


def test_rows_are_added_never_changed(tmp_path):
    log = tmp_path / "LOG.md"
    log.write_text("# My notes\n\n| a | table |\n|---|---|\n| of | mine |\n\nno end of line")
    before = log.read_text()
    run_log.add(log, cells())
    once = log.read_text()
    run_log.add(log, cells(date="2026-11-26"))  # the same result on another day
    assert log.read_text() == once
    run_log.add(log, cells(rate="2 %"))
    run_log.add(log, cells(rate="1 %"))  # back again: a change
    run_log.add(log, cells(run="other"))
    text = log.read_text()
    assert text.startswith(before + "\n\n" + run_log.HEADER)
    assert len(text.splitlines()) == len(before.splitlines()) + 1 + 2 + 4
    log.write_text(text + "\nMine again.\n")
    run_log.add(log, cells(rate="3 %"))
    assert log.read_text().startswith(text + "\nMine again.\n\n\n" + run_log.HEADER)


def test_a_cell_cannot_leave_its_cell(tmp_path):
    hostile = "a | b\n| c | <script>alert(1)</script> `x` [y](http://evil.example) \u202e\ud800"
    summary = pages.build(*pages.run(tests=2, n=2), facts=pages.replace(pages.FACTS, run=hostile, model=hostile))
    log = tmp_path / "LOG.md"
    for _ in range(2):
        run_log.add(log, run_log.row(summary, [], None, "runs/x/summary.json"))
    line = log.read_text().splitlines()[-1]
    assert len(log.read_text().splitlines()) == 3
    assert line.replace("\\|", "").count("|") == len(COLUMNS) + 1
    assert "\\<script>" in line
    assert " <script" not in line
    assert "[y\\](" in line


def _add(log, number):
    for i in range(20):
        run_log.add(log, cells(run=f"run-{number}", rate=f"{i} %"))


def test_runs_that_end_at_once_do_not_tear_the_log_and_one_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    log = tmp_path / "LOG.md"
    workers = [multiprocessing.get_context("fork").Process(target=_add, args=(log, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert log.read_text().count("date |") == 1
    expected = [cells(run=f"run-{number}", rate=f"{i} %") for number in range(4) for i in range(20)]
    assert sorted(rows(log)) == sorted(f"| {' | '.join(row)} |".split(" | ") for row in expected)
    log.unlink()
    log.mkdir()
    run_log.add(log, cells())
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())
