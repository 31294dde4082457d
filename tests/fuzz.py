"""
Damages files at random and reads them: files of cells, checkpoints, adapters, vocabularies, pickles, YAML and CSV.

    python tests/fuzz.py [--seconds 120] [--seed 0]

A reader may refuse a file with one of the errors that its callers know, within a few seconds and with little memory. Anything
else is a finding: another error, a process that dies, time or memory without end. Each finding is written to `build/fuzz` with
the bytes of the damaged file, and the exit status is 1.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch


REFUSALS = (ValueError, KeyError, FileNotFoundError, FileExistsError, IsADirectoryError)
SECONDS, MEMORY = 20, 8 << 30
FOUND = Path(__file__).parents[1] / "build" / "fuzz"


def read_cells(path: Path):
    from pertstate.data.arguments import DataArguments
    from pertstate.data.cells import load
    from pertstate.data.info import describe

    describe(path)
    source = DataArguments(datasets=str(path)).file_source()
    load(source, DataArguments(datasets=str(path)).resolve_splits(source.groups))


def read_checkpoint(path: Path):
    from pertstate.hub.checkpoints import load_whole

    load_whole(str(path.parent))


def read_pickle(path: Path):
    from pertstate.data.restricted_pickle import read_pickled

    read_pickled(path)


def read_run(path: Path):
    from pertstate.training.run_config import load_run_config

    load_run_config(str(path), [])


def read_features(path: Path):
    from pertstate.data.perturbation_features import read_perturbation_features

    read_perturbation_features(path)


def make_seeds(folder: Path) -> list[tuple[Path, Callable[[Path], None]]]:
    """Make whole files, each with its reader."""
    from pertstate import StateConfig, StateForPerturbation, StateProcessor

    r = np.random.default_rng(0)
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 10, "cell_type": "k"}, index=[f"c{i}" for i in range(20)])
    cells = ad.AnnData(
        sp.csr_matrix(r.poisson(2.0, (20, 8)).astype(np.float32)),
        obs=obs,
        var=pd.DataFrame(index=[f"g{i}" for i in range(8)]),
    )
    cells.write_h5ad(folder / "cells.h5ad")
    seeds: list[tuple[Path, Callable]] = [(folder / "cells.h5ad", read_cells)]
    checkpoint = folder / "checkpoint"
    StateProcessor.fit(cells).save_pretrained(checkpoint)
    config = StateConfig.from_preset("tiny", input_dim=8, num_perturbations=1, num_contexts=1)
    StateForPerturbation(config).save_pretrained(checkpoint)
    names = ("config.json", "processor_config.json", "vocabulary.json", "model.safetensors")
    seeds += [(checkpoint / name, read_checkpoint) for name in names]
    content = {"names": ["a", "b"], "sizes": {"x": 3}, "array": np.arange(4.0)}
    (folder / "plain.pkl").write_bytes(pickle.dumps(content))
    torch.save({"weights": torch.ones(3, 2), "step": 4}, folder / "torch.pt")
    seeds += [(folder / "plain.pkl", read_pickle), (folder / "torch.pt", read_pickle)]
    run = "data:\n  datasets: {a: x.h5ad}\n  test_contexts: [k]\nmodel: {preset: tiny}\ntraining: {max_steps: 3, learning_rate: 1e-3}\n"
    (folder / "run.yaml").write_text(run)
    (folder / "features.csv").write_text("name,x,y\nA,1.5,2\nB,3,4e1\n")
    np.savez(folder / "features.npz", names=np.array(["A", "B"]), features=np.ones((2, 3)))
    pd.DataFrame({"x": [1.0, 2.0], "y": [3.0, 4.0]}, index=["A", "B"]).to_parquet(folder / "features.parquet")
    seeds += [(folder / "run.yaml", read_run)]
    seeds += [(folder / f"features.{ending}", read_features) for ending in ("csv", "npz", "parquet")]
    return seeds


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


def fuzz(seconds: float, seed: int, found: Path = FOUND) -> tuple[int, int]:
    """Damage and read files for so many seconds. Returns the number of files and of findings."""
    r = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        seeds = make_seeds(Path(temporary))
        for path, read in seeds:
            read(path)  # whole files are read, and all imports are made here
        contents = [path.read_bytes() for path, _ in seeds]
        tried = findings = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number = tried % len(seeds)
            (path, read), whole = seeds[number], contents[number]
            changed = damaged(whole, r)
            path.write_bytes(changed)
            output = Path(temporary) / "output"
            output.unlink(missing_ok=True)
            wrong = attempt(read, path, output)
            path.write_bytes(whole)
            tried += 1
            if wrong is not None:
                findings += 1
                found.mkdir(parents=True, exist_ok=True)
                name = f"{seed}-{tried}-{path.name}"
                (found / name).write_bytes(changed)
                (found / f"{name}.txt").write_text(wrong)
                print(f"{name}: {wrong.strip().splitlines()[-1][:300]}", flush=True)
    return tried, findings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(FOUND, ignore_errors=True)
    tried, findings = fuzz(args.seconds, args.seed)
    print(json.dumps({"files": tried, "findings": findings}))
    raise SystemExit(1 if findings else 0)


if __name__ == "__main__":
    main()
