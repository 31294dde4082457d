"""
How large a report is and how fast it opens: 200 perturbations in 10 contexts, 2,000 genes, in a headless Chromium.

    python benchmarks/report.py [--perturbations 200] [--contexts 10] [--genes 2000]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import browser
from made_scores import LOG, made_scores

from pertstate.evaluation.report import render_report


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--perturbations", type=int, default=200)
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--genes", type=int, default=2000)
    args = parser.parse_args()
    scores = made_scores(args.contexts, args.perturbations, args.genes, cells=8)
    start = time.perf_counter()
    text = render_report(scores, LOG, "benchmark")
    written = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        path = Path(folder) / "report.html"
        path.write_text(text, encoding="utf-8")
        times = []
        for _ in range(3):
            page = chromium.new_page()
            start = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready=true]", timeout=120_000)
            times.append(time.perf_counter() - start)
            page.close()
        size = path.stat().st_size
    print(f"{len(scores.groups)} groups x {args.genes} genes, {len(scores.table)} rows")
    print(f"written in {written:.1f} s, {size / 1e6:.2f} MB, opened in {sorted(times)[1]:.2f} s (all pictures drawn)")


if __name__ == "__main__":
    main()
