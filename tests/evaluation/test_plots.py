"""Pictures of predicted against observed changes: the format that the name asks for, whole or not at all."""

import os
import xml.etree.ElementTree as ElementTree

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertstate.evaluation.plots import plot_mean_changes


@pytest.fixture
def files(tmp_path):
    """A predicted and a real file: log1p expression of 3 genes in cells of T and B under control, A and, in T, C."""
    labels = [("control", "T"), ("A", "T"), ("C", "T"), ("control", "B"), ("A", "B")]
    obs = pd.DataFrame(
        [label for label in labels for _ in range(4)],
        columns=["perturbation", "cell_type"],
        index=[f"cell{i}" for i in range(20)],
    )
    values = np.random.default_rng(0).random((20, 3)).astype(np.float32)
    paths = tmp_path / "predicted.h5ad", tmp_path / "real.h5ad"
    for shift, path in zip((0.1, 0.0), paths):
        ad.AnnData(values + np.float32(shift), obs, pd.DataFrame(index=["g0", "g1", "g2"])).write_h5ad(path)
    (tmp_path / "out").mkdir()
    return *paths, tmp_path / "out"


def titles(path) -> list[str]:
    """The texts of a picture in SVG, which matplotlib writes as comments before their outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(path, parser)
    return [str(node.text).strip() for node in tree.iter() if node.tag is ElementTree.Comment]


def test_a_panel_for_each_group_that_both_have(files):
    predicted, real, out = files
    plot_mean_changes(predicted, real, out / "changes.svg")
    shown = titles(out / "changes.svg")
    for group in ("T, A", "T, C", "B, A"):
        assert group in shown
    # The predicted cells are the real ones with the same number added to all genes, which gives a perfect correlation.
    assert shown.count("Pearson 1.00") == 3
    plot_mean_changes(predicted, real, out / "changes.svg", most=1, overwrite=True)
    assert titles(out / "changes.svg").count("Pearson 1.00") == 1
    assert os.listdir(out) == ["changes.svg"]


@pytest.mark.parametrize("name, begins", [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.b.svg", b"<?xml")])
def test_the_ending_is_the_format(files, name, begins):
    predicted, real, out = files
    plot_mean_changes(predicted, real, out / name)
    assert (out / name).read_bytes().startswith(begins) and os.listdir(out) == [name]


@pytest.mark.parametrize("name", ["picture", "picture.docx"])
def test_an_unknown_format_is_refused_and_leaves_nothing(files, name):
    predicted, real, out = files
    with pytest.raises(ValueError, match="is not supported"):
        plot_mean_changes(predicted, real, out / name)
    assert os.listdir(out) == []


def test_nothing_in_common(files, tmp_path):
    predicted, real, out = files
    adata = ad.read_h5ad(predicted)
    adata[(adata.obs["perturbation"] == "control").to_numpy()].write_h5ad(tmp_path / "controls.h5ad")
    with pytest.raises(ValueError, match=r"have no \(context, perturbation\) with real cells and controls in common"):
        plot_mean_changes(tmp_path / "controls.h5ad", real, out / "a.png")
    assert os.listdir(out) == []
