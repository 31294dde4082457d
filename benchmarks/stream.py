"""
Peak memory and speed of a stream as its data grow: `python benchmarks/stream.py [--cells 50000] [--doublings 3]`.

The parquet files are like those of a drug atlas: each cell has gene ids and counts, with a marker first; wells of one drug
and many cell lines follow one another. They are simulated block by block, with 2,000 genes, one in ten expressed. Each size
is read in a process of its own: the first look, then one epoch of batches of 8 sentences of 64 cells.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


GENES, LINES, DRUGS, CELLS_OF_WELL = 2000, 8, 20, 2500
SET_SIZE, SENTENCES = 64, 8


def write(folder: Path, cells: int):
    """Write one file for every ten wells. Every tenth well holds control cells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 1.0, GENES)
    rate = np.minimum(0.1 * rate / rate.mean(), 0.95)
    folder.mkdir()
    for well in range(cells // CELLS_OF_WELL):
        rows, columns = np.nonzero(rng.random((CELLS_OF_WELL, GENES), dtype=np.float32) < rate)
        sizes = np.bincount(rows, minlength=CELLS_OF_WELL)
        starts = np.cumsum(sizes) - sizes
        ids = np.insert(columns + 10, starts, 1).astype(np.int64)
        values = np.insert(rng.geometric(0.5, len(rows)).astype(np.float32), starts, -2.0)
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes + 1)]).astype(np.int32))
        drug = "DMSO_TF" if well % 10 == 0 else f"drug_{well % DRUGS}"
        table = pa.table(
            {
                "genes": pa.ListArray.from_arrays(offsets, pa.array(ids)),
                "expressions": pa.ListArray.from_arrays(offsets, pa.array(values)),
                "drug": [drug] * CELLS_OF_WELL,
                "cell_line_id": np.char.add("line_", rng.integers(0, LINES, CELLS_OF_WELL).astype(str)).tolist(),
            }
        )
        if well % 10 == 0:
            writer = pq.ParquetWriter(folder / f"{well // 10:05d}.parquet", table.schema)
        writer.write_table(table, row_group_size=1000)
        if well % 10 == 9 or well == cells // CELLS_OF_WELL - 1:
            writer.close()


def read(folder: Path) -> dict:
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    from pertstate.base.constants import CELL_MASK, LABELS
    from pertstate.data.sentences import SentenceCollator
    from pertstate.data.stream_reading import CellStream, StreamColumns
    from pertstate.data.stream_survey import survey_stream
    from pertstate.data.streaming import SentenceStream

    at_start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    columns = StreamColumns("drug", "cell_line_id", gene_ids="genes", gene_values="expressions", marker=-2.0)
    files = sorted(map(str, folder.glob("*.parquet")))
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True, columns=columns.names)
    source = CellStream(stream, columns, {i + 10: f"gene_{i}" for i in range(GENES)})
    start = time.perf_counter()
    survey = survey_stream(source, control="DMSO_TF", reservoir_cells=1024, progress=False)
    looked = time.perf_counter()
    sentences = SentenceStream(source, survey, SET_SIZE, control_sentences=False, buffer_cells=16_384)
    cells = 0
    for batch in DataLoader(sentences, SENTENCES, collate_fn=SentenceCollator()):
        cells += int(batch[CELL_MASK].sum()) if CELL_MASK in batch else batch[LABELS].shape[:2].numel()
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "first look": survey.cells / (looked - start),
        "sentences": cells / (done - looked),
        "pending": sentences.progress["pending"],
        "at start": at_start / 2**10,
        "peak": peak / 2**10,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000, help="of the smallest size")
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read(args.read)))
        return
    print("| cells | first look (cells/s) | sentences (cells/s) | waiting at most | at start (MiB) | peak (MiB) |")
    print("|---:|---:|---:|---:|---:|---:|")
    for doubling in range(args.doublings + 1):
        cells = args.cells * 2**doubling
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "atlas"
            # In processes of their own: a child's peak memory starts from that of the process that starts it.
            code = "import sys; from pathlib import Path; from stream import write; write(Path(sys.argv[1]), int(sys.argv[2]))"
            here = Path(__file__).parent
            subprocess.run([sys.executable, "-c", code, str(folder), str(cells)], check=True, cwd=here)
            command = [sys.executable, str(Path(__file__).resolve()), "--read", str(folder)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        figures = [f"{found[key]:,.0f}" for key in ("first look", "sentences", "pending", "at start", "peak")]
        print(f"| {cells:,} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
