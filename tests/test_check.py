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
from fractal.report.run_log import COLUMNS
from fractal.rundir import RunDir
from fractal.selection import stage as selection_stage
from tests import pages


def finish(path: Path, records=None) -> Path:
    """A run folder as the stages leave it, from records made by hand; selection and report are the real ones."""
    problems, samples, labels, scores = records or pages.run(tests=6, n=4)
    with RunDir(path, create=True) as folder:
        criteria.record(folder, [criteria.parse("critic_gain > 0.9"), criteria.parse("samples >= 10")])
        for name, rows in (("problems", problems), ("samples", samples), ("labels", labels), ("scores", scores)):
            write_jsonl(folder.file(f"{name}.jsonl"), rows)
        folder.file("critic").mkdir(exist_ok=True)
        rows = [
            {"epoch": i, "train_loss": 0.7 - i / 10, "val_acc": 0.5 + i / 10, "val_within_auc": 0.6} for i in (1, 2)
        ]
        write_jsonl(folder.file("critic/metrics.jsonl"), rows)
        folder.manifest["config"]["generate"] = {"model": "tiny/model", "n": 4, "seed": 0}
        folder.manifest["stages"]["generate"] = {
            "seconds": 10.0,
            "end": "2026-11-24T10:00:00+00:00",
            "tokens": 99,
            "decode_seconds": 9.0,
        }
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


def compared(path):
    folder = RunDir(path)
    folder.load()
    return check.compare(folder)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_all_is_the_same_and_nothing_is_touched(finished, capsys):
    """Also in another folder, by another name; the lock is free for others."""
    before = state(finished)
    assert check.run(RunDir(finished)) == 0
    assert "figures, all the same" in capsys.readouterr().out
    assert state(finished) == before
    count, found = compared(finished)
    assert count > 200
    assert found == []


def test_the_report_does_not_depend_on_when_it_is_written(original, finished):
    for name in (report_stage.PAGE, report_stage.NUMBERS):
        (finished / name).unlink()
    with RunDir(finished) as folder:
        report_stage.run(folder)
    for name in (report_stage.PAGE, report_stage.TABLE, report_stage.NUMBERS):
        assert (finished / name).read_bytes() == (original / name).read_bytes()
    told = json.loads((finished / report_stage.NUMBERS).read_text())
    assert told["date"] >= "2026-11-24T11:00:00+00:00"
    assert "report" not in told["seconds"]


def test_a_changed_figure_is_named_with_both_values(finished, capsys):
    told = json.loads((finished / report_stage.NUMBERS).read_text())
    mean = told["strategies"]["critic"]["pass_rate"]["mean"]
    again = mean + 2**-50  # the last bits count

    def change(value):
        value["strategies"]["critic"]["pass_rate"]["mean"] = again
        value["details"]["by_problem"][0]["passed"] += 1
        value["labels"]["passed"] = float(value["labels"]["passed"])
        del value["tokens_per_s"]

    edit(finished / report_stage.NUMBERS, change)
    assert check.run(RunDir(finished)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"strategies.critic.pass_rate.mean: report {again!r}, recomputed {mean!r}" in lines
    assert "tokens_per_s: report nothing, recomputed 11.0" in lines
    assert any(line.startswith("details.by_problem[7].passed: report ") for line in lines)
    assert any(line.startswith("labels.passed: report ") for line in lines)
    assert lines[-1].startswith(str(finished))
    assert "4 of " in lines[-1]


def test_a_changed_label_shows_in_the_figures(finished, capsys):
    file = finished / "labels.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row.update(status="passed", passed=True)
    write_jsonl(file, rows)
    assert check.run(RunDir(finished)) == 1
    out = capsys.readouterr().out
    assert "strategies.critic.pass_rate.mean: report " in out
    assert "selection.jsonl: task_id " in out
    assert "labels.jsonl has changed since the report was made." in out


def test_a_changed_choice_score_page_or_criterion_shows(finished):
    lines = (finished / "selection.jsonl").read_text().splitlines(keepends=True)
    (finished / "selection.jsonl").write_text("".join(lines[1:]))
    assert compared(finished)[1][0].report == "no choice"
    (finished / "selection.jsonl").write_text("".join(lines))
    page = (finished / report_stage.PAGE).read_bytes()
    (finished / report_stage.PAGE).write_bytes(page.replace(b"random", b"chance", 1))
    assert [one.where.split(":")[0] for one in compared(finished)[1]] == [report_stage.PAGE]
    (finished / report_stage.PAGE).write_bytes(page)
    edit(finished / "manifest.json", lambda value: value["criteria"][0].update(value=0.0))
    where = [one.where for one in compared(finished)[1]]
    assert any(one.startswith("criteria[") and one.endswith(".reason") for one in where)


@pytest.mark.parametrize(
    "name", ["summary.json", "report/index.html", "labels.jsonl", "scores.jsonl", "critic/metrics.jsonl"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_folder_is_no_difference(finished, name, damage):
    file = finished / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) - 9])
    before = state(finished)
    with pytest.raises(InputError, match="is missing" if damage == "missing" else "is cut short") as caught:
        check.run(RunDir(finished))
    assert name in str(caught.value)
    assert "estore" in str(caught.value)
    assert state(finished) == before


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
    assert manifest["cost_usd"] > json.loads((path / report_stage.NUMBERS).read_text())["cost_usd"] > 0
    assert compared(path)[1] == []


def test_report_is_written_again_only_for_a_reason(finished):
    before = state(finished / "report")
    with RunDir(finished) as folder:
        report_stage.run(folder)
        assert state(finished / "report") == before
        criteria.record(folder, [criteria.parse("auc > 0")])
        report_stage.run(folder)
    assert "auc &gt; 0" in (finished / report_stage.PAGE).read_text()
    assert compared(finished)[1] == []


# ---- LOG.md ----------------------------------------------------------------------------------------------------------


def rows(path):
    found = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return [cells for cells in found if cells[0] not in ("| date", "| ---")]


def test_each_finished_run_has_its_row(original, tmp_path):
    log = original.parent / "LOG.md"
    (cells,) = rows(log)
    told = json.loads((original / report_stage.NUMBERS).read_text())
    assert len(cells) == len(COLUMNS)
    assert cells[1] == "toy"
    assert cells[3] == "12 x 4"
    assert f"{100 * told['strategies']['critic']['pass_rate']['mean']:.1f}" in cells[6]
    assert cells[10] == "1 of 2"
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
    assert run_log.add(log, cells())
    assert not run_log.add(log, cells(date="2026-11-26"))  # the same result on another day
    assert run_log.add(log, cells(rate="2 %"))
    assert run_log.add(log, cells(rate="1 %"))  # back again: a change
    assert run_log.add(log, cells(run="other"))
    text = log.read_text()
    assert text.startswith(before + "\n")
    assert text.count(run_log.HEADER) == 1
    log.write_text(text + "\nMine again.\n")
    assert run_log.add(log, cells(rate="3 %"))
    assert log.read_text().startswith(text + "\nMine again.\n\n" + run_log.HEADER)


def test_a_cell_cannot_leave_its_cell(tmp_path):
    hostile = "a | b\n| c | <script>alert(1)</script> `x` [y](http://evil.example) \u202e\ud800"
    found = pages.build(*pages.run(tests=2, n=2), facts=pages.replace(pages.FACTS, run=hostile, model=hostile))
    log = tmp_path / "LOG.md"
    assert run_log.add(log, run_log.row(found, [], None, "runs/x/summary.json"))
    assert not run_log.add(log, run_log.row(found, [], None, "runs/x/summary.json"))
    line = log.read_text().splitlines()[-1]
    assert len(log.read_text().splitlines()) == 3
    assert line.replace("\\|", "").count("|") == len(COLUMNS) + 1
    assert "\\<script>" in line
    assert " <script" not in line
    assert "\\[y](" in line


def _add(log, number):
    for i in range(20):
        run_log.add(log, cells(run=f"run-{number}", rate=f"{i} %"))


def test_runs_that_end_at_once_do_not_tear_the_log(tmp_path):
    log = tmp_path / "LOG.md"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(log, number)) for number in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(60)
        assert one.exitcode == 0
    assert log.read_text().count("date |") == 1
    assert sorted(tuple(one) for one in rows(log)) == sorted(
        tuple(f"| {' | '.join(cells(run=f'run-{n}', rate=f'{i} %'))} |".split(" | "))
        for n in range(4)
        for i in range(20)
    )


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "LOG.md").mkdir()
    assert not run_log.add(tmp_path / "LOG.md", cells())
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())
