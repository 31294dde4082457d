"""Files of older and newer libraries, compressed files, files with other endings; and names of genes."""

import gzip
import logging
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.base.anndata_source import room_note
from pertstate.cli import main as pertstate
from pertstate.data import Splits, prepare, read_perturbation_features
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.cells import load
from pertstate.data.reading import AnnDataFile, expand_paths
from pertstate.evaluation.prediction import predict


def screen(genes: int = 6, seed: int = 0) -> ad.AnnData:
    """24 cells whose labels are numerals. Their categories are in another order."""
    r = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(np.tile(["0", "1", "2"], 8), categories=["2", "1", "0"]),
            "cell_type": pd.Categorical(np.repeat(["b", "a"], 12), categories=["b", "a"]),
        },
        index=[f"c{i}" for i in range(24)],
    )
    counts = sp.csr_matrix(r.poisson(3, (24, genes)).astype(np.float32))
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(genes)]))


def labels(path: Path, **options) -> dict[str, str]:
    """The label of each cell. All ways of reading must agree on it."""
    reader = StateProcessor(control="0")
    with AnnDataFile(path) as data:
        in_ranges = pd.concat(
            [reader.labels_of(data.some_obs(slice(i, i + 7), reader.label_columns)) for i in range(0, 24, 7)]
        )
        whole = reader.labels(data)
    pd.testing.assert_frame_equal(in_ranges, whole)
    source = DataArguments(datasets=str(path), control="0", **options).file_source()
    codes = source.parts[0].codes
    assert source.groups["perturbation"].to_numpy()[codes].tolist() == whole["perturbation"].tolist()
    return whole["perturbation"].to_dict()


EXPECTED = dict(zip(screen().obs_names, screen().obs["perturbation"].astype(str)))


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_categories_of_files_of_2019_to_2021_are_labels_and_not_codes(tmp_path, form):
    """Anndata 0.7 wrote codes as a column, and the categories under `__categories`."""
    path = tmp_path / f"s.{form}"
    if form == "zarr":
        import zarr

        screen().write_zarr(path)
        root = zarr.open_group(str(path), mode="r+", use_consolidated=False)
    else:
        screen().write_h5ad(path)
        root = h5py.File(path, "r+")
    obs = root["obs"]
    for name in ("perturbation", "cell_type"):
        categories, codes = obs[name]["categories"][:], obs[name]["codes"][:]
        del obs[name]
        group = obs.require_group("__categories")
        if form == "zarr":
            group[name] = np.array([str(one) for one in categories], dtype="U")
            obs[name] = codes
            obs[name].attrs["categories"] = f"__categories/{name}"
        else:
            group.create_dataset(name, data=categories, dtype=h5py.string_dtype())
            obs.create_dataset(name, data=codes).attrs["categories"] = group[name].ref
    obs.attrs["encoding-version"] = "0.1.0"
    if form == "h5ad":
        root.close()
    else:
        zarr.consolidate_metadata(str(path))
    assert labels(path) == EXPECTED


@pytest.mark.parametrize("table", ["obs", "var"])
def test_names_of_a_nullable_string_type_are_read(tmp_path, table):
    """Pandas 3 gives every text this type."""
    adata = screen()
    of = getattr(adata, table)
    of.index = of.index.astype("string")
    adata.obs["note"] = pd.array(["x", None] * 12, dtype="string")
    adata.obs["count"] = pd.array([1, None] * 12, dtype="Int64")
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(tmp_path / "s.h5ad")
    assert labels(tmp_path / "s.h5ad") == EXPECTED
    store = prepare(DataArguments(datasets=str(tmp_path / "s.h5ad"), control="0"), tmp_path / "store", quiet=True)
    assert store.manifest.genes == [f"G{i}" for i in range(6)]
    assert store.obs().loc["c1", "perturbation"] == "1" and store.obs().loc["c0", "note"] == "x"


def test_other_endings_braces_and_folders(tmp_path, caplog):
    folder = tmp_path / "set"
    folder.mkdir()
    screen().write_h5ad(folder / "a.h5")
    screen().write_h5ad(folder / "b.h5ad")
    (folder / "c.h5ad.gz").write_bytes(gzip.compress((folder / "b.h5ad").read_bytes()))
    names = [path.name for path in expand_paths(folder)]
    assert names == ["a.h5", "b.h5ad", "c.h5ad.gz"]
    assert [path.name for path in expand_paths(f"{folder}/{{b,a}}.h5*")] == ["b.h5ad", "a.h5"]
    with pytest.raises(FileNotFoundError, match="nothing.h5ad: no such file"):
        expand_paths(f"{folder}/{{b,nothing}}.h5ad")
    with pytest.raises(ValueError, match="a brace is opened and not closed"):
        expand_paths(f"{folder}/{{b,a.h5ad")
    with caplog.at_level(logging.INFO, "pertstate"):
        for name in names:
            assert labels(folder / name) == EXPECTED
    assert caplog.text.count("unpacking") == 1
    half = (folder / "c.h5ad.gz").read_bytes()
    (folder / "half.h5ad.gz").write_bytes(half[: len(half) // 2])
    with pytest.raises(ValueError, match=r"half.h5ad.gz .* cannot be read as .h5ad: EOFError.*copy or write it again"):
        AnnDataFile(folder / "half.h5ad.gz")


def test_the_toml_of_a_challenge_as_it_is(tmp_path, caplog):
    for name in ("k562", "rpe1"):
        screen().write_h5ad(tmp_path / f"{name}.h5")
    (tmp_path / "starter.toml").write_text(
        f'[datasets]\nset = "{tmp_path}/{{k562,rpe1}}.h5"\n[training]\nset = "train"\n'
        '[zeroshot]\n[fewshot]\n[fewshot."set.a"]\nval = ["1"]\ntest = ["ABSENT"]\n'
    )
    data = DataArguments(splits=str(tmp_path / "starter.toml"), control="0")
    source = data.file_source()
    cells, _ = load(source, data.resolve_splits(source.groups), **data.fit_options())
    assert len(cells) == 48 and set(cells.groups["split"]) == {"control", "train", "val"}
    assert "[fewshot] names 1 perturbations that set.a does not have" in caplog.text
    one = DataArguments(datasets=str(tmp_path / "k562.h5"), control="0", context="H1").file_source()
    assert set(one.groups["context"]) == {"H1"}


def test_vectors_of_a_torch_table_are_read_and_nothing_is_run(tmp_path):
    vectors = {"A": torch.arange(3.0), "B": torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)}
    torch.save(vectors, tmp_path / "esm2.pt")
    features = read_perturbation_features(tmp_path / "esm2.pt")
    assert features.names == ["A", "B"] and features.vectors.tolist() == [[0, 1, 2], [1, 2, 4]]
    torch.save({"A": Path("x")}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: expected a pickle of tensors.*nothing of it was run"):
        read_perturbation_features(tmp_path / "other.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a dictionary of names and vectors, found list"):
        read_perturbation_features(tmp_path / "list.pt")


def test_knock_downs_without_any_gene_of_the_data_stay(tmp_path):
    screen().write_h5ad(tmp_path / "s.h5ad")
    data = DataArguments(datasets=str(tmp_path / "s.h5ad"), control="0")
    store = prepare(data, tmp_path / "store", PrepareArguments(knockdown_filter=True), quiet=True)
    assert len(store) == 24
    assert store.manifest.notes == ["knock-down filter: kept 2 perturbations without a gene in the data: ['1', '2']"]


def test_cells_that_do_not_fit_are_said_beforehand():
    assert room_note(1 << 20) is None
    assert "make a store of them (pertstate prepare), which is read from disk" in room_note(1 << 60)


# Genes


def fitted(adata: ad.AnnData, **options) -> tuple[StateForPerturbation, StateProcessor]:
    processor = StateProcessor.fit(adata, control="0", **options)
    torch.manual_seed(0)
    sizes = {"input_dim": processor.feature_dim, "num_perturbations": 2}
    return StateForPerturbation(StateConfig.from_preset("tiny", set_size=4, **sizes)).eval(), processor


def test_genes_by_a_column_of_var(tmp_path):
    plain, other = screen(), screen()
    other.var["symbol"] = other.var_names
    other.var_names = [f"ENSG{i:011d}.{i + 1}" for i in range(6)]
    _, processor = fitted(plain)
    _, of_column = fitted(other, gene_key="symbol")
    assert of_column.vocabulary == processor.vocabulary
    assert np.array_equal(of_column.features(other), processor.features(plain))
    with pytest.raises(
        KeyError, match=r"6 of the model's 6 genes are missing .*var\['symbol'\] has them: set gene_key: symbol"
    ):
        processor.features(other)
    with pytest.raises(
        KeyError, match=r"var has no column 'symbols' \(gene_key\), found \['symbol'\]; did you mean 'symbol'"
    ):
        fitted(other, gene_key="symbols")
    other.write_h5ad(tmp_path / "s.h5ad")
    data = DataArguments(datasets=str(tmp_path / "s.h5ad"), control="0", gene_key="symbol")
    assert prepare(data, tmp_path / "store", quiet=True).manifest.genes == processor.vocabulary.genes
    cells, from_file = load(data.file_source(), Splits({"s": [tmp_path / "s.h5ad"]}, {"s"}), **data.fit_options())
    assert from_file.to_dict() == of_column.to_dict() and cells.features.sum() == pytest.approx(
        processor.features(plain).sum()
    )


def test_entrez_ids_are_the_same_genes_however_they_are_stored():
    whole, fractions = screen(), screen()
    whole.var["entrez"] = np.arange(7157, 7163)
    fractions.var["entrez"] = pd.Series(np.arange(7157.0, 7163.0), index=fractions.var_names).astype("category")
    _, processor = fitted(whole, gene_key="entrez")
    assert processor.vocabulary.genes == [str(i) for i in range(7157, 7163)]
    assert np.array_equal(processor.features(fractions), processor.features(whole))


def test_versions_of_ensembl_ids_are_suggested_and_ignored_when_asked():
    with_versions, without = screen(), screen()
    with_versions.var_names = [f"ENSG{i:011d}.{i + 1}" for i in range(6)]
    without.var_names = [f"ENSG{i:011d}" for i in range(6)]
    _, processor = fitted(without)
    with pytest.raises(
        KeyError, match="they match without the versions of Ensembl ids: set ignore_gene_versions: true"
    ):
        processor.features(with_versions)
    _, ignoring = fitted(with_versions, ignore_gene_versions=True)
    assert ignoring.vocabulary == processor.vocabulary
    assert np.array_equal(ignoring.features(with_versions), ignoring.features(without))


def test_values_and_genes_of_raw(tmp_path):
    adata = screen()
    plain = StateProcessor.fit(adata, control="0")
    adata.raw = adata
    adata = adata[:, :3].copy()
    adata.X = adata.X.toarray() - 2.5
    processor = StateProcessor.fit(adata, control="0", input="raw/X")
    assert processor.vocabulary.genes == plain.vocabulary.genes
    assert np.array_equal(processor.features(adata), plain.features(screen()))
    with pytest.raises(ValueError, match=r"other matrices are \['raw/X'\]"):
        StateProcessor.fit(adata, control="0")
    adata.write_h5ad(tmp_path / "s.h5ad")
    data = DataArguments(datasets=str(tmp_path / "s.h5ad"), control="0", input="raw/X")
    source = data.file_source()
    cells, _ = load(source, data.resolve_splits(source.groups), **data.fit_options())
    assert cells.features.sum() == pytest.approx(plain.features(screen()).sum())
    with pytest.raises(KeyError, match="input 'raw/X': the data have no raw"):
        StateProcessor.fit(screen(), control="0", input="raw/X")


def test_missing_genes_are_counted_and_too_many_an_error(tmp_path, caplog):
    model, processor = fitted(screen())
    fewer = screen()[:, :5].copy()
    fewer.write_h5ad(tmp_path / "fewer.h5ad")
    predict(model, processor, tmp_path / "fewer.h5ad", tmp_path / "p.h5ad", missing_genes="zero", quiet=True)
    note = "1 of 6 genes of the model are missing from the data and are read as unexpressed"
    assert note in caplog.text and ad.read_h5ad(tmp_path / "p.h5ad").uns["pertstate"]["missing_genes"] == note
    least = screen()[:, :2].copy()
    least.write_h5ad(tmp_path / "least.h5ad")
    with pytest.raises(ValueError, match=r"4 of 6 genes of the model are missing from the data: expected at most 50%"):
        predict(model, processor, tmp_path / "least.h5ad", tmp_path / "q.h5ad", missing_genes="zero", quiet=True)
    assert not (tmp_path / "q.h5ad").exists()
    options = {"missing_genes": "zero", "max_missing_genes": 0.7, "quiet": True}
    predict(model, processor, tmp_path / "least.h5ad", tmp_path / "q.h5ad", **options)


def test_genes_that_files_do_not_share_are_counted_and_too_many_an_error(tmp_path, caplog):
    one, other = screen(), screen()
    other.var_names = ["G0", "G1", "G2", "G3", "X", "Y"]
    processor = StateProcessor.fit([one, other], control="0")
    assert processor.vocabulary.genes == ["G0", "G1", "G2", "G3"]
    assert "4 of 8 genes are not in every file: left out" in caplog.text
    other.var_names = ["G0", "G1", "U", "V", "X", "Y"]
    for name, adata in (("one", one), ("other", other)):
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    files = {name: str(tmp_path / f"{name}.h5ad") for name in ("one", "other")}
    with pytest.raises(ValueError, match="the files share 2 genes, and the smallest has 6: expected at least 50%"):
        DataArguments(datasets=files, control="0").file_source()
    assert DataArguments(datasets=files, control="0", max_missing_genes=0.8).file_source().genes == ["G0", "G1"]


def test_nearest_names_whatever_their_case(tmp_path, capsys):
    adata = screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].cat.rename_categories({"1": "KLF1", "2": "MYC"})
    processor = StateProcessor.fit(adata, control="0")
    with pytest.raises(KeyError, match="perturbation 'klf1' is unknown .*did you mean 'KLF1'"):
        processor(adata, "klf1")
    assert pertstate(["info", str(tmp_path / "none.h5ad")]) == 1
    assert "no such" in capsys.readouterr().err
