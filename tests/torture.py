"""
Kill trials: each command that writes is killed at a random moment, again and again, and what it left is looked at.

    python tests/torture.py [--trials 300] [--seed 0] [--only train] [--write docs/reliability.md]

Half of the kills come after a random time, the other half at a random change of a file (a push makes none). A kill must not lose an older
output, and must not leave a part of a new one. Then the command runs again (a training is resumed). It must end with the same bits as a run
that nobody killed, and leave nothing beside its output.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import h5py
import launches
import yaml
from hub_server import HubServer
from marked import write_between_marks


# `pertstate` that kills itself at its n-th change of a file below a folder. With n = 0, it says how many changes there were.
KILLED = """
import os, signal, sys
below, moment, count = sys.argv.pop(1), int(sys.argv.pop(1)), 0
def audit(event, args):
    global count
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree", "os.truncate")
    changes = changes or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR)))
    if changes and str(args[0]).startswith(below):
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
from pertstate.cli import main
code = main(sys.argv[1:])
print("changes", count)
raise SystemExit(code)
"""
OUTCOMES = ("nothing yet", "the old", "the new", "lost", "a part", "other bits", "left beside")
FAULTS = OUTCOMES[3:]


@dataclass
class Case:
    """
    A command that is killed.

    Args:
        name (`str`): name of the row of the table.
        words (`list`): the command; `{work}` is the folder of a trial.
        again (`list`): the command that is run after the kill.
        state (`Callable`): gives the digest of the output in the folder of a trial, None if there is none, "a part" for a part.
        before (`Path`, *optional*): what the folder of a trial holds at first.
        start (`Callable`, *optional*): called before each trial.
    """

    name: str
    words: list
    again: list
    state: Callable[[Path], str | None]
    before: Path | None = None
    start: Callable[[], None] | None = None
    new: str | None = None
    old: str | None = None
    seconds: float = 0.0
    changes: int = 0

    def fresh(self, work: Path):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.before, work, symlinks=True) if self.before else work.mkdir()
        if self.start is not None:
            self.start()

    def launch(self, work: Path, words: list, moment: int = 0) -> launches.Launched:
        return launches.start(["-c", KILLED, work, moment, *(str(word).format(work=work) for word in words)])

    def measure(self, work: Path):
        """What an uninterrupted run makes, how long it takes, and how many changes it makes."""
        launches.run(["-c", ""])  # the first waits for the imports of all
        self.fresh(work)
        self.old, start = self.state(work), time.monotonic()
        done = self.launch(work, self.words).communicate()
        if done.returncode != 0:
            raise RuntimeError(f"{self.name}: {done.stderr[-2000:]}")
        self.seconds, self.changes = time.monotonic() - start, int(done.stdout.split()[-1])
        self.new = self.state(work)

    def trial(self, work: Path, rng: random.Random) -> list[str]:
        """Make one kill. Returns its outcomes; none if the command had ended before."""
        self.fresh(work)
        by_change = self.changes > 0 and rng.random() < 0.5
        process = self.launch(work, self.words, rng.randint(1, self.changes) if by_change else 0)
        if not by_change:
            time.sleep(rng.uniform(0, self.seconds))
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if process.communicate().returncode != -signal.SIGKILL:
            return []
        found = self.state(work)
        outcomes = [
            "a part"
            if found not in (None, self.old, self.new)
            else "the new"
            if found == self.new
            else "the old"
            if found is not None
            else "nothing yet"
            if self.old is None
            else "lost"
        ]
        done = self.launch(work, self.again).communicate()
        if done.returncode != 0 or self.state(work) != self.new:
            print(f"{self.name}: {done.returncode}: {done.stderr[-1000:]}", file=sys.stderr)
            outcomes.append("other bits")
        left = [path for path in work.rglob("*") if path.name.endswith((".partial", ".lock", ".new"))]
        if left:
            print(f"{self.name}: left {left}", file=sys.stderr)
            outcomes.append("left beside")
        return outcomes


# What is there


def sha256(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def checkpoint(folder: Path) -> str | None:
    """The digest of a checkpoint's weights, settings and names. Card and arguments are left out: they hold times."""
    if not (folder / "config.json").exists():
        return None
    needed = ("config.json", "model.safetensors", "processor_config.json", "vocabulary.json", "processing.py")
    if not all((folder / name).is_file() for name in needed):
        return "a part"
    code = sorted(path.name for path in folder.glob("*.py"))
    return sha256(*((folder / name).read_bytes() for name in needed), *map(str.encode, code))


def run(folder: Path) -> str | None:
    """The digest of a run, whose checkpoints and model must be whole."""
    from pertstate.hub.unfinished import checkpoints_of
    from pertstate.training.staging import missing_of

    if any(missing_of(path) is not None for path in checkpoints_of(folder)):
        return "a part"
    return checkpoint(folder)


def store(folder: Path) -> str | None:
    from pertstate.data.store import CellStore

    if not folder.exists():
        return None
    try:
        CellStore(folder).verify()
    except (OSError, ValueError):
        return "a part"
    return sha256((folder / "store.json").read_bytes())


def predicted(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        with h5py.File(path) as file:
            return sha256(*(file[name][:].tobytes() for name in ("X", "uns/control_cells/X")))
    except (OSError, KeyError):
        return "a part"


def whole(folder: Path, names: tuple[str, ...]) -> str | None:
    """The digest of outputs that belong together, files or folders, all of their files in. What is being written is not theirs yet."""
    files = {name: sorted({*_files(folder / name)}) for name in names}
    if not any(files.values()):
        return None
    if not all(files.values()):
        return "a part"
    paths = [path for name in names for path in files[name]]
    return sha256(*(part for path in paths for part in (str(path.relative_to(folder)).encode(), path.read_bytes())))


def _files(output: Path) -> list[Path]:
    found = [output] if output.is_file() else [*output.rglob("*")]
    return [
        path for path in found if path.is_file() and not re.search(r"/\.[^/]+\.(partial|lock)(/|$)", path.as_posix())
    ]


def pooled(folder: Path, *tables: str) -> str | None:
    """The digest of the tables that many runs end in. Every run that has ended must be whole; what is being written has other names."""
    models = [path.parent for path in (folder / "runs").rglob("config.json")]
    ended = [path for path in models if not path.name.startswith("checkpoint-") and ".partial" not in str(path)]
    if any(run(path) == "a part" for path in ended):
        return "a part"
    return whole(folder, tables)


# The cases


def cases(folder: Path, hub: HubServer) -> list[Case]:
    """Make all files that the commands read below `folder`. Returns the cases."""
    import finetuning_runs
    from legacy_writer import LegacyFolderWriter

    from pertstate.cli import main

    def quietly(*words):
        if main([str(word) for word in words]):
            raise RuntimeError(f"{words} failed")

    finetuning_runs.make_folder(folder)
    finetuning_runs.run(folder, "adapter", "second", lora_rank=2)
    scored = ["evaluate", "--quiet", "--model", folder / "base", "--real", folder / "first.h5ad", "--include-seen"]
    quietly(*scored, "--scores", folder / "scores")
    legacy = LegacyFolderWriter().write(folder / "legacy")
    content = {
        "data": {"datasets": {"screen": str(folder / "second.h5ad")}, "test_contexts": ["type_4"]},
        "model": {"preset": "tiny", "set_size": 8, "hidden_dropout": 0.1},
        "training": {**finetuning_runs.TRAINING, "save_strategy": "steps", "max_steps": 10, "save_steps": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    content["data"]["datasets"]["screen"] = str(folder / "first.h5ad")
    content["data"]["test_contexts"] = ["type_2"]
    (folder / "other.yaml").write_text(yaml.safe_dump(content))
    content["training"] |= {"max_steps": 2, "save_steps": 1}
    (folder / "short.yaml").write_text(yaml.safe_dump(content))

    def before(name: str, *words) -> Path:
        """A folder with an older output, `out` or `out.h5ad`."""
        made = folder / "before" / name
        made.mkdir(parents=True)
        quietly(*(str(word).format(work=made) for word in words))
        return made

    of = {
        "train": ["train", folder / "run.yaml", "--output_dir", "{work}/out"],
        "prepare": ["prepare", "--quiet", "--config", folder / "run.yaml", "--output", "{work}/out"],
        "predict": ["predict", "--quiet", "--model", folder / "base", "--adata", folder / "first.h5ad"]
        + ["--perturbation", "pert_1", "pert_2", "--output", "{work}/out.h5ad"],
        "merge": ["merge", folder / "adapter", "{work}/out"],
        "convert": ["convert", legacy, "{work}/out"],
        "predict to zarr": ["predict", "--quiet", "--model", folder / "base", "--adata", folder / "first.h5ad"]
        + ["--perturbation", "pert_1", "--output", "{work}/out.zarr"],
        "predict a summary": ["predict", "--quiet", "--model", folder / "base", "--adata", folder / "first.h5ad"]
        + ["--perturbation", "pert_1", "--summary", "{work}/out.csv"],
        "evaluate": [*scored, "--scores", "{work}/out"],
        "report": ["report", folder / "scores", "-o", "{work}/out.html"],
        "space": ["space", "{work}/out", "--model", "ada/base"],
    }
    states = {
        "train": lambda work: run(work / "out"),
        "prepare": lambda work: store(work / "out"),
        "predict": lambda work: predicted(work / "out.h5ad"),
        **dict.fromkeys(("merge", "convert"), lambda work: checkpoint(work / "out")),
        "predict to zarr": lambda work: whole(work, ("out.zarr",)),
        "predict a summary": lambda work: whole(work, ("out.csv",)),
        "report": lambda work: whole(work, ("out.html",)),
        **dict.fromkeys(("evaluate", "space"), lambda work: whole(work, ("out",))),
    }
    other = [word if word != folder / "run.yaml" else folder / "other.yaml" for word in of["prepare"]]
    older = {
        "train": before("train", *of["train"], "--learning_rate", "0.01"),
        "prepare": before("prepare", *other),
        "predict": before("predict", *of["predict"], "--context", "type_0"),
        "merge": before("merge", *of["convert"]),
        "convert": before("convert", *of["merge"]),
        "predict to zarr": before("zarr", *of["predict to zarr"], "--context", "type_0"),
        "predict a summary": before("summary", *of["predict a summary"], "--context", "type_0"),
        "evaluate": before("evaluate", *of["evaluate"], "--context", "type_0"),
        "report": before("report", *of["report"], "--title", "older"),
        "space": before("space", *of["space"], "--title", "older"),
    }
    found = []
    for name, words in of.items():
        resumed = ["--resume_from_checkpoint", "last"] if name == "train" else ["--overwrite"]
        found.append(Case(name, words, [*words, *resumed], states[name]))
        over = [*words, "--overwrite"]
        found.append(Case(f"{name} over an older one", over, over, states[name], older[name]))
    folds = ["crossval", folder / "short.yaml", "--over", "max_steps=1,2", "--seeds", "1", "-o", "{work}/out"]
    grid = ["tune", folder / "short.yaml", "--grid", "learning_rate=0.001,0.01", "-o", "{work}/out"]
    found += [
        Case("crossval", folds, folds, lambda work: pooled(work / "out", "scores")),
        Case("tune", grid, grid, lambda work: pooled(work / "out", "results.csv")),
    ]
    finished = before("finished", *of["train"])
    resumed = [*of["train"], "--resume_from_checkpoint", "last"]
    found.append(Case("train, resumed when finished", resumed, resumed, states["train"], finished))
    return [*found, pushed(folder, older["merge"] / "out", hub)]


def pushed(folder: Path, old: Path, hub: HubServer) -> Case:
    """A push of `base` to a repository that holds another model. Each trial has a new repository."""
    number = 0

    def start():
        nonlocal number
        number += 1
        words = ["-m", "pertstate.cli", "push", old, f"ada/model{number}", "--quiet"]
        done = launches.run(words, launches._ENVIRONMENT)
        if done.returncode:
            raise RuntimeError(done.stderr)
        case.words[2] = f"ada/model{number}"

    def state(_: Path) -> str | None:
        files = hub.read(f"ada/model{number}")
        needed = ("config.json", "model.safetensors", "processor_config.json", "vocabulary.json", "README.md")
        code = sorted(name for name in files if name.endswith(".py"))
        return (
            sha256(*(files[name] for name in needed[:4]), *map(str.encode, code))
            if set(needed) <= files.keys()
            else "a part"
        )

    case = Case("push over an older one", ["push", folder / "base", "", "--quiet"], [], state, start=start)
    case.again = case.words
    return case


def table(counts: dict[str, Counter], cases: list[Case]) -> str:
    lines = ["| command | kills | " + " | ".join(OUTCOMES) + " |", "|---|" + "---:|" * (len(OUTCOMES) + 1)]
    rows = [(case.name, counts[case.name]) for case in cases]
    for name, count in [*rows, ("together", sum(counts.values(), Counter()))]:
        lines.append(f"| {name} | {count['kills']} | " + " | ".join(str(count[outcome]) for outcome in OUTCOMES) + " |")
    return "\n".join(lines)


def torture(folder: Path, trials: int, seed: int, only: str = "") -> tuple[str, int]:
    """Make so many kills, spread over the commands whose names hold `only`. Returns the table and the number of faults."""
    rng = random.Random(seed)
    with HubServer(folder / "hub") as hub:
        # The environment of all processes that are forked here, so that they share its imports.
        launches._ENVIRONMENT.update(
            HF_ENDPOINT=hub.url,
            HF_HOME=str(folder / "home"),
            HF_TOKEN=hub.add_user("ada"),
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            NO_PROXY="127.0.0.1",
        )
        os.environ.update(launches._ENVIRONMENT)
        launches.environment = lambda **extra: {**launches._ENVIRONMENT, **extra}
        with redirect_stdout(sys.stderr):
            chosen = [case for case in cases(folder, hub) if only in case.name]
        counts = {case.name: Counter(dict.fromkeys(("kills", *OUTCOMES), 0)) for case in chosen}
        work, number = folder / "trial", 0
        for case in chosen:
            case.measure(work)
        while number < trials:
            case = chosen[number % len(chosen)]
            outcomes = case.trial(work, rng)
            if outcomes:
                number += 1
                counts[case.name].update(["kills", *outcomes])
                faults = sum(count[fault] for count in counts.values() for fault in FAULTS)
                print(f"\r{number} of {trials} kills, {faults} faults", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return table(counts, chosen), sum(count[fault] for count in counts.values() for fault in FAULTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="WORD", help="commands whose row has this word in its name")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="put the table between its marks in this page")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, faults = torture(Path(folder), args.trials, args.seed, args.only)
    print(found)
    if args.write:
        write_between_marks(args.write, "kills", found)
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
