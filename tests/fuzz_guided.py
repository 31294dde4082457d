"""
A fuzzer that is guided by coverage (atheris, libFuzzer) over one reader. `fuzz.py` starts it.

    PYTHONPATH=build/atheris python tests/fuzz_guided.py KIND SECONDS FOUND SEED

It changes the whole files of a kind, keeps those changes that reach new code of the reader, and changes these again. An error that
callers do not know is written to FOUND with the file's bytes, once for each place in the code that it comes from. A file that
takes too long or too much memory, or ends the process, is written by libFuzzer, and ends this process.
"""

import hashlib
import logging
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import atheris


# A machine that is busy with other work takes several times as long.
SECONDS, MEGABYTES = 30, 6000
# Packages whose code is followed: ours, and what parses for us in Python.
FOLLOWED = ["pertstate", "anndata", "yaml", "pickletools", "tomllib", "zipfile", "json"]
with atheris.instrument_imports(include=FOLLOWED):
    from fuzz_readers import REFUSALS, Seed, make_corpus, make_seeds
    from fuzz_structure import hdf5_changed, json_changed


class Target:
    """Reads what libFuzzer makes, and keeps what goes wrong."""

    def __init__(self, seed: Seed, found: Path):
        self.seed, self.found, self.seen = seed, found, set()

    def __call__(self, data: bytes):
        self.seed.path.write_bytes(data)
        try:
            self.seed.read(self.seed.path)
        except REFUSALS:
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            self.keep(data, error)

    def keep(self, data: bytes, error: Exception):
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/pertstate/" in frame.filename] or frames[-1:]
        place = (type(error).__name__, *((frame.filename, frame.lineno) for frame in (ours[-1], frames[-1])))
        if place in self.seen:
            return
        self.seen.add(place)
        name = f"{self.seed.kind}-{hashlib.sha256(data).hexdigest()[:12]}"
        self.found.mkdir(parents=True, exist_ok=True)
        (self.found / name).write_bytes(data)
        text = "".join(traceback.format_exception(error))
        (self.found / f"{name}.txt").write_text(text, errors="replace")
        print(f"finding {name}: {text.strip().splitlines()[-1][:300]}", file=sys.stderr, flush=True)


STRUCTURED = {
    **dict.fromkeys(("config", "processor", "vocabulary", "adapter", "record", "scores", "log", "store"), json_changed),
    "h5ad": hdf5_changed,
}


def mutator_of(kind: str):
    """Half of the changes keep the file JSON or HDF5, where the kind is one of these; the others are libFuzzer's own."""
    change = STRUCTURED.get(kind)
    if change is None:
        return None

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        r = random.Random(seed)
        made = change(data, r) if r.random() < 0.5 else data
        return made[:size] if made != data else atheris.Mutate(data, size)

    return mutate


def words_of(contents: list[bytes]) -> str:
    """Words of the whole files, in libFuzzer's form for a dictionary: what it puts in at other places."""
    words = {word for content in contents for word in re.findall(rb"[A-Za-z_][\w.-]{2,30}", content)}
    words |= {
        b"NaN",
        b"1e999",
        b"-1",
        b"null",
        b"[[[[[[[[",
        b"../../x",
        b"9" * 50,
        b"\xed\xa0\x80",
        b"&a",
        b"*a",
        b"<<: ",
    }
    words |= {number.to_bytes(8, "little") for number in (0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)}
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in sorted(words)[:2000])


def run(seeds: list[Seed], seconds: int, found: Path, seed: int, folder: Path):
    """
    Fuzz one reader, and end the process.

    Args:
        seeds (`list[Seed]`): whole files of one kind.
        seconds (`int`), seed (`int`): how long, and where chance starts.
        found (`Path`): folder of the findings.
        folder (`Path`): folder for files that are not kept.
    """
    contents = [one.path.read_bytes() for one in seeds]
    (folder / "words").write_text(words_of(contents))
    found.mkdir(parents=True, exist_ok=True)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-timeout={SECONDS}",
            f"-rss_limit_mb={MEGABYTES}",
            f"-max_len={4 * max(map(len, contents))}",
            f"-dict={folder / 'words'}",
            f"-artifact_prefix={found}/{seeds[0].kind}-",
            "-print_final_stats=1",
            str(make_corpus(folder / "corpus", seeds)),
        ],
        Target(seeds[0], found),
        custom_mutator=mutator_of(seeds[0].kind),
    )
    atheris.Fuzz()


def main():
    kind, seconds, found, seed = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # A request for more is an error that can be seen, and not the end of the machine.
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with atheris.instrument_imports(include=FOLLOWED):
            seeds = [one for one in make_seeds(folder) if one.kind == kind]
            for one in seeds:
                one.read(one.path)  # whole files are read; and all imports are made
        run(seeds, seconds, found, seed, folder)


if __name__ == "__main__":
    main()
