"""Outputs of commands: replaced only where that is asked for, by one process at a time, and at any moment whole."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

import launches
import pytest
from kills import killed_at_each_line

from pertstate.base import outputs
from pertstate.base.files import partial_of, whole_file
from pertstate.base.locks import InUseError
from pertstate.base.outputs import Kind, claimed_file, claimed_folder, claimed_run, whole_folder


BOX = Kind("box", ("box.json", "other.json"), lambda name: name in ("box.json", "other.json", "a", "b", "c"))


def write(folder: Path, content: dict[str, str], overwrite=True):
    with claimed_folder(folder, BOX, overwrite), whole_folder(folder, BOX) as partial:
        for name, text in content.items():
            (partial / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# Files


def test_a_file_is_replaced_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "out"
    for text, overwrite in (("first", False), ("second", True)):
        with claimed_file(path, overwrite) as place, whole_file(place) as partial:
            partial.write_text(text)
    with pytest.raises(FileExistsError, match=r"out exists; name another output, or replace it with --overwrite"):
        with claimed_file(path, False):
            pass
    assert path.read_text() == "second" and os.listdir(tmp_path) == ["out"]


def test_a_file_behind_a_link_has_one_lock_whatever_its_name(tmp_path):
    (tmp_path / "link").symlink_to("out")
    with claimed_file(tmp_path / "out", False) as place:
        assert launches.run(["-c", CLAIM, tmp_path / "link"]).stdout.startswith(
            f"{tmp_path / 'link'} is being written by "
        )
    with claimed_file(tmp_path / "link", False) as linked:
        assert linked == place


CLAIM = """
import sys
from pertstate.base.outputs import claimed_file
try:
    with claimed_file(sys.argv[1], True):
        print("free")
except OSError as error:
    print(error)
"""


def test_what_killed_processes_left_is_removed_and_no_more(tmp_path):
    left, others = partial_of(tmp_path / "out"), partial_of(tmp_path / "out.b")
    mine = tmp_path / ".out.1-mine.partial"
    for path in (left, others, mine):
        path.write_text("a part")
    with claimed_file(tmp_path / "out", False):
        assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == sorted([others.name, mine.name])


def test_there_must_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'none'}"):
        with claimed_file(tmp_path / "none" / "out", False):
            pass
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'none'}"):
        write(tmp_path / "none" / "box", {"box.json": "1"})
    assert os.listdir(tmp_path) == []


# Folders

OLD = {"box.json": "old", "a": "old", "b": "old"}
NEW = {"other.json": "new", "b": "new", "c": "new"}
REST = {"notes": "mine", "sub/deep/file": "mine"}


def old_box(folder: Path):
    write(folder, OLD)
    (folder / "sub" / "deep").mkdir(parents=True)
    for name, text in REST.items():
        (folder / name).write_text(text)
    (folder / "link").symlink_to("notes")


def test_a_folder_is_replaced_and_what_else_it_holds_stays(tmp_path):
    box = tmp_path / "box"
    old_box(box)
    stamp = os.stat(box / "sub").st_mtime_ns
    write(box, NEW)
    assert read(box) == {**NEW, **REST, "link": "mine"} and (box / "link").is_symlink()
    assert os.stat(box / "sub").st_mtime_ns == stamp and os.stat(box / "notes").st_nlink == 1
    assert os.listdir(tmp_path) == ["box"]


def test_it_is_replaced_only_where_that_is_asked_for(tmp_path):
    box = tmp_path / "box"
    write(box, OLD, overwrite=False)
    with pytest.raises(
        FileExistsError, match="box exists and is not an empty folder; name a new one, or replace it with --overwrite"
    ):
        write(box, NEW, overwrite=False)
    assert read(box) == OLD
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", NEW, overwrite=False)
    assert read(tmp_path / "empty") == NEW


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"holds no box, so overwrite does not replace it: expected box.json, found"
    ):
        write(tmp_path / "home", NEW)
    for name in ("file", "loop"):
        path = tmp_path / name
        path.symlink_to("loop") if name == "loop" else path.write_text("mine")
        with pytest.raises(ValueError, match="is a file; name a folder to write"):
            write(path, NEW)
    assert read(tmp_path / "home") == {"thesis": "mine"}


def test_a_link_to_a_folder_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "box").symlink_to("disk/box")
    write(tmp_path / "box", OLD)
    write(tmp_path / "box", NEW)
    assert (tmp_path / "box").is_symlink() and read(tmp_path / "disk" / "box") == NEW
    assert os.listdir(tmp_path / "disk") == ["box"]


def test_the_folder_of_a_run_is_made_where_a_link_leads(tmp_path):
    (tmp_path / "run").symlink_to("disk/run")
    with claimed_run(tmp_path / "run", BOX) as place:
        assert place == tmp_path / "disk" / "run" and (tmp_path / "run").is_dir()
    with claimed_run(tmp_path / "a" / "b", BOX):
        assert os.listdir(tmp_path / "a") == [".b.lock"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; name a folder to write"), claimed_run(tmp_path / "file", BOX):
        pass


def test_an_error_leaves_what_was_there(tmp_path):
    for old in (None, OLD):
        if old:
            write(tmp_path / "box", old)
        with pytest.raises(RuntimeError), claimed_folder(tmp_path / "box", BOX, True):
            with whole_folder(tmp_path / "box", BOX) as partial:
                (partial / "a").write_text("part")
                raise RuntimeError
        assert os.listdir(tmp_path) == (["box"] if old else []) and (not old or read(tmp_path / "box") == old)


@pytest.mark.parametrize("swap", [True, False])
def test_killed_at_any_line_a_folder_holds_the_old_or_the_new(tmp_path, monkeypatch, swap):
    box, seen = tmp_path / "box", []

    def renew():
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        old_box(box)
        if not swap:
            # A shell stands in the folder, so it cannot become another.
            monkeypatch.chdir(box)

    def check():
        if swap:
            # Without any further start.
            whole = {name: text for name, text in read(box).items() if BOX.is_own(name)}
            assert whole in (OLD, NEW)
        else:
            held = BOX.is_in(box)
            assert not held or {n: t for n, t in read(box).items() if BOX.is_own(n)} in (OLD, NEW)
        # The next start finishes or tidies up.
        with claimed_run(box, BOX):
            pass
        found = read(box)
        assert found in ({**OLD, **REST, "link": "mine"}, {**NEW, **REST, "link": "mine"})
        assert os.listdir(tmp_path) == ["box"]
        seen.append(found["b"])
        renew()

    renew()
    kills = killed_at_each_line(lambda: write(box, NEW), check, outputs)
    assert kills > 60 and set(seen) == {"old", "new"}


def test_killed_at_any_line_a_new_folder_is_there_or_not(tmp_path):
    box = tmp_path / "box"

    def check():
        assert not box.exists() or read(box) == NEW
        write(box, NEW)
        assert os.listdir(tmp_path) == ["box"]
        shutil.rmtree(box)

    assert killed_at_each_line(lambda: write(box, NEW), check, outputs) > 30


@pytest.mark.slow
def test_a_move_that_is_finished_may_be_cut_short_again(tmp_path, monkeypatch):
    """A process is killed at every line while it moves, and the next one at every line while it finishes the move."""
    box, template = tmp_path / "box", tmp_path / "template"
    old_box(box)
    monkeypatch.chdir(box)
    before = os.getcwd()

    def freeze():
        if (box / outputs.JOURNAL).exists() and not template.exists():
            shutil.copytree(box, template, symlinks=True)

    def claim():
        with claimed_run(box, BOX):
            pass

    killed_at_each_line(lambda: write(box, NEW), freeze, outputs)
    os.chdir(tmp_path)

    def renew():
        shutil.rmtree(box)
        shutil.copytree(template, box, symlinks=True)

    def check():
        claim()
        assert read(box) == {**NEW, **REST, "link": "mine"}
        renew()

    renew()
    assert before == str(box) and killed_at_each_line(claim, check, outputs) > 20


def test_two_processes_do_not_write_one_folder(tmp_path):
    box = tmp_path / "box"
    with claimed_run(box, BOX):
        child = os.fork()
        if child == 0:
            try:
                write(box, NEW)
            except InUseError as error:
                os._exit(7 if f"process {os.getppid()} on {socket.gethostname()}" in str(error) else 8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert os.listdir(tmp_path) == []


@pytest.fixture
def readonly():
    """A folder that users other than root may enter. They may not enter the folders of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        os.chmod(folder, 0o755)


@pytest.mark.parametrize("held", [False, True])
def test_a_folder_whose_parent_cannot_be_written(readonly, held):
    """As an ordinary user, the command writes only within the folder, and nothing beside it."""
    box = readonly / "box"
    box.mkdir()
    if held:
        write(box, OLD)
    readonly.chmod(0o555)
    child = os.fork()
    if child == 0:
        write_as_a_user(box)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(box) == NEW and os.listdir(readonly) == ["box"]


def write_as_a_user(box: Path):
    """Write in a process of its own, which ends here."""
    try:
        if os.getuid() == 0:
            for path in (box, *box.iterdir()):
                os.chown(path, 12345, 12345)
            os.setgid(12345)
            os.setuid(12345)
        write(box, NEW)
    except BaseException as error:  # noqa: BLE001 - said to whom reads the test's output
        os.write(2, repr(error).encode())
        os._exit(1)
    os._exit(0)
