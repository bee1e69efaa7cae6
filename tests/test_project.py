"""Which files of a project a job gets, and which come home: real git, and the instance's scripts in a home of the test's."""

import fnmatch
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.cloud import exec_commands, options, project
from fractal.cloud.project import check_script, fetch_patterns, read_project, script_of
from fractal.cloud.remote_host import script
from fractal.errors import InputError

ODD_NAMES = ("with space.py", "new\nline.py", "ünï/日本.py", "#comment.py", "-dash.py", "a'b\"c.py", "back\\slash.py")


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With a script in a folder, and nothing committed yet."""
    folder = tmp_path / "repository"
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments/train.py").write_text("print(1)\n")
    (folder / ".gitignore").write_text("ignored/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    return folder


def test_what_git_tracks_goes_also_without_a_commit(repository: Path) -> None:
    (repository / "new.py").write_text("")
    (repository / "ignored").mkdir()
    (repository / "ignored/data.jsonl").write_text("{}")
    found = read_project(repository)
    assert found.files == (".gitignore", "experiments/train.py")
    assert (found.folder, found.untracked) == ("", ("new.py",))
    found = read_project(repository / "experiments")
    assert (found.root, found.folder) == (repository, "experiments")
    found = read_project(repository, ["ignored/*.jsonl", "new.py"])
    assert found.files == (".gitignore", "experiments/train.py", "ignored/data.jsonl", "new.py")
    assert found.untracked == ()
    (repository / "experiments/train.py").unlink()  # tracked, and not there
    assert read_project(repository).files == (".gitignore",)


def test_without_git_the_folder_goes_but_for_caches(tmp_path: Path) -> None:
    for name in ("a.py", "runs/demo/samples.jsonl", "sub/runs/x", "__pycache__/a.pyc", ".venv/lib/b.py", "sub/c.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe")
    assert read_project(tmp_path).files == ("a.py", "sub/runs/x")
    assert "runs/demo/samples.jsonl" in read_project(tmp_path, ["runs/demo"]).files


def test_odd_names_go(repository: Path) -> None:
    for name in ODD_NAMES:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("")
    git(repository, "add", ".")
    assert set(ODD_NAMES) < set(read_project(repository).files)


def test_links_go_as_links_and_those_that_lead_out_are_named(repository: Path) -> None:
    targets = {
        "in": "experiments/train.py",
        "up": "../elsewhere",
        "absolute": "/etc",
        "experiments/near": "../.gitignore",
    }
    for name, target in targets.items():
        (repository / name).symlink_to(target)
    git(repository, "add", ".")
    found = read_project(repository)
    assert set(targets) < set(found.files)
    assert found.outward_links == ("absolute", "up")


def test_too_much_is_refused_with_the_largest(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "MAX_BYTES", 1000)
    (repository / "large.bin").write_bytes(bytes(2000))
    git(repository, "add", ".")
    with pytest.raises(InputError, match=r"largest files are 'large.bin' .*invoke sync"):
        read_project(repository)
    (repository.parent / "plain").mkdir()
    (repository.parent / "plain/large.bin").write_bytes(bytes(2000))
    with pytest.raises(InputError, match=r"large.bin"):
        read_project(repository.parent / "plain")


def test_an_empty_or_broken_repository_is_one_line(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    with pytest.raises(InputError, match="git tracks no file"):
        read_project(tmp_path)
    (tmp_path / "a.py").write_text("")
    with pytest.raises(InputError, match="git tracks no file"):
        read_project(tmp_path)
    (tmp_path / ".git/HEAD").write_text("nonsense")
    (tmp_path / ".git/index").write_text("nonsense")
    try:
        read_project(tmp_path)
    except InputError as error:
        assert "\n" not in str(error)


SCRIPTS = {  # command -> script
    "python train.py --lr 1": "train.py",
    "python3.12 -u -X dev train.py": "train.py",
    "/opt/venv/bin/python -W ignore a/b.py -m x": "a/b.py",
    "python -m pkg.train": None,
    "python -c print(1)": None,
    "python": None,
    "bash run.sh": None,
}


def test_the_script_of_a_command() -> None:
    assert {command: script_of(command.split()) for command in SCRIPTS} == SCRIPTS


def test_a_script_that_is_not_sent_is_refused(repository: Path) -> None:
    (repository / "new.py").write_text("")
    found = read_project(repository / "experiments")
    check_script(found, ["python", "train.py"])
    check_script(found, ["python", "../experiments/train.py"])
    for name, text in {
        "missing.py": "no such script",
        "../new.py": "git does not track it",
        "../../x.py": "outside",
        "/x.py": "outside",
    }.items():
        with pytest.raises(InputError, match=text):
            check_script(found, ["python", name])


@pytest.mark.parametrize("pattern", ["", "/", ".", "./", "/etc/*", "../x", "a/../../x", "~/x", "a\nb", "\0"])
@pytest.mark.parametrize("option", ["--fetch", "--include"])
def test_patterns_that_name_nothing_of_the_folder_are_refused(pattern: str, option: str) -> None:
    with pytest.raises(InputError, match=option):
        project.check_pattern(option, pattern)


def test_a_name_for_the_run_is_made_of_any_command() -> None:
    for command, start in {
        ("python", "experiments/train_my_critic.py"): "train_my_critic-",
        ("python", "-m", "my.package"): "my.package-",
        ("bash", "-c", "x"): "bash-",
        ("ü",): "command-",
        ("a" * 200,): "a" * 32,
    }.items():
        name = exec_commands.default_name(command)
        assert name.startswith(start)
        assert options.RUN_NAME.fullmatch(name)


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_command_has_a_name(words: list[str]) -> None:
    if words:
        assert options.RUN_NAME.fullmatch(exec_commands.default_name(tuple(words)))


# --- on the instance


class Home:
    """The home of an instance's user, here: the scripts that run there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exec = folder / "fractal/exec"

    def run(self, name: str, *arguments: str) -> str:
        done = subprocess.run(["sh", "-c", script(name), "sh", *arguments], cwd=self.folder, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    def make(self, job: str, *patterns: str, **files: str) -> Path:
        """A job's working folder with these files; their names are keys with _ for a dot."""
        self.run("make_job_folder", job)
        for name, text in files.items():
            (self.exec / job / "source" / name.replace("_", ".")).write_text(text)
        self.run("copy_job_files", job, *patterns)
        return self.exec / job / "work"

    def collected(self, job: str) -> dict[str, str]:
        self.run("collect_job_files", job)
        files = self.folder / "fractal/runs" / job / "files"
        return {path.relative_to(files).as_posix(): path.read_text() for path in files.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    folder = tmp_path / "home"
    folder.mkdir()
    return Home(folder)


def test_only_what_the_job_made_or_changed_and_is_asked_for_comes_home(home: Home) -> None:
    work = home.make("one", "*/*.txt", "*/out", "*/out/*", a_txt="a", b_txt="b", c_py="c")
    assert home.collected("one") == {}
    (work / "b.txt").write_text("changed")
    (work / "out/deep").mkdir(parents=True)
    made = {"new.txt": "1", "out/epoch.pt": "2", "out/deep/x\ny": "3", "out/ sp ace": "4"}
    for name, text in {**made, "other.log": "5"}.items():
        (work / name).write_text(text)
    (work / "out/link").symlink_to("/etc/passwd")
    assert home.collected("one") == {**made, "b.txt": "changed"}
    (work / "new.txt").unlink()
    (work / "new.txt").write_text("replaced")
    (work / "out/epoch.pt").unlink()
    assert home.collected("one") == {**made, "b.txt": "changed", "new.txt": "replaced"}  # what came home stays


def test_two_jobs_share_no_file_that_they_may_write(home: Home) -> None:
    first = home.make("one", a_txt="a")
    assert home.run("make_job_folder", "two").splitlines()[2:] == ["new", "one"]
    os.link(home.exec / "one/source/a.txt", home.exec / "two/source/a.txt")  # as rsync does it
    home.run("copy_job_files", "two")
    (first / "a.txt").open("a").write(" more")
    assert (home.exec / "two/work/a.txt").read_text() == "a"
    assert (home.exec / "two/source/a.txt").read_text() == "a"


def test_a_job_that_goes_on_keeps_what_it_made_and_gets_what_is_newer(home: Home) -> None:
    work = home.make("one", "*/*.txt", a_txt="a", b_txt="b")
    (work / "made.txt").write_text("made")
    (work / "b.txt").write_text("changed by the job")
    os.utime(work / "a.txt", (1000, 1000))
    assert home.run("make_job_folder", "one").splitlines()[2] == "exists"
    (home.exec / "one/source/a.txt").write_text("edited")
    home.run("copy_job_files", "one", "*/made*")
    assert (work / "a.txt").read_text() == "edited"
    assert (work / "b.txt").read_text() == "changed by the job"
    assert home.collected("one") == {"made.txt": "made"}


NAMES = st.text("ab*?[.", min_size=1, max_size=4).filter(lambda name: name.strip("."))


@given(st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, min_size=1, max_size=3), st.booleans())
def test_patterns_of_find_are_those_of_the_user(folders: list[str], pattern: list[str], below: bool) -> None:
    path, text, present = "/".join(folders), "/".join(pattern), "p[*]" if below else ""
    if below:
        path = f"{present}/{path}"
    rules = fetch_patterns(present, [text])
    matches = any(fnmatch.fnmatchcase(f"./{path}", rule.replace("\\[", "[[]").replace("\\*", "[*]")) for rule in rules)
    if "/" not in text:
        parts = path.split("/")
        assert matches >= any(fnmatch.fnmatchcase(part, text) for part in parts)
    else:
        relative = path.removeprefix(f"{present}/") if below else path
        assert matches == (fnmatch.fnmatchcase(relative, text) or fnmatch.fnmatchcase(relative, f"{text}/*"))
