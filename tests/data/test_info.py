"""What `info` says of files that hold something odd."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertstate.data.info import describe


def screen() -> ad.AnnData:
    """Counts of 3 genes of 4 control cells and 4 cells under `A`."""
    counts = np.random.default_rng(0).poisson(5, (8, 3)).astype(np.float32)
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 4, "cell_type": "x"}, index=[f"c{i}" for i in range(8)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=["G0", "G1", "G2"]))


@pytest.mark.parametrize("column", ["perturbation", "cell_type"])
def test_cells_without_a_label_are_in_the_way_and_the_others_are_described(tmp_path, column):
    adata = screen()
    adata.obs[column] = [np.nan if i < 2 else label for i, label in enumerate(adata.obs[column])]
    adata.write_h5ad(tmp_path / "s.h5ad")
    text = describe(tmp_path / "s.h5ad")
    assert "x        3  3    6" in text
    assert f"- obs['{column}'] is empty in 2 cells, first in 'c0'; label them, or set unlabelled: drop" in text
    adata.obs[column] = np.nan
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert "in 8 cells, first in 'c0'" in describe(tmp_path / "s.h5ad")


def test_values_of_raw_are_described(tmp_path):
    adata = screen()
    adata.raw = adata.copy()
    adata.X = adata.X - adata.X.mean(axis=0)
    adata.write_h5ad(tmp_path / "s.h5ad")
    assert "X is scaled; use counts or log1p expression; other matrices are ['raw/X']" in describe(tmp_path / "s.h5ad")
    text = describe(tmp_path / "s.h5ad", input="raw/X")
    assert (
        f"\nraw/X: counts, {np.median(adata.raw.X.sum(axis=1)):.0f} per cell (median)" in text
        and 'input: "raw/X"' in text
        and "\nready: " in text
    )


def test_labels_that_may_be_mistaken_are_said(tmp_path):
    adata = screen()
    adata.obs["perturbation"] = ["control", "TGF-b+IL2"] * 4
    adata.obs["cell_type"] = ["K562", "K562", "k562", "k562"] * 2
    adata.write_h5ad(tmp_path / "s.h5ad")
    text = describe(tmp_path / "s.h5ad")
    assert "a part of each stands nowhere else in the data: ['TGF-b+IL2']; where '+' belongs to names" in text
    assert "contexts ['K562', 'k562'] are written almost alike" in text


def test_a_mixture_of_scales_is_in_the_way(tmp_path):
    counts = np.random.default_rng(0).poisson(5, (40, 30)).astype(np.float32)
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    values[20:] = counts[20:]
    obs = pd.DataFrame({"perturbation": ["control", "A"] * 20, "cell_type": "x"}, index=[f"c{i}" for i in range(40)])
    adata = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(30)]))
    adata.write_h5ad(tmp_path / "s.h5ad")
    text = describe(tmp_path / "s.h5ad")
    assert "X: several scales" in text and "\nready" not in text
    assert (
        "- X: cells are on several scales: log1p of 10,000 counts per cell (20 of 40 cells looked at); counts (20"
        in text
    )
