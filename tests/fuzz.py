"""
Damages files and reads them: cells, checkpoints, adapters, vocabularies, pickles, features, run files and splits.

    python tests/fuzz.py [--seconds 120] [--seed 0] [--kinds KIND ..] [--write docs/reliability.md]

A third of the time files are damaged blindly, each read in a process of its own. In the rest, where atheris is there (`make fuzz`
brings it), a fuzzer that is guided by coverage takes each kind in turn, see `fuzz_guided.py`.

A reader may refuse a file with one of the errors that its callers know, within a few seconds and with little memory. Anything
else is a finding: another error, a process that dies, time or memory without end. Each finding is written to `build/fuzz` with
the bytes of the damaged file, and the exit status is 1.
"""

import argparse
import importlib.util
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fuzz_readers import REFUSALS, make_seeds
from marked import write_between_marks


# The processes that read are forked, which numba's other ways to share work among threads do not outlive.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
SECONDS, MEMORY = 20, 8 << 30
FOUND = Path(__file__).parents[1] / "build" / "fuzz"
BLIND = 1 / 3


def damaged(whole: bytes, r: np.random.Generator) -> bytes:
    """The bytes after a few of them are changed, cut, repeated, or replaced by values that trouble readers."""
    data = bytearray(whole)
    for _ in range(int(r.integers(1, 6))):
        at, kind = int(r.integers(0, max(1, len(data)))), int(r.integers(0, 6))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << int(r.integers(0, 8))
        elif kind == 1:
            data[at : at + int(r.integers(1, 64))] = r.bytes(int(r.integers(0, 64)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + int(r.integers(1, 256))]
        elif kind == 4:
            numbers = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
            data[at : at + 8] = numbers[int(r.integers(0, len(numbers)))].to_bytes(8, "little")
        else:
            words = [b"NaN", b"1e999", b"-1", b"null", b"[[[[", b"{}", b"\0", b"\xed\xa0\x80", b"../../x", b"9" * 50]
            data[at:at] = words[int(r.integers(0, len(words)))]
    return bytes(data)


def attempt(read: Callable[[Path], None], path: Path, output: Path) -> str | None:
    """What a reader, in a process of its own, did wrong with a file. None if it read or refused the file."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            for number in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False)
            read(path)
            code = 0
        except REFUSALS:
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it is, it is a finding
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        return f"took more than {SECONDS} s"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return output.read_text(errors="replace")[-2000:] if code else None


def fuzz(seconds: float, seed: int, found: Path = FOUND) -> tuple[Counter[str], Counter[str]]:
    """Damage and read files for so many seconds. Returns the number of files and of findings of each reader."""
    r = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        seeds = make_seeds(Path(temporary))
        for one in seeds:
            one.read(one.path)  # whole files are read, and all imports are made here
        contents = [one.path.read_bytes() for one in seeds]
        tried, findings = Counter[str](), Counter[str]()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number = tried.total() % len(seeds)
            path, read, whole = seeds[number].path, seeds[number].read, contents[number]
            changed = damaged(whole, r)
            path.write_bytes(changed)
            output = Path(temporary) / "output"
            output.unlink(missing_ok=True)
            wrong = attempt(read, path, output)
            path.write_bytes(whole)
            tried[seeds[number].kind] += 1
            if wrong is not None:
                findings[seeds[number].kind] += 1
                found.mkdir(parents=True, exist_ok=True)
                name = f"{seed}-{tried.total()}-{path.name}"
                (found / name).write_bytes(changed)
                (found / f"{name}.txt").write_text(wrong)
                print(f"{name}: {wrong.strip().splitlines()[-1][:300]}", flush=True)
    return tried, findings


def kinds() -> list[str]:
    """The names of the readers."""
    with tempfile.TemporaryDirectory() as temporary:
        return list(dict.fromkeys(seed.kind for seed in make_seeds(Path(temporary))))


def fuzz_guided(kind: str, seconds: int, seed: int, found: Path = FOUND) -> tuple[int, int]:
    """
    Let a fuzzer that is guided by coverage read files of a kind. Returns the number of files and of findings.

    Raises:
        RuntimeError: the fuzzer itself did not run.
    """
    before = set(found.glob(f"{kind}-*"))
    words = [sys.executable, str(Path(__file__).with_name("fuzz_guided.py")), kind, str(seconds), str(found), str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    made = sorted(path.name for path in set(found.glob(f"{kind}-*")) - before if path.suffix != ".txt")
    tried = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    if tried is None and not made:
        raise RuntimeError(f"the fuzzer of {kind} ended with status {done.returncode}: {done.stderr[-2000:]}")
    for name in made:
        print(name, flush=True)
    return 0 if tried is None else int(tried[1]), len(made)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", metavar="KIND", help="readers of the guided fuzzer; by default all")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="put the table between its marks in this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(FOUND, ignore_errors=True)
    is_guided = importlib.util.find_spec("atheris") is not None
    blind, findings = fuzz(args.seconds * (BLIND if is_guided else 1), args.seed)
    guided = Counter[str]()
    if is_guided:
        names = args.kinds or kinds()
        seconds = max(1, round(args.seconds * (1 - BLIND) / len(names)))
        for kind in names:
            guided[kind], wrong = fuzz_guided(kind, seconds, args.seed + 1)
            findings[kind] += wrong
    print(table(blind, guided, findings))
    if args.write:
        write_between_marks(args.write, "files", table(blind, guided, findings))
    raise SystemExit(1 if findings.total() else 0)


def table(blind: Counter[str], guided: Counter[str], findings: Counter[str]) -> str:
    """How many files each reader was given, and how many it read or refused wrongly, in Markdown."""
    lines = ["| reader | damaged blindly | guided by coverage | findings |", "|---|---:|---:|---:|"]
    rows = [(kind, blind[kind], guided[kind], findings[kind]) for kind in sorted(blind | guided)]
    for name, *counts in [*rows, ("together", blind.total(), guided.total(), findings.total())]:
        lines.append(f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
