"""`make torture`: the script runs, and sees faults."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torture
from marked import write_between_marks


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_some_kills_of_every_command():
    """The script runs in a process of its own, because it points all that it starts at a Hub of its own."""
    words = [sys.executable, Path(torture.__file__), "--trials", "24"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| together | 24 | " in done.stdout and done.stdout.rstrip().endswith("| 0 | 0 | 0 | 0 |")


# A program with the faults that the commands must not have: it writes two files in place, and a kill leaves a third beside them.
CARELESS = """
import sys, time
from pathlib import Path
for name in ("a", "b", "c.partial"):
    time.sleep(0.1)
    (Path(sys.argv[1]) / name).write_text("new")
(Path(sys.argv[1]) / "c.partial").unlink()
"""


class Careless(torture.Case):
    def launch(self, work, words, moment=0):
        return torture.launches.start(["-c", CARELESS + self.ends, work])

    ends = 'print("changes", 0)'


def state(work: Path) -> str | None:
    texts = [(work / name).read_text() if (work / name).exists() else None for name in ("a", "b")]
    return None if texts == [None, None] else "".join(text or "a part" for text in texts)


@pytest.mark.slow
def test_faults_of_a_careless_command_are_found(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("a", "b"):
        (old / name).write_text("old")
    case, seen = Careless("careless", [], [], state, old), Counter()
    case.measure(tmp_path / "work")
    assert case.new == "newnew" and case.old == "oldold"
    rng = random.Random(0)
    while not {"a part", "the old", "the new"} <= seen.keys():
        seen.update(case.trial(tmp_path / "work", rng))
    case.ends = "\n(Path(sys.argv[1]) / 'a').unlink(); (Path(sys.argv[1]) / 'c.lock').write_text('x')"
    while not {"other bits", "left beside"} <= seen.keys():
        seen.update(case.trial(tmp_path / "work", rng))


def test_the_table_takes_its_place_in_the_page(tmp_path):
    counts = {"a": Counter(kills=2, lost=1), "b": Counter(kills=1)}
    cases = [torture.Case(name, [], [], state) for name in "ab"]
    found = torture.table(counts, cases)
    assert found.splitlines()[2:] == [
        "| a | 2 | 0 | 0 | 0 | 1 | 0 | 0 | 0 |",
        "| b | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
        "| together | 3 | 0 | 0 | 0 | 1 | 0 | 0 | 0 |",
    ]
    text = "# Page\n\n<!-- kills: start -->\nold\n<!-- kills: end -->\n\nmore\n"
    page = tmp_path / "page.md"
    for before in (text, text.replace("old\n", ""), text.replace("old", found)):
        page.write_text(before)
        write_between_marks(page, "kills", found)
        assert page.read_text() == text.replace("old", found)
    page.write_text("# Page\n<!-- kills: start -->\n")
    with pytest.raises(ValueError, match="expected a page with the lines"):
        write_between_marks(page, "kills", found)
