"""StateProcessor: what it learns from an AnnData, the tensors it makes, the AnnData it gives back, what it refuses."""

import json
import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import torch
from transformers import AutoProcessor

from pertstate import PerturbationOutput, StateForPerturbation, StateProcessor
from pertstate.base.cell_values import cell_totals, normalize_counts
from pertstate.configuration_state import StateConfig
from pertstate.processing import CellSentences, Vocabulary


ARMS = {"control": 10, "A": 4, "B": 3, "A+B": 2}
FORMATS = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda matrix: matrix.toarray()}


def counts_screen(num_genes=12, form="csr", seed=0) -> ad.AnnData:
    """Two contexts, two batches, two perturbations and their combination; X holds counts."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        [(label, context) for context in ("T cell", "B cell") for label, n in ARMS.items() for _ in range(n)],
        columns=["perturbation", "cell_type"],
    )
    obs["batch"] = [f"b{i % 2}" for i in range(len(obs))]
    obs.index = [f"cell{i}" for i in range(len(obs))]
    counts = rng.poisson(2.0, (len(obs), num_genes)).astype(np.float32)
    counts[:, 0] += 1  # no cell is empty
    genes = pd.DataFrame(index=[f"gene{i}" for i in range(num_genes)])
    return ad.AnnData(FORMATS[form](sp.csr_matrix(counts)), obs=obs, var=genes)


def log1p_screen(**kwargs) -> ad.AnnData:
    adata = counts_screen(**kwargs)
    adata.layers["counts"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    return adata


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def assert_same_sentences(one: CellSentences, other: CellSentences):
    assert set(one) == set(other)
    for key in one:
        assert torch.equal(one[key], other[key]), key
    pd.testing.assert_frame_equal(one.obs, other.obs)


# What fit learns


def test_fit_learns_names_in_order():
    processor = StateProcessor.fit(counts_screen(), batch_key="batch")
    assert processor.vocabulary == Vocabulary(
        genes=[f"gene{i}" for i in range(12)],
        perturbations=["A", "B"],
        contexts=["B cell", "T cell"],
        batches=["b0", "b1"],
    )
    assert processor.feature_dim == 12


@pytest.mark.parametrize(
    "make, asked, normalize, values",
    [
        (counts_screen, "auto", "counts_to_log1p", "log1p"),
        (counts_screen, "counts_to_log1p", "counts_to_log1p", "log1p"),
        (counts_screen, "none", "none", "counts"),
        (log1p_screen, "auto", "none", "log1p"),
        (log1p_screen, "none", "none", "log1p"),
    ],
)
def test_fit_finds_out_what_the_values_are(make, asked, normalize, values):
    adata = make()
    processor = StateProcessor.fit(adata, normalize=asked)
    assert (processor.normalize, processor.values) == (normalize, values)
    if normalize == "none":
        np.testing.assert_array_equal(processor.features(adata), dense(adata.X))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("form", FORMATS)
def test_counts_are_normalised_as_scanpy_does(form, dtype):
    adata = counts_screen(form=form)
    adata.X = adata.X.astype(dtype)
    expected = counts_screen()
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    features = StateProcessor.fit(adata).features(adata)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, dense(expected.X), rtol=2e-6, atol=0)


@pytest.mark.parametrize("target_sum", [1e4, 777.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
def test_normalize_counts_is_one_function_of_dense_and_stored_values(dtype, target_sum):
    counts = counts_screen().X.toarray().astype(dtype)
    counts[3] = 0
    totals = cell_totals(counts)
    assert totals.dtype == np.float64 and totals[3] == 0
    scale = np.array([target_sum / (total or 1) for total in totals.tolist()]).astype(np.float32)
    expected = np.log1p(counts.astype(np.float32) * scale[:, None])
    before = counts.copy()
    dense_values = normalize_counts(counts, totals, target_sum)
    np.testing.assert_array_equal(dense_values, expected)
    assert dense_values.dtype == np.float32 and (dense_values[3] == 0).all()
    np.testing.assert_array_equal(counts, before)

    rows = sp.csr_matrix(counts)
    stored = normalize_counts(rows.data, cell_totals(rows), target_sum, stored=np.diff(rows.indptr))
    assert stored.dtype == np.float32 and len(stored) == rows.nnz
    np.testing.assert_array_equal(sp.csr_matrix((stored, rows.indices, rows.indptr), rows.shape).toarray(), expected)
    np.testing.assert_array_equal(rows.toarray(), before)


@pytest.mark.parametrize("form", FORMATS)
def test_features_are_those_of_normalize_counts(form):
    adata = counts_screen(form=form)
    counts = dense(adata.X)
    processor = StateProcessor.fit(adata, target_sum=500)
    expected = normalize_counts(counts, cell_totals(counts), 500)
    np.testing.assert_array_equal(processor.features(adata), expected)
    wanted = ["gene7", "gene2"]
    some_genes = StateProcessor.fit(adata, target_sum=500, genes=wanted)
    np.testing.assert_array_equal(some_genes.features(adata), expected[:, [7, 2]])


def test_the_target_sum_is_10000_unless_asked_for():
    adata = counts_screen()
    assert StateProcessor.fit(adata).target_sum == 1e4
    for asked in (500, 500.0, np.int64(500)):
        processor = StateProcessor.fit(adata, target_sum=asked)
        assert processor.target_sum == 500 and type(processor.target_sum) is float
        np.testing.assert_allclose(np.expm1(processor.features(adata)).sum(axis=1), 500, rtol=1e-5)
    assert processor(adata, "A")["control_cells"].max() < StateProcessor.fit(adata)(adata, "A")["control_cells"].max()


@pytest.mark.parametrize("form", FORMATS)
def test_the_median_is_that_of_cells_with_counts_and_is_stored(tmp_path, form):
    adata = counts_screen(form="dense")
    adata.X[5:9] = 0
    totals = adata.X.sum(axis=1)
    adata.X = FORMATS[form](sp.csr_matrix(adata.X))
    halves = [adata[:20].copy(), adata[20:].copy()]
    processor = StateProcessor.fit(halves, target_sum="median", genes=["gene0", "gene1"])
    assert processor.target_sum == np.median(totals[totals > 0]) != np.median(totals)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["target_sum"] == processor.target_sum
    # Other data do not change it.
    other = counts_screen(seed=9)
    other.X = other.X * 3
    expected = normalize_counts(dense(other.X), cell_totals(dense(other.X)), processor.target_sum)[:, :2]
    np.testing.assert_array_equal(StateProcessor.from_pretrained(tmp_path).features(other), expected)


@pytest.mark.parametrize("asked", [0, -1, np.nan, np.inf, True, "mean", "1e4", [1e4]])
def test_target_sums_that_cannot_be(asked):
    with pytest.raises(ValueError, match=r"target_sum=.*: expected a number of counts above 0, or 'median'"):
        StateProcessor.fit(counts_screen(), target_sum=asked)


@pytest.mark.parametrize("asked", [1e4, "median"])
def test_a_target_sum_is_for_counts_alone(asked):
    embedded = counts_screen()
    embedded.obsm["X_emb"] = np.ones((embedded.n_obs, 3))
    message = f"target_sum={asked!r} is what counts are scaled to, but {{}} is used as it is; leave target_sum out"
    for adata, options, source in (
        (log1p_screen(), {}, "X"),
        (counts_screen(), {"normalize": "none"}, "X"),
        (log1p_screen(), {"input": "layers/counts", "normalize": "none"}, "layers/counts"),
        (embedded, {"input": "obsm/X_emb"}, "obsm/X_emb"),
    ):
        with pytest.raises(ValueError, match=re.escape(message.format(source))):
            StateProcessor.fit(adata, target_sum=asked, **options)
    decoder = StateProcessor.fit(embedded, input="obsm/X_emb", gene_input="X", target_sum=asked)
    totals = cell_totals(embedded.X)
    assert decoder.target_sum == (np.median(totals) if asked == "median" else 1e4)
    found = np.expm1(decoder.gene_features(embedded)).sum(axis=1)
    np.testing.assert_allclose(found, decoder.target_sum, rtol=1e-5)


def test_totals_are_those_of_all_genes_of_the_data():
    adata = counts_screen()
    features = StateProcessor.fit(adata, genes=["gene3", "gene1"]).features(adata)
    everything = StateProcessor.fit(adata).features(adata)
    np.testing.assert_array_equal(features, everything[:, [3, 1]])


@pytest.mark.parametrize("make", [counts_screen, log1p_screen])
@pytest.mark.parametrize("form", FORMATS)
def test_highly_variable_genes_are_scanpys(make, form):
    adata = make(num_genes=200, form=form)
    reference = log1p_screen(num_genes=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.highly_variable_genes(reference, n_top_genes=40)
        genes = StateProcessor.fit(adata, genes=40).vocabulary.genes
    assert genes == reference.var_names[reference.var["highly_variable"]].tolist()


def test_several_files_are_joined_by_gene_name():
    whole = counts_screen(num_genes=60)
    one, other = whole[whole.obs["cell_type"] == "T cell"].copy(), whole[whole.obs["cell_type"] == "B cell"].copy()
    turned = other[:, other.var_names[::-1][:-5]].copy()  # without gene0 .. gene4, in reverse
    processor = StateProcessor.fit([one, turned])
    assert processor.vocabulary.genes == [f"gene{i}" for i in range(5, 60)]
    assert processor.vocabulary.contexts == ["B cell", "T cell"]

    alike = [one[:, one.var_names[5:]].copy(), turned]  # totals over the same genes, so that the pooled cells are equal
    joined = ad.concat([alike[0], alike[1][:, alike[0].var_names]])
    assert StateProcessor.fit(alike, genes=20).vocabulary.genes == StateProcessor.fit(joined, genes=20).vocabulary.genes


def test_controls_may_lie_in_another_file():
    whole = counts_screen()
    is_control = (whole.obs["perturbation"] == "control").to_numpy()
    processor = StateProcessor.fit([whole[~is_control].copy(), whole[is_control].copy()])
    assert processor.vocabulary.perturbations == ["A", "B"]


def test_gene_lists_keep_their_order():
    processor = StateProcessor.fit(log1p_screen(), genes=["gene7", "gene2"])
    assert processor.vocabulary.genes == ["gene7", "gene2"]
    adata = log1p_screen()
    np.testing.assert_array_equal(processor.features(adata), dense(adata.X)[:, [7, 2]])


def embedded(form=np.asarray) -> ad.AnnData:
    adata = log1p_screen()
    matrix = np.random.default_rng(1).normal(size=(adata.n_obs, 5)).astype(np.float32)
    adata.obsm["X_emb"] = form(matrix)
    return adata


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, "frame"])
def test_an_embedding_is_read_as_it_is(form):
    adata = embedded(np.asarray if form == "frame" else form)
    expected = dense(adata.obsm["X_emb"])
    if form == "frame":
        adata.obsm["X_emb"] = pd.DataFrame(expected, index=adata.obs_names)
    processor = StateProcessor.fit(adata, input="obsm/X_emb")
    assert (processor.values, processor.feature_dim, processor.vocabulary.genes) == ("embedding", 5, [])
    np.testing.assert_array_equal(processor.features(adata), expected)
    np.testing.assert_array_equal(processor.features(adata, np.array([3, 17])), expected[[3, 17]])


@pytest.mark.parametrize("gene_input, normalize", [("X", "none"), ("layers/counts", "counts_to_log1p")])
def test_the_gene_decoder_reads_expression_beside_an_embedding(gene_input, normalize):
    adata = embedded()
    processor = StateProcessor.fit(adata, input="obsm/X_emb", gene_input=gene_input, genes=["gene4", "gene0"])
    assert (processor.normalize, processor.feature_dim) == (normalize, 5)
    np.testing.assert_allclose(processor.gene_features(adata), dense(adata.X)[:, [4, 0]], rtol=2e-6)


def test_the_separator_is_an_option():
    adata = counts_screen()
    assert StateProcessor.fit(adata, combination_separator=None).vocabulary.perturbations == ["A", "A+B", "B"]
    adata.obs["perturbation"] = adata.obs["perturbation"].str.replace("+", "|")
    assert StateProcessor.fit(adata, combination_separator="|").vocabulary.perturbations == ["A", "B"]


def test_categories_without_cells_are_not_learned():
    adata = counts_screen()
    adata.obs = adata.obs.astype("category")
    processor = StateProcessor.fit(adata[adata.obs["cell_type"] == "T cell"])
    assert processor.vocabulary.contexts == ["T cell"]
    part = adata[adata.obs["perturbation"].isin(["control", "A"])].copy()
    part.obs["perturbation"] = pd.Categorical(part.obs["perturbation"], ["gone", "A", "control"])
    assert StateProcessor.fit(part).vocabulary.perturbations == ["A"]


# Sentences


def test_gene_order_does_not_matter():
    adata = counts_screen(num_genes=30)
    processor = StateProcessor.fit(adata)
    shuffled = adata[:, np.random.default_rng(0).permutation(30)].copy()
    assert_same_sentences(processor(adata, "A"), processor(shuffled, "A"))


def test_more_genes_than_the_model_has_do_not_matter():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata[:, :8].copy())
    assert_same_sentences(processor(adata, "A"), processor(adata[:, :8].copy(), "A"))


@pytest.mark.parametrize("set_size, sizes", [(4, [4, 3, 3]), (5, [5, 5]), (128, [10]), (1, [1] * 10)])
def test_every_control_cell_stands_once_per_perturbation(set_size, sizes):
    adata = log1p_screen()
    processor = StateProcessor.fit(adata, set_size=set_size)
    sentences = processor(adata, ["A", "B"])
    mask = sentences["cell_mask"]
    assert mask.sum(dim=1).tolist() == sizes * 4  # two perturbations, two contexts
    assert sentences["control_cells"].shape == (4 * len(sizes), max(sizes), 12)
    assert (sentences["control_cells"][~mask] == 0).all()
    controls = adata.obs_names[adata.obs["perturbation"] == "control"]
    for _, cells in sentences.obs.groupby("perturbation"):
        assert sorted(cells["control_barcode"]) == sorted(controls)
    np.testing.assert_array_equal(
        sentences["control_cells"][mask].numpy(), dense(adata[sentences.obs["control_barcode"]].X)
    )
    assert (adata.obs.loc[sentences.obs["control_barcode"], "cell_type"].to_numpy() == sentences.obs["cell_type"]).all()


def test_sentences_carry_ids_of_perturbation_context_and_batch():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata, batch_key="batch", set_size=4)
    sentences = processor(adata, ["B", "A+B"])
    vocabulary = processor.vocabulary
    assert sentences["perturbation_ids"].tolist() == [[1, -1]] * 6 + [[0, 1]] * 6
    first = np.flatnonzero(sentences["cell_mask"].numpy().ravel())
    per_cell = np.repeat(np.arange(12), 4)[first]
    contexts = np.array(vocabulary.contexts)[sentences["context_ids"].numpy()][per_cell]
    assert (contexts == sentences.obs["cell_type"]).all()
    batches = np.array(vocabulary.batches)[sentences["batch_ids"][sentences["cell_mask"]].numpy()]
    assert (batches == adata.obs.loc[sentences.obs["control_barcode"], "batch"]).all()
    assert (batches == sentences.obs["batch"]).all()
    names = ["B", "A+B"]
    assert sentences.obs["perturbation"].tolist() == [names[i // 6] for i in per_cell]


def test_a_context_that_training_did_not_see_has_no_id():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata[adata.obs["cell_type"] == "T cell"].copy())
    sentences = processor(adata, "A")
    assert sentences["context_ids"].tolist() == [0, -1]
    assert sentences.obs["cell_type"].tolist() == ["T cell"] * 10 + ["B cell"] * 10


def test_contexts_can_be_chosen():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    for chosen in ("B cell", ["B cell"]):
        sentences = processor(adata, "A", context=chosen)
        assert set(sentences.obs["cell_type"]) == {"B cell"} and len(sentences.obs) == 10
    assert sentences.controls == "B cell: 10 control cells"


@pytest.mark.parametrize(
    "name, ids",
    [
        ("A", [[0]]),
        ("A+B", [[0, 1]]),
        ("B+A", [[0, 1]]),
        ("A + B", [[0, 1]]),
        ("A+control", [[0]]),
        ("control+B", [[1]]),
        ("control", [[-1]]),
        ("A+A", [[0, 0]]),
    ],
)
def test_combinations(name, ids):
    adata = log1p_screen()
    sentences = StateProcessor.fit(adata)(adata, name, context="T cell")
    assert sentences["perturbation_ids"].tolist() == ids
    canonical = {"B+A": "A+B", "A + B": "A+B", "A+control": "A", "control+B": "B"}
    assert set(sentences.obs["perturbation"]) == {canonical.get(name, name)}


def test_a_perturbation_whose_name_holds_the_separator_is_itself():
    vocabulary = Vocabulary(["g"], ["A+B", "A", "B"], ["c"], [])
    processor = StateProcessor(vocabulary)
    assert processor.encode(["A+B", "B+A"])["perturbation_ids"].tolist() == [[0, -1], [2, 1]]


def test_doses():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata, set_size=5)
    sentences = processor(adata, "A+B", doses=[0.5, 2.0])
    assert sentences["perturbation_doses"].tolist() == [[0.5, 2.0]] * 4
    assert "perturbation_doses" not in processor(adata, "A+B")
    with pytest.raises(ValueError, match=r"doses: expected 2 \(one for each perturbation together\), found 1"):
        processor(adata, "A+B", doses=[1.0])


def test_the_seed_shuffles_cells_between_sentences():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata, set_size=5)
    assert_same_sentences(processor(adata, "A", seed=3), processor(adata, "A", seed=3))
    one, other = processor(adata, "A", seed=3).obs, processor(adata, "A", seed=4).obs
    unshuffled = processor(adata, "A").obs
    assert sorted(one["control_barcode"]) == sorted(other["control_barcode"]) == sorted(unshuffled["control_barcode"])
    assert one["control_barcode"].tolist() != other["control_barcode"].tolist()
    assert unshuffled["control_barcode"].tolist() == adata.obs_names[adata.obs["perturbation"] == "control"].tolist()


def test_a_perturbation_named_twice_is_predicted_once():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    assert_same_sentences(processor(adata, ["A", "B", "A"]), processor(adata, ["A", "B"]))


def test_cells_can_be_read_from_elsewhere():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    adata.layers["log1p"], adata.X = adata.X, None
    np.testing.assert_array_equal(
        processor(adata, "A", input="layers/log1p")["control_cells"], processor(log1p_screen(), "A")["control_cells"]
    )


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_a_backed_file_gives_the_same(tmp_path, form):
    adata = counts_screen(form=form)
    processor = StateProcessor.fit(adata, set_size=4)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    assert_same_sentences(processor(adata, ["A", "B"], seed=1), processor(backed, ["A", "B"], seed=1))
    backed.file.close()


def test_one_control_cell_is_a_sentence():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    sentences = processor(adata[:1].copy(), "A")
    np.testing.assert_array_equal(sentences["control_cells"][0], dense(adata[:1].X))
    assert sentences["cell_mask"].tolist() == [[True]]
    assert StateProcessor.fit(adata[[0, 10]].copy()).vocabulary.perturbations == ["A"]


def test_unicode_names():
    adata = counts_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].replace({"A": "IFN-β", "A+B": "IFN-β+B", "control": "対照"})
    adata.obs["cell_type"] = adata.obs["cell_type"].replace({"T cell": "γδ T"})
    adata.var_names = ["HLA-DRα", *adata.var_names[1:]]
    processor = StateProcessor.fit(adata, control="対照")
    sentences = processor(adata, "B+IFN-β", context="γδ T")
    assert sentences["perturbation_ids"].tolist() == [
        [processor.vocabulary.perturbations.index("B"), processor.vocabulary.perturbations.index("IFN-β")]
    ]


def test_cells_without_any_count_stay_zero():
    adata = counts_screen()
    adata.X = sp.csr_matrix(adata.X.toarray() * (np.arange(adata.n_obs) > 0)[:, None])
    processor = StateProcessor.fit(adata)
    assert (processor.features(adata)[0] == 0).all()
    assert (processor(adata[:1].copy(), "A")["control_cells"] == 0).all()
    assert np.isfinite(processor.features(adata)).all()


def test_csr_with_unsorted_and_doubled_entries():
    whole = counts_screen()
    plain = whole.X.tocsr()
    # Each entry is split into two parts, and the columns of each row are in reverse order.
    parts = [np.repeat(plain.indices[a:b][::-1], 2) for a, b in zip(plain.indptr, plain.indptr[1:])]
    halves = [np.stack([v - 1, np.ones_like(v)], 1).ravel() for v in _rows_reversed(plain)]
    matrix = sp.csr_matrix((np.concatenate(halves), np.concatenate(parts), plain.indptr * 2), shape=plain.shape)
    assert not matrix.has_canonical_format
    np.testing.assert_array_equal(matrix.toarray(), plain.toarray())
    processor = StateProcessor.fit(whole)
    before = matrix.data.copy()
    messy = ad.AnnData(matrix, obs=whole.obs, var=whole.var)
    np.testing.assert_allclose(processor.features(messy), processor.features(whole), rtol=2e-6)
    rows = np.array([2, 30])
    np.testing.assert_allclose(processor.features(messy, rows), processor.features(whole, rows), rtol=2e-6)
    np.testing.assert_array_equal(messy.X.data, before)


def _rows_reversed(matrix):
    return [matrix.data[a:b][::-1] for a, b in zip(matrix.indptr, matrix.indptr[1:])]


@pytest.mark.parametrize("make", [counts_screen, log1p_screen])
@pytest.mark.parametrize("form", FORMATS)
def test_the_data_are_left_as_they_were(make, form):
    adata = make(form=form)
    before = adata.copy()
    processor = StateProcessor.fit(adata, genes=5)
    processor(adata, "A")
    np.testing.assert_array_equal(dense(adata.X), dense(before.X))
    pd.testing.assert_frame_equal(adata.obs, before.obs)


# Back to AnnData


def test_decode_gives_named_cells(tmp_path):
    adata = counts_screen()
    processor = StateProcessor.fit(adata, batch_key="batch", set_size=4)
    sentences = processor(adata, ["A", "A+B"])
    predictions = torch.rand(*sentences["control_cells"].shape[:2], 12)
    decoded = processor.decode(PerturbationOutput(predictions=predictions), sentences, checkpoint="lab/model")

    mask = sentences["cell_mask"]
    assert decoded.shape == (40, 12)
    np.testing.assert_array_equal(decoded.X, predictions[mask].numpy())
    np.testing.assert_array_equal(decoded.layers["control"], sentences["control_cells"][mask].numpy())
    assert decoded.var_names.tolist() == processor.vocabulary.genes
    assert decoded.obs_names.is_unique
    assert decoded.obs_names[0] == decoded.obs["control_barcode"].iloc[0] + "|A"
    assert decoded.obs.columns.tolist() == ["perturbation", "cell_type", "batch", "control_barcode"]
    assert decoded.obs["perturbation"].value_counts().to_dict() == {"A": 20, "A+B": 20}
    note = decoded.uns["pertstate"]
    assert note["X"] == "log1p expression (10000 counts per cell)"
    assert note["checkpoint"] == "lab/model"
    assert note["controls"] == "T cell: 10 control cells; B cell: 10 control cells"
    assert json.loads(note["processor"])["normalize"] == "counts_to_log1p"

    decoded.write_h5ad(tmp_path / "decoded.h5ad")
    again = ad.read_h5ad(tmp_path / "decoded.h5ad")
    np.testing.assert_array_equal(again.X, decoded.X)
    np.testing.assert_array_equal(again.layers["control"], decoded.layers["control"])
    assert again.uns["pertstate"] == note
    assert again.obs_names.tolist() == decoded.obs_names.tolist()
    assert again.obs["perturbation"].tolist() == decoded.obs["perturbation"].tolist()
    assert again.var_names.tolist() == decoded.var_names.tolist()


def test_decode_says_what_x_holds():
    for adata, options, expected in (
        (log1p_screen(), {}, "log1p expression"),
        (counts_screen(), {"normalize": "none"}, "counts"),
        (embedded(), {"input": "obsm/X_emb"}, "embedding"),
    ):
        processor = StateProcessor.fit(adata, **options)
        sentences = processor(adata, "A")
        decoded = processor.decode(PerturbationOutput(predictions=sentences["control_cells"]), sentences)
        assert decoded.uns["pertstate"]["X"] == expected
        assert decoded.uns["pertstate"]["checkpoint"] == "not recorded"


def test_decode_of_an_embedding():
    adata = embedded()
    processor = StateProcessor.fit(adata, input="obsm/X_emb", set_size=4)
    sentences = processor(adata, "A")
    mask = sentences["cell_mask"]
    decoded = processor.decode(PerturbationOutput(predictions=sentences["control_cells"] + 1), sentences)
    assert decoded.var_names.tolist() == [f"dim_{i}" for i in range(5)]
    np.testing.assert_array_equal(decoded.X, sentences["control_cells"][mask].numpy() + 1)
    np.testing.assert_array_equal(decoded.obsm["control"], sentences["control_cells"][mask].numpy())


def test_decode_with_a_gene_decoder():
    adata = embedded()
    processor = StateProcessor.fit(adata, input="obsm/X_emb", gene_input="layers/counts", set_size=4)
    sentences = processor(adata, "A")
    mask = sentences["cell_mask"]
    genes = torch.rand(*mask.shape, 12)
    outputs = PerturbationOutput(predictions=sentences["control_cells"] + 1, gene_predictions=genes)
    decoded = processor.decode(outputs, sentences)
    assert decoded.var_names.tolist() == processor.vocabulary.genes
    np.testing.assert_array_equal(decoded.X, genes[mask].numpy())
    np.testing.assert_array_equal(decoded.obsm["embedding"], sentences["control_cells"][mask].numpy() + 1)
    assert decoded.uns["pertstate"]["X"] == "log1p expression (10000 counts per cell)"


def test_decode_takes_half_precision_and_gradients():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    sentences = processor(adata, "A")
    predictions = sentences["control_cells"].bfloat16().requires_grad_()
    decoded = processor.decode(PerturbationOutput(predictions=predictions), sentences)
    assert decoded.X.dtype == np.float32


def test_decode_refuses_other_outputs():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    sentences = processor(adata, "A")
    with pytest.raises(
        ValueError, match=r"outputs of shape \(1, 10, 12\) do not belong to sentences of shape \(2, 10\)"
    ):
        processor.decode(PerturbationOutput(predictions=sentences["control_cells"][:1]), sentences)


# Saving and loading


def saved(tmp_path, **options):
    processor = StateProcessor.fit(counts_screen(), batch_key="batch", set_size=7, **options)
    processor.save_pretrained(tmp_path)
    return processor


def test_saved_and_loaded_processors_are_the_same(tmp_path):
    processor = saved(tmp_path, genes=["gene5", "gene1"])
    loaded = StateProcessor.from_pretrained(tmp_path)
    assert loaded.vocabulary == processor.vocabulary
    adata = counts_screen(seed=5)
    assert_same_sentences(loaded(adata, ["A", "A+B"], seed=2), processor(adata, ["A", "A+B"], seed=2))

    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for name in ("vocabulary.json", "processor_config.json"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_saved_processor_is_readable_files(tmp_path):
    processor = saved(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "vocabulary.json", "processing.py"} <= names
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py"}
    vocabulary = json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8"))
    assert vocabulary["genes"] == processor.vocabulary.genes
    settings = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert settings["set_size"] == 7 and settings["normalize"] == "counts_to_log1p"
    assert "vocabulary" not in settings


def test_auto_processor_loads_it(tmp_path):
    processor = saved(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is StateProcessor
    assert loaded.vocabulary == processor.vocabulary


def test_unicode_names_are_saved(tmp_path):
    adata = counts_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].replace({"A": "IFN-β", "A+B": "IFN-β+B"})
    StateProcessor.fit(adata).save_pretrained(tmp_path)
    assert "IFN-β" in (tmp_path / "vocabulary.json").read_text(encoding="utf-8")
    assert StateProcessor.from_pretrained(tmp_path).vocabulary.perturbations == ["B", "IFN-β"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_vocabulary_is_refused(tmp_path, share):
    saved(tmp_path)
    path = tmp_path / "vocabulary.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="vocabulary.json is not a whole JSON file .*copy the checkpoint again"):
        StateProcessor.from_pretrained(tmp_path)


def test_a_vocabulary_with_duplicates_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "vocabulary.json"
    content = json.loads(path.read_text())
    content["genes"][3] = "gene0"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape("vocabulary 'genes' has duplicates: ['gene0']")):
        StateProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "vocabulary.json: expected a JSON object, found list"),
        ({"genes": []}, r"expected the lists .*'batches', 'contexts', 'genes', 'perturbations'\], found \['genes'\]"),
        ({"genes": [], "other": []}, r"expected the lists .*, found \['genes', 'other'\]"),
    ],
)
def test_another_files_content_is_refused(tmp_path, content, message):
    saved(tmp_path)
    (tmp_path / "vocabulary.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        StateProcessor.from_pretrained(tmp_path)


def test_a_vocabulary_holds_lists_of_names():
    with pytest.raises(ValueError, match="vocabulary 'genes': expected a list of names, found str"):
        Vocabulary(genes="ABC")
    with pytest.raises(ValueError, match="vocabulary 'perturbations': expected a list of names"):
        Vocabulary(perturbations=["A", 1])


# What is refused


def test_missing_genes():
    adata = log1p_screen(num_genes=40)
    processor = StateProcessor.fit(adata)
    without = adata[:, 15:].copy()
    names = re.escape(str([f"gene{i}" for i in range(10)]))
    with pytest.raises(KeyError, match=f"15 of the model's 40 genes are missing from the data: {names}.*'zero'"):
        processor(without, "A")
    found = processor(without, "A", missing_genes="zero")["control_cells"]
    expected = processor(adata, "A")["control_cells"]
    assert (found[..., :15] == 0).all()
    assert torch.equal(found[..., 15:], expected[..., 15:])

    without.var_names = [f"ENSG{i}" for i in range(25)]
    with pytest.raises(KeyError, match="40 of the model's 40 genes.*the data's genes look like .*ENSG0"):
        processor(without, "A", missing_genes="zero")
    with pytest.raises(ValueError, match="missing_genes='skip'; expected 'error' or 'zero'"):
        processor(adata, "A", missing_genes="skip")


def test_counts_where_log1p_is_expected():
    processor = StateProcessor.fit(log1p_screen())
    with pytest.raises(
        ValueError,
        match=r"X: expected log1p expression, found whole numbers \(counts\); run "
        r"sc.pp.normalize_total\(adata, target_sum=10000\); sc.pp.log1p\(adata\)",
    ):
        processor(counts_screen(), "A")


@pytest.mark.parametrize("total", [1e4, 1e6, 4321])
def test_the_advice_for_counts_gives_the_values_of_training(total):
    """The total of the training cells is named, and not the default."""
    counts = counts_screen()
    trained = counts.copy()
    sc.pp.normalize_total(trained, target_sum=total)
    sc.pp.log1p(trained)
    processor = StateProcessor.fit(trained)
    with pytest.raises(ValueError, match=rf"run sc.pp.normalize_total\(adata, target_sum={total:.10g}\); sc.pp.log1p"):
        processor(counts, "A")
    part = processor.with_vocabulary(processor.vocabulary, scale=None)
    with pytest.raises(ValueError, match=r"normalize_total\(adata\); sc.pp.log1p\(adata\) \(cells should sum to what"):
        part(counts, "A")


def test_log1p_where_counts_are_expected():
    processor = StateProcessor.fit(counts_screen())
    with pytest.raises(
        ValueError, match=r"X: expected counts, found fractional values \(log1p already\?\).*raw counts"
    ):
        processor(log1p_screen(), "A")
    with pytest.raises(ValueError, match="X: expected counts, found fractional values"):
        StateProcessor.fit(log1p_screen(), normalize="counts_to_log1p")


def test_normalised_but_not_log1p():
    adata = counts_screen()
    sc.pp.normalize_total(adata, target_sum=1e4)
    with pytest.raises(
        ValueError, match="X seems to hold normalised values without log1p: set normalize='counts_to_log1p'"
    ):
        StateProcessor.fit(adata)
    message = (
        r"X: expected log1p expression, found .*normalised, not yet log1p\?\); run sc.pp.log1p\(adata\) if all cells"
    )
    with pytest.raises(ValueError, match=message):
        StateProcessor.fit(log1p_screen())(adata, "A")
    # The advice of the first error gives the right values.
    processor = StateProcessor.fit(adata, normalize="counts_to_log1p")
    np.testing.assert_allclose(
        processor.features(adata), StateProcessor.fit(counts_screen()).features(counts_screen()), atol=1e-6
    )


def test_files_of_different_kinds():
    with pytest.raises(ValueError, match="X holds counts in one file and log1p in another; make them alike"):
        StateProcessor.fit([counts_screen(), log1p_screen()])


def test_unknown_names():
    adata = log1p_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].replace({"A": "STAT1", "B": "STAT2", "A+B": "STAT1+STAT2"})
    processor = StateProcessor.fit(adata)
    with pytest.raises(KeyError, match=r"perturbation 'STAT3' is unknown to this model \(2 are known\); did you mean"):
        processor(adata, "STAT1+STAT3")
    with pytest.raises(KeyError, match="did you mean 'STAT1' or 'STAT2'|did you mean 'STAT2' or 'STAT1'"):
        processor(adata, "STAT")
    with pytest.raises(KeyError, match="context 'T cells' is not in the data; did you mean 'T cell'"):
        processor(adata, "STAT1", context="T cells")
    with pytest.raises(KeyError, match=r"perturbation 'STAT1\+' is unknown .*; did you mean 'STAT1'"):
        processor(adata, "STAT1+")


def test_nothing_asked_for():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    with pytest.raises(ValueError, match="perturbation: expected at least one name"):
        processor(adata, [])
    with pytest.raises(ValueError, match="context: found an empty list"):
        processor(adata, "A", context=[])
    with pytest.raises(ValueError, match="empty list of AnnData"):
        StateProcessor.fit([])


def test_unknown_batch():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata, batch_key="batch")
    adata.obs["batch"] = "b7"
    sentences = processor(adata, "A")
    assert (sentences["batch_ids"][sentences["cell_mask"]] == -1).all()
    inputs = {
        "input_dim": processor.feature_dim,
        "num_perturbations": len(processor.vocabulary.perturbations),
        "num_batches": 2,
    }
    StateForPerturbation(StateConfig.from_preset("tiny", **inputs)).eval()(**sentences)
    model = StateForPerturbation(StateConfig.from_preset("tiny", **inputs, batch_encoder=True)).eval()
    with pytest.raises(ValueError, match="batch_ids holds -1, a batch that was not seen in training"):
        model(**sentences)


def test_no_control_cells():
    adata = log1p_screen()
    with pytest.raises(ValueError, match="no cell has .*== 'ctrl', found .*'control'.*with control="):
        StateProcessor.fit(adata, control="ctrl")
    processor = StateProcessor.fit(adata)
    without = adata[(adata.obs["perturbation"] != "control") | (adata.obs["cell_type"] == "T cell")].copy()
    with pytest.raises(ValueError, match="context 'B cell' has no control cells.*leave the context out"):
        processor(without, "A")
    assert len(processor(without, "A", context="T cell").obs) == 10


def test_zero_cells():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata)
    with pytest.raises(ValueError, match="the data hold no cells"):
        processor(adata[:0].copy(), "A")
    with pytest.raises(ValueError, match="no control cells"):
        StateProcessor.fit(adata[:0].copy())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5])
@pytest.mark.parametrize("gene", [0, 7])  # the first stored entry of its row, and another
def test_values_that_are_not_expression(form, bad, gene):
    adata = log1p_screen(form=form)
    processor = StateProcessor.fit(adata)
    matrix = dense(adata.X)
    matrix[23, gene] = bad  # cell23 is a control cell of the second context
    adata.X = FORMATS[form](sp.csr_matrix(matrix))
    message = (
        f"X holds {bad} in cell 'cell23', gene 'gene{gene}' \\(1 such values read\\); expected finite and non-negative"
    )
    with pytest.raises(ValueError, match=message):
        processor(adata, "A")
    with pytest.raises(ValueError, match=message):
        processor.features(adata, np.array([4, 20, 23]))
    with pytest.raises(ValueError, match="non-negative|fractional|finite"):
        StateProcessor.fit(adata, genes=3)
    assert torch.isfinite(processor(adata, "A", context="T cell")["control_cells"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite(bad):
    adata = embedded()
    processor = StateProcessor.fit(adata, input="obsm/X_emb")
    adata.obsm["X_emb"][2, 3] = bad
    with pytest.raises(ValueError, match=f"obsm/X_emb holds {bad} in cell 'cell2', dimension 3"):
        processor(adata, "A")


def test_missing_columns_layers_and_embeddings_list_what_there_is():
    adata = embedded()
    with pytest.raises(
        KeyError, match=r"no column 'celltype' \(context\), found .*'cell_type'.*did you mean 'cell_type'"
    ):
        StateProcessor.fit(adata, context_key="celltype")
    with pytest.raises(
        KeyError, match=r"no column 'target' \(perturbation\), found \['perturbation', 'cell_type', 'batch'\]"
    ):
        StateProcessor.fit(adata, perturbation_key="target")
    with pytest.raises(KeyError, match="layers has no entry 'count', found .*'counts'.*did you mean 'counts'"):
        StateProcessor.fit(adata, input="layers/count")
    with pytest.raises(KeyError, match="obsm has no entry 'X_pca', found .*'X_emb'"):
        StateProcessor.fit(adata, input="obsm/X_pca")
    with pytest.raises(ValueError, match="input='counts': expected 'X', 'raw/X', 'layers/NAME' or 'obsm/NAME'"):
        StateProcessor.fit(adata, input="counts")
    adata.X = None
    with pytest.raises(KeyError, match="the data have no X, found layers .*'counts'"):
        StateProcessor.fit(adata)


@pytest.mark.parametrize("column", ["perturbation", "cell_type", "batch"])
def test_cells_without_a_label(column):
    adata = log1p_screen()
    adata.obs.loc["cell5", column] = np.nan
    with pytest.raises(ValueError, match=rf"obs\['{column}'\] is empty in 1 cell, first in 'cell5'"):
        StateProcessor.fit(adata, batch_key="batch")
    adata.obs.loc[["cell5", "cell6"], column] = ["", "  "]
    with pytest.raises(ValueError, match=rf"obs\['{column}'\] is blank in 2 cells, first in 'cell5'"):
        StateProcessor.fit(adata, batch_key="batch")


def test_gene_names_that_stand_twice():
    adata = log1p_screen()
    processor = StateProcessor.fit(adata, genes=["gene1", "gene2"])
    adata.var_names = ["gene1", "gene1", *adata.var_names[2:]]
    with pytest.raises(ValueError, match=r"gene names are not unique, found \['gene1'\] twice.*var_names_make_unique"):
        StateProcessor.fit(adata)
    with pytest.raises(ValueError, match=r"genes of the model stand twice in the data: \['gene1'\]"):
        processor(adata, "A")
    # Genes that the model does not read may be doubled.
    adata = log1p_screen()
    adata.var_names = [*adata.var_names[:10], "x", "x"]
    np.testing.assert_array_equal(processor.features(adata), dense(adata.X)[:, [1, 2]])


def test_gene_choices_that_cannot_be():
    adata = log1p_screen()
    for genes in (0, 13):
        with pytest.raises(ValueError, match=f"genes={genes}: expected between 1 and the 12 genes"):
            StateProcessor.fit(adata, genes=genes)
    with pytest.raises(KeyError, match=r"1 of 2 listed genes are not in the data: \['TP53'\]"):
        StateProcessor.fit(adata, genes=["gene1", "TP53"])
    with pytest.raises(ValueError, match=r"vocabulary 'genes' has duplicates: \['gene1'\]"):
        StateProcessor.fit(adata, genes=["gene1", "gene1"])
    with pytest.raises(ValueError, match="genes='gene1': expected a number of highly variable genes, or a list"):
        StateProcessor.fit(adata, genes="gene1")
    other = log1p_screen()
    other.var_names = [f"ENSG{i}" for i in range(12)]
    with pytest.raises(ValueError, match="no gene name in common"):
        StateProcessor.fit([adata, other])


def test_options_that_contradict_one_another():
    adata = embedded()
    with pytest.raises(ValueError, match="normalize='log1p'; expected one of 'auto', 'counts_to_log1p', 'none'"):
        StateProcessor.fit(adata, normalize="log1p")
    with pytest.raises(ValueError, match="gene_input='X' feeds the gene decoder .* leave gene_input out"):
        StateProcessor.fit(adata, gene_input="X")
    with pytest.raises(
        ValueError, match="normalize='counts_to_log1p' is for counts; input='obsm/X_emb' is an embedding"
    ):
        StateProcessor.fit(adata, input="obsm/X_emb", normalize="counts_to_log1p")
    with pytest.raises(ValueError, match="the gene decoder predicts log1p expression, layers/counts holds counts"):
        StateProcessor.fit(adata, input="obsm/X_emb", gene_input="layers/counts", normalize="none")


def test_an_embedding_of_another_width():
    adata = embedded()
    processor = StateProcessor.fit(adata, input="obsm/X_emb")
    narrow = embedded()
    narrow.obsm["X_emb"] = narrow.obsm["X_emb"][:, :4]
    with pytest.raises(ValueError, match="obsm/X_emb: expected 5 dimensions, found 4"):
        processor(narrow, "A")
    with pytest.raises(ValueError, match=r"expected one width in all files, found \[4, 5\]"):
        StateProcessor.fit([adata, narrow], input="obsm/X_emb")


def test_choosing_genes_leaves_torch_its_threads():
    # numba, which scanpy uses, shares torch's pool of threads and asks for one thread a core.
    adata = log1p_screen(num_genes=60)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        StateProcessor.fit(adata, genes=5)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
