"""`pertstate predict` and `pertstate evaluate`, as they are called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest
import torch

from pertstate import StateForPerturbation, StateProcessor
from pertstate.cli import main
from pertstate.configuration_state import StateConfig
from pertstate.data import simulate_screen
from pertstate.data.cells import sort_into_groups
from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import GroupSums
from pertstate.evaluation import controls_of
from pertstate.evaluation.baselines import BASELINES, NO_CHANGE, PERTURBATION_MEAN, Baselines
from pertstate.evaluation.metrics import CEILING, METRICS, MODEL
from pertstate.evaluation.scoring import ControlCells, Predicted, score_group


GENES, SET_SIZE = 30, 8


def screen() -> ad.AnnData:
    """Two contexts of counts; type_1 lacks pert_2. An embedding and log1p expression beside them."""
    adata = simulate_screen(
        num_contexts=2, num_perturbations=3, num_genes=GENES, cells_per_group=10, combinations=[(0, 1)], seed=3
    )
    adata = adata[~((adata.obs["cell_type"] == "type_1") & (adata.obs["perturbation"] == "pert_2"))].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.layers["log1p"] = StateProcessor.fit(adata).features(adata)
    rng = np.random.default_rng(0)
    embedding = np.log1p(adata.X @ rng.normal(size=(GENES, 6)) ** 2).astype(np.float32)
    adata.obsm["X_emb"] = embedding - embedding.mean(axis=0)
    return adata


MODELS = {
    "counts": ({"input": "X", "batch_key": "batch"}, {"batch_encoder": True, "num_batches": 2}),
    "layer": ({"input": "layers/counts"}, {}),
    "log1p": ({"input": "layers/log1p"}, {}),
    "raw": ({"input": "X", "normalize": "none"}, {}),
    "embedding": ({"input": "obsm/X_emb"}, {"nonnegative_output": False}),
    "decoder": ({"input": "obsm/X_emb", "gene_input": "layers/counts"}, {"nonnegative_output": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`screen.h5ad`, and a checkpoint of each kind of model in `models/`."""
    folder = tmp_path_factory.mktemp("cli")
    adata = screen()
    adata.write_h5ad(folder / "screen.h5ad")
    torch.manual_seed(0)
    for name, (options, fields) in MODELS.items():
        processor = StateProcessor.fit(adata, set_size=SET_SIZE, **options)
        if processor.gene_input is not None:
            fields = {**fields, "gene_dim": len(processor.vocabulary.genes)}
        model = StateForPerturbation(
            StateConfig.from_preset(
                "tiny", input_dim=processor.feature_dim, num_perturbations=3, set_size=SET_SIZE, **fields
            )
        )
        # A new model predicts no change at all.
        torch.nn.init.normal_(model.output_head.layers[-1].weight, std=0.2)
        model.save_pretrained(folder / "models" / name)
        processor.save_pretrained(folder / "models" / name)
    return folder


def predict(folder, output, *flags, model="counts", adata="screen.h5ad", rc=0) -> ad.AnnData | None:
    words = ["predict", "--model", folder / "models" / model, "--adata", folder / adata, "--output", output, "--quiet"]
    words.append("--overwrite")
    assert main([str(word) for word in (*words, *flags)]) == rc
    return ad.read_h5ad(output) if rc == 0 else None


def by_hand(folder, perturbations, context, model="counts", seed=0, **options) -> ad.AnnData:
    """The prediction of the command, made by hand with processor, model and decode."""
    path = folder / "models" / model
    processor, network = StateProcessor.from_pretrained(path), StateForPerturbation.from_pretrained(path).eval()
    sentences = processor(ad.read_h5ad(folder / "screen.h5ad"), perturbations, context=context, seed=seed, **options)
    with torch.inference_mode():
        return processor.decode(network(**sentences), sentences, checkpoint=str(path))


def error(capsys) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1, "one sentence"
    return text


def table_of(path) -> pd.DataFrame:
    return pd.read_csv(path).set_index(["context", "perturbation", "method"])


# Predict


@pytest.mark.parametrize("model", MODELS)
def test_predictions_equal_processor_model_and_decode(folder, tmp_path, model):
    found = predict(folder, tmp_path / "out.h5ad", model=model)
    pieces = [
        by_hand(folder, name, context, model)
        for context in found.obs["cell_type"].unique()
        for name in found.obs["perturbation"][found.obs["cell_type"] == context].unique()
    ]
    expected = ad.concat(pieces)
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert found.var_names.tolist() == expected.var_names.tolist() == pieces[0].var_names.tolist()
    np.testing.assert_allclose(found.X, expected.X, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(controls_of(found), controls_of(expected), atol=2e-5, rtol=2e-5)
    assert set(found.obsm) == set(expected.obsm) - {"control"} and not found.layers
    for key in found.obsm:
        np.testing.assert_allclose(found.obsm[key], expected.obsm[key], atol=2e-5, rtol=2e-5, err_msg=key)
    assert set(found.obs) - set(expected.obs) == {"control_row"}
    for column in expected.obs:
        assert found.obs[column].astype(str).tolist() == expected.obs[column].astype(str).tolist()
    for key in ("X", "checkpoint", "processor"):
        assert found.uns["pertstate"][key] == pieces[0].uns["pertstate"][key]
    assert found.uns["pertstate"]["controls"] == "type_0: 20 of 20 control cells; type_1: 20 of 20 control cells"
    assert np.abs(found.X - (controls_of(found) if model != "decoder" else 0)).max() > 0.01


def test_the_output_is_laid_out_as_documented(folder, tmp_path):
    adata = screen()
    found = predict(folder, tmp_path / "out.h5ad")
    assert found.shape == (7 * 20, GENES)
    assert found.X.dtype == np.float32 and (found.X >= 0).all()
    assert found.obs_names.is_unique
    controls = adata[found.obs["control_barcode"].astype(str)]
    assert (controls.obs["perturbation"] == "control").all()
    assert (controls.obs["cell_type"].to_numpy() == found.obs["cell_type"].to_numpy()).all()
    assert (controls.obs["batch"].to_numpy() == found.obs["batch"].to_numpy()).all()
    # The input's own values stand beside the predictions, whatever order the cells came in.
    np.testing.assert_allclose(controls_of(found), controls.layers["log1p"], rtol=1e-5)
    each = found.obs.groupby(["cell_type", "perturbation"], observed=True)["control_barcode"].nunique()
    assert set(each) == {20}


def test_the_files_own_labels_by_default(folder, tmp_path):
    found = predict(folder, tmp_path / "out.h5ad")
    pairs = found.obs.groupby(["cell_type", "perturbation"], observed=True).size().index.tolist()
    singles = [("type_0", f"pert_{i}") for i in range(3)] + [("type_1", f"pert_{i}") for i in range(2)]
    assert sorted(pairs) == sorted([*singles, ("type_0", "pert_0+pert_1"), ("type_1", "pert_0+pert_1")])


def test_all_and_named_perturbations_and_contexts(folder, tmp_path, capsys):
    def pairs(*flags):
        obs = predict(folder, tmp_path / "out.h5ad", *flags).obs
        return {(c, p) for c, p in zip(obs["cell_type"], obs["perturbation"])}

    contexts, singles = ("type_0", "type_1"), ("pert_0", "pert_1", "pert_2")
    assert pairs("--all") == {(c, p) for c in contexts for p in singles}
    assert "120 cells, 3 perturbations in 2 contexts" in capsys.readouterr().out
    assert pairs("--perturbation", "pert_2", "pert_2+pert_0", "pert_2") == {
        (c, p) for c in contexts for p in ("pert_2", "pert_0+pert_2")
    }
    assert pairs("--context", "type_1", "--perturbation", "pert_2") == {("type_1", "pert_2")}


def test_words_that_do_not_fit_are_one_line(capsys):
    files = ["predict", "--model", "m", "--adata", "a", "--output", "o"]
    for words, message in (
        ([*files, "--all", "--perturbation", "p"], "argument --perturbation: not allowed with argument --all"),
        ([*files, "--contxt", "A"], "unrecognized arguments: --contxt A"),
        (["predict", "--model", "m", "--adata", "a"], "one of the arguments --output --summary is required"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 1
        found = capsys.readouterr().err
        assert found == f"pertstate predict: error: {message}; pertstate predict --help lists what it takes\n"


def test_combinations_of_one_and_two(folder, tmp_path):
    """Ids of all names of a run are as wide as the widest; the width changes nothing."""
    both = predict(folder, tmp_path / "both.h5ad", "--perturbation", "pert_0", "pert_0+pert_1")
    alone = predict(folder, tmp_path / "alone.h5ad", "--perturbation", "pert_0")
    np.testing.assert_allclose(both[both.obs["perturbation"] == "pert_0"].X, alone.X, atol=1e-6)


def test_cells_per_perturbation_and_seed(folder, tmp_path):
    def run(*flags):
        return predict(folder, tmp_path / "out.h5ad", "--perturbation", "pert_0", "--context", "type_0", *flags)

    few = run("--cells-per-perturbation", "5")
    assert few.n_obs == 5 and few.obs["control_barcode"].nunique() == 5
    assert few.uns["pertstate"]["controls"] == "type_0: 5 of 20 control cells"
    assert run("--cells-per-perturbation", "500").n_obs == 20
    again = run("--cells-per-perturbation", "5", "--seed", "0")
    assert again.obs_names.tolist() == few.obs_names.tolist()
    np.testing.assert_array_equal(again.X, few.X)
    assert set(run("--cells-per-perturbation", "5", "--seed", "1").obs_names) != set(few.obs_names)
    # Another seed, all cells: the same cells in other sentences.
    one, other = run("--seed", "0"), run("--seed", "1")
    assert set(one.obs_names) == set(other.obs_names) and one.obs_names.tolist() != other.obs_names.tolist()


def test_the_batch_size_changes_nothing(folder, tmp_path):
    one, two, many = (
        predict(folder, tmp_path / f"{size}.h5ad", "--batch-size", size, "--perturbation", "pert_0")
        for size in (1, 2, 50)
    )
    for other in (two, many):
        assert one.obs_names.tolist() == other.obs_names.tolist()
        np.testing.assert_allclose(one.X, other.X, atol=1e-5)
        np.testing.assert_array_equal(controls_of(one), controls_of(other))


@pytest.mark.parametrize("form", ["csc", "dense"])
def test_the_storage_of_the_input_changes_nothing(folder, tmp_path, form):
    adata = screen()
    adata.X = adata.X.tocsc() if form == "csc" else adata.X.toarray()
    adata.write_h5ad(tmp_path / "other.h5ad")
    expected = predict(folder, tmp_path / "one.h5ad", "--perturbation", "pert_0")
    found = predict(folder, tmp_path / "two.h5ad", "--perturbation", "pert_0", adata=tmp_path / "other.h5ad")
    np.testing.assert_allclose(found.X, expected.X, atol=1e-6)


def test_layouts_by_flags(folder, tmp_path, capsys):
    plain = predict(folder, tmp_path / "out.h5ad", "--perturbation", "pert_0")
    rows = predict(folder, tmp_path / "out.h5ad", "--perturbation", "pert_0", "--with-controls", "--sparse")
    assert (rows.obs["perturbation"] == "control").sum() == 40
    said = "out.h5ad: 40 predicted cells and 40 control cells, 1 perturbation in 2 contexts\n"
    assert capsys.readouterr().out.endswith(said)
    np.testing.assert_allclose(rows[40:].X.toarray(), plain.X, atol=1e-5)
    beside = predict(folder, tmp_path / "out.h5ad", "--perturbation", "pert_0", "--control-layer", "--dtype", "float16")
    assert beside.layers["control"].dtype == beside.X.dtype == np.float16 and "control_cells" not in beside.uns
    with pytest.raises(SystemExit):
        predict(folder, tmp_path / "out.h5ad", "--with-controls", "--control-layer")
    capsys.readouterr()
    predict(folder, tmp_path / "out.h5ad", "--sparse", "--dtype", "float16", rc=1)
    assert "choose sparse or float16, not both" in error(capsys)


def test_a_summary_of_all_perturbations(folder, tmp_path, capsys):
    words = ["predict", "--model", folder / "models" / "counts", "--adata", folder / "screen.h5ad", "--quiet", "--all"]
    assert main([str(word) for word in (*words, "--summary", tmp_path / "out.parquet")]) == 0
    assert f"{tmp_path / 'out.parquet'}: 120 cells, 3 perturbations in 2 contexts" in capsys.readouterr().out
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert len(found) == 2 * 3 * GENES and set(found["cells"]) == {20}
    assert main([str(word) for word in (*words, "--summary", tmp_path / "out.parquet")]) == 1
    assert "out.parquet exists" in error(capsys)
    assert main([str(word) for word in (*words, "--sparse", "--summary", tmp_path / "out.csv")]) == 1
    assert "layout: a summary holds no cells" in error(capsys) and os.listdir(tmp_path) == ["out.parquet"]


def test_a_pair_for_cell_eval_by_flags(folder, tmp_path, capsys):
    (tmp_path / "n.csv").write_text("target_gene,n_cells\npert_0,4\npert_1,3\n")
    flags = ("--cells-per-perturbation", tmp_path / "n.csv", "--cell-eval", tmp_path / "real.h5ad")
    found = predict(folder, tmp_path / "out.h5ad", *flags, "--cell-eval-control", "ctrl")
    assert found.obs["target_gene"].value_counts().to_dict() == {"ctrl": 40, "pert_0": 8, "pert_1": 6}
    assert set(ad.read_h5ad(tmp_path / "real.h5ad").obs["target_gene"]) == {"ctrl", "pert_0", "pert_1"}
    predict(folder, tmp_path / "out.h5ad", "--cell-eval-column", "target", rc=1)
    assert "--cell-eval-control have no effect without --cell-eval" in error(capsys)


def test_a_file_of_control_cells_and_a_new_context(folder, tmp_path, capsys):
    adata = screen()
    controls = adata[adata.obs["perturbation"] == "control"].copy()
    controls.obs["cell_type"] = controls.obs["cell_type"].cat.rename_categories({"type_1": "new"})
    controls.write_h5ad(tmp_path / "controls.h5ad")
    predict(folder, tmp_path / "out.h5ad", adata=tmp_path / "controls.h5ad", rc=1)
    assert "nothing to predict: no perturbation was named" in error(capsys) and not (tmp_path / "out.h5ad").exists()
    found = predict(folder, tmp_path / "out.h5ad", "--all", "--context", "new", adata=tmp_path / "controls.h5ad")
    assert set(found.obs["cell_type"]) == {"new"} and found.n_obs == 60


def test_missing_genes_and_another_layer(folder, tmp_path, capsys):
    adata = screen()
    narrow = adata[:, 4:].copy()
    narrow.X = None
    narrow.write_h5ad(tmp_path / "narrow.h5ad")
    flags = ("--input", "layers/counts", "--perturbation", "pert_0")
    predict(folder, tmp_path / "out.h5ad", *flags, adata=tmp_path / "narrow.h5ad", rc=1)
    assert "4 of the model's 30 genes are missing from the data" in error(capsys)
    found = predict(folder, tmp_path / "out.h5ad", *flags, "--missing-genes", "zero", adata=tmp_path / "narrow.h5ad")
    controls = controls_of(found)
    assert (controls[:, :4] == 0).all() and (controls[:, 4:] > 0).any()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--perturbation", "pert_9"], "perturbation 'pert_9' is unknown to this model (3 are known); did you mean"),
        (["--context", "type_7"], "context 'type_7' is not in the data; did you mean"),
        (["--output", "cells.txt"], "cells.txt: expected a name that ends in .h5ad or .h5 or .zarr"),
        (["--cells-per-perturbation", "0"], "cells_per_perturbation must be at least 1, found 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, found 0"),
        (["--seed", "-1"], "seed must be a number from 0 to 9223372036854775807, found -1"),
        (["--sample-counts", "99999999999999999999"], "sample_counts must be a number from 0 to"),
        (["--max-missing-genes", "nan"], "max_missing_genes must be a share from 0 to 1, found nan"),
        (["--input", "layers/raw"], "layers has no entry 'raw', found"),
        (["--input", "layers/log1p"], "layers/log1p: expected counts, found fractional values"),
        (["--device", "abacus"], "--device abacus: "),
        (["--model", "no/such/folder"], "--model no/such/folder: no such checkpoint folder"),
        (["--model", "nosuchfolder"], "--model nosuchfolder: no such checkpoint folder"),
    ],
)
def test_what_predict_refuses(folder, tmp_path, capsys, flags, message):
    predict(folder, tmp_path / "out.h5ad", *flags, rc=1)
    assert f"pertstate predict: error: {message}" in error(capsys)
    assert not list(tmp_path.iterdir())


def test_inputs_and_outputs_that_are_not_there(folder, tmp_path, capsys):
    predict(folder, tmp_path / "out.h5ad", adata="gone.h5ad", rc=1)
    assert "gone.h5ad: no such file" in error(capsys)
    predict(folder, tmp_path / "none" / "out.h5ad", rc=1)
    assert f"there is no folder {tmp_path / 'none'}" in error(capsys)
    predict(folder, tmp_path, rc=1)
    assert f"{tmp_path} is a folder; name a file to write" in error(capsys)
    predict(folder, folder / "screen.h5ad", rc=1)
    assert "is the input file; write the predictions elsewhere" in error(capsys)

    cut = tmp_path / "cut.h5ad"
    cut.write_bytes((folder / "screen.h5ad").read_bytes()[:-100])
    predict(folder, tmp_path / "out.h5ad", adata=cut, rc=1)
    assert "cut.h5ad" in (text := error(capsys)) and "cannot be read as .h5ad" in text
    assert [path.name for path in tmp_path.iterdir()] == ["cut.h5ad"]


def test_a_checkpoint_whose_weights_are_cut(folder, tmp_path, capsys):
    for path in (folder / "models" / "log1p").iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    predict(folder, tmp_path / "out.h5ad", model=tmp_path, rc=1)
    assert "its weights are not a whole safetensors file" in error(capsys)


def test_a_failure_half_way_leaves_the_old_file(folder, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    predict(folder, output, "--perturbation", "pert_0")
    before = output.read_bytes()
    adata = screen()
    # The last control cell of the last context: met only after most cells are written.
    last = np.flatnonzero((adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == "type_1"))[-1]
    counts = adata.X.toarray()
    counts[last, 3] = np.nan
    adata.X = counts
    adata.write_h5ad(tmp_path / "bad.h5ad")
    predict(folder, output, "--batch-size", "1", adata=tmp_path / "bad.h5ad", rc=1)
    assert f"X holds nan in cell '{adata.obs_names[last]}', gene 'gene_3'" in error(capsys)
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.h5ad", "out.h5ad"]


FULL_DISK = """
import resource, sys
from pertstate.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
codes = [main(sys.argv[2:])]
for limit in map(int, (20_000, 30_000, 40_000)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    codes.append(main(sys.argv[2:]))
print(codes)
"""


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    words = ["predict", "--model", folder / "models" / "counts", "--adata", folder / "screen.h5ad"]
    done = launches.run(["-c", FULL_DISK, "3000", *words, "--output", tmp_path / "out.h5ad", "--quiet"])
    assert done.returncode == 0 and done.stdout.strip() == "[1, 1, 1, 1]", done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 4
    assert all("pertstate predict: error: " in line and "File too large" in line for line in lines)
    assert not list(tmp_path.iterdir())


MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
import anndata as ad
from pertstate import StateConfig, StateForPerturbation, StateProcessor
from pertstate.evaluation import predict

folder, peak = sys.argv[1], []
processor = StateProcessor.fit(ad.read_h5ad(f"{folder}/small.h5ad"), set_size=64)
model = StateForPerturbation(StateConfig.from_preset("tiny", input_dim=2000, num_perturbations=1))
for name in ("small", "large"):
    predict(model, processor, f"{folder}/{name}.h5ad", f"{folder}/out.h5ad", ["A"], quiet=True, overwrite=True)
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(*peak)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    for name, cells in (("small", 1024), ("large", 8192)):
        obs = pd.DataFrame({"perturbation": "control", "cell_type": "T"}, index=[f"cell{i}" for i in range(cells)])
        obs.iloc[:2, 0] = "A"
        counts = (np.random.default_rng(0).random((cells, 2000), dtype=np.float32) < 0.5).astype(np.float32)
        ad.AnnData(counts, obs=obs).write_h5ad(tmp_path / f"{name}.h5ad")
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=launches.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert os.path.getsize(tmp_path / "out.h5ad") > 120 * 2**20  # predictions and control cells, 62 MiB each
    assert large - small < 20, f"peak of {small:.0f} MiB became {large:.0f} MiB"


@pytest.mark.slow
def test_the_command_itself(folder, tmp_path):
    command = [Path(sys.executable).with_name("pertstate"), "predict", "--model", folder / "models" / "counts"]
    command += ["--adata", folder / "screen.h5ad", "--output", tmp_path / "out.h5ad", "--perturbation", "pert_1"]
    done = subprocess.run([str(word) for word in command], env=launches.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out.h5ad'}: 40 cells, 1 perturbation in 2 contexts\n"
    assert "predict:" in done.stderr and "cells/s" in done.stderr  # a progress bar with a rate
    expected = predict(folder, tmp_path / "here.h5ad", "--perturbation", "pert_1")
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "out.h5ad").X, expected.X, atol=1e-6)


@pytest.mark.parametrize("words", [["--help"], ["predict", "--help"], ["evaluate", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom pertstate.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'anndata', 'scanpy', 'numpy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: pertstate" in done.stdout


def test_the_list_of_commands_imports_none_of_them():
    """Nor what takes as long to load as all of them."""
    code = (
        "import sys\nfrom pertstate.cli import COMMANDS, main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "of_commands = {f'pertstate.cli.{name}' for name in COMMANDS}\n"
        "print(sorted((of_commands | {'dataclasses', 'inspect', 'difflib'}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "[]\n"
    assert all(f"    {name} " in done.stdout for name in ("train", "predict", "evaluate", "merge"))


# Evaluate


def evaluate(folder, predicted, *flags, train="screen.h5ad", rc=0):
    words = ["evaluate", "--predicted", predicted, "--real", folder / "screen.h5ad", "--train", folder / train]
    assert main([str(word) for word in (*words, "--quiet", *flags)]) == rc


def cells_of(adata, context, perturbation):
    chosen = (adata.obs["cell_type"] == context) & (adata.obs["perturbation"] == perturbation)
    return chosen.to_numpy()


@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_that_of_score_group(folder, tmp_path, model):
    predicted = predict(folder, tmp_path / "predicted.h5ad", "--context", "type_0", model=model)
    evaluate(folder, tmp_path / "predicted.h5ad", "--output", tmp_path / "scores.csv")
    found = table_of(tmp_path / "scores.csv")

    real = ad.read_h5ad(folder / "screen.h5ad")
    units = {"embedding": real.obsm["X_emb"], "raw": real.X.toarray()}.get(model, real.layers["log1p"])
    names = ["pert_0", "pert_0+pert_1", "pert_1", "pert_2"]
    here = real.obs["cell_type"] == "type_0"
    trained = ~(here & real.obs["perturbation"].isin(names)).to_numpy()  # what is scored teaches no baseline
    obs = real.obs.rename(columns={"cell_type": "context"})[trained]
    order, groups = sort_into_groups(obs[["context", "perturbation"]].astype(str).assign(dataset=""))
    log1p = model not in ("embedding", "raw")
    means = GroupMeans.of_sums(GroupSums.of_cells(units[trained][order], groups, "control", log1p=log1p))
    baselines = Baselines(means, lambda name: name.split("+"), clip=model != "embedding")
    controls = ControlCells(units[cells_of(real, "type_0", "control")], ("", "type_0"))
    expected = {
        name: score_group(
            ("", "type_0", name),
            Predicted(predicted[cells_of(predicted, "type_0", name)].X),
            units[cells_of(real, "type_0", name)],
            controls,
            baselines,
        )
        for name in names
    }
    methods = {MODEL, *BASELINES, CEILING}
    of_groups = found[found.index.get_level_values(0) != "mean"]
    assert set(of_groups.index) == {("type_0", name, method) for name in names for method in methods}
    for name in names:
        for method in methods - {CEILING}:  # whose halves are drawn in the order of the cells
            row = found.loc["type_0", name, method]
            figures = expected[name].figures.get(method)
            assert (figures is None) == (isinstance(row["reason"], str) and row["reason"] != ""), (name, method)
            for m, metric in enumerate(METRICS):
                wanted = np.nan if figures is None else figures[0, m]
                assert row[metric] == pytest.approx(wanted, abs=1e-5, rel=1e-4, nan_ok=True), (name, method)
            assert (row["real_cells"], row["control_cells"]) == (10, 20)
    for m, metric in enumerate(METRICS):
        mean = found.loc["mean", "mean", MODEL][metric]
        wanted = np.mean([expected[name].figures[MODEL][0, m] for name in names])
        assert mean == pytest.approx(wanted, abs=1e-5, rel=1e-4)
    assert np.isnan(found.loc["type_0", "pert_0", NO_CHANGE]["pearson"])


def test_real_cells_given_as_predictions_are_perfect(folder, tmp_path):
    real = ad.read_h5ad(folder / "screen.h5ad")
    part = real[real.obs["perturbation"] == "pert_1"].copy()
    part.X = part.layers["log1p"]
    ad.AnnData(part.X, obs=part.obs, var=part.var).write_h5ad(tmp_path / "perfect.h5ad")
    # A file of someone else's model: it does not say how it was made.
    evaluate(folder, tmp_path / "perfect.h5ad", "--input", "layers/log1p", "--output", tmp_path / "scores.json")
    rows = json.loads((tmp_path / "scores.json").read_text())
    model = [row for row in rows if row["method"] == MODEL]
    assert [row["context"] for row in model] == ["type_0", "type_1", "mean"]
    for row in model:
        assert row["pearson"] == pytest.approx(1.0) and row["mae"] == pytest.approx(0, abs=1e-6)
        assert row["energy"] == pytest.approx(0, abs=1e-6)
    mean = next(row for row in rows if row["context"] == "mean" and row["method"] == NO_CHANGE)
    assert mean["pearson"] is None and mean["energy"] > 0.01


def test_what_is_printed(folder, tmp_path, capsys):
    predict(folder, tmp_path / "predicted.h5ad", "--perturbation", "pert_0", "pert_2")
    capsys.readouterr()
    evaluate(folder, tmp_path / "predicted.h5ad")
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["context", "perturbation", "method", *METRICS]
    groups = [["type_0", "pert_0"], ["type_0", "pert_2"], ["type_1", "pert_0"]]
    rows = 2 + len(BASELINES)  # with those of the model and the ceiling
    assert [line.split()[:2] for line in lines[1 : 1 + 3 * rows]] == [group for group in groups for _ in range(rows)]
    assert lines[-1].startswith("Verdict on the model, from 3 groups. In correlation of the mean change: ")
    assert "1 predicted groups have no real cells and are not scored: ['type_1 / pert_2']" in printed.err
    assert (
        "30 cells of" in printed.err
        and "are among the real cells that are scored, and are left out of it" in printed.err
    )
    # All cells of pert_0 and pert_2 are scored, so that the baselines know neither.
    means = [line.split() for line in lines if "perturbation mean " in line]
    assert [line[-3:] for line in means] == [["-", "-", "-"]] * 3


def test_training_cells_are_told_apart_by_more_than_their_number(folder, tmp_path, capsys):
    """Two files that number their cells from 0 have the same barcodes, but not the same cells."""
    predict(folder, tmp_path / "predicted.h5ad", "--context", "type_0", "--perturbation", "pert_0")
    train = ad.read_h5ad(folder / "screen.h5ad")
    scored = cells_of(train, "type_0", "pert_0")
    train = train[~scored].copy()
    real_names = ad.read_h5ad(folder / "screen.h5ad").obs_names
    train.write_h5ad(tmp_path / "train.h5ad")
    evaluate(folder, tmp_path / "predicted.h5ad", "--output", tmp_path / "one.csv", train=tmp_path / "train.h5ad")
    train.obs_names = real_names[np.argsort(~scored, kind="stable")][: train.n_obs]
    train.write_h5ad(tmp_path / "train.h5ad")
    capsys.readouterr()
    evaluate(folder, tmp_path / "predicted.h5ad", "--output", tmp_path / "two.csv", train=tmp_path / "train.h5ad")
    assert "left out" not in capsys.readouterr().err
    pd.testing.assert_frame_equal(table_of(tmp_path / "one.csv"), table_of(tmp_path / "two.csv"))
    assert table_of(tmp_path / "one.csv").loc["type_0", "pert_0", PERTURBATION_MEAN]["pearson"] > 0


def test_genes_in_another_order_are_matched_by_name(folder, tmp_path):
    predicted = predict(folder, tmp_path / "one.h5ad", "--perturbation", "pert_0")
    evaluate(folder, tmp_path / "one.h5ad", "--output", tmp_path / "one.csv")
    predicted[:, ::-1].copy().write_h5ad(tmp_path / "two.h5ad")
    evaluate(folder, tmp_path / "two.h5ad", "--output", tmp_path / "two.csv")
    pd.testing.assert_frame_equal(table_of(tmp_path / "one.csv"), table_of(tmp_path / "two.csv"), atol=1e-6)


def test_predictions_below_zero_are_scored(folder, tmp_path):
    predicted = predict(folder, tmp_path / "one.h5ad", "--perturbation", "pert_0")
    predicted.X = predicted.X - 0.5
    predicted.write_h5ad(tmp_path / "two.h5ad")
    evaluate(folder, tmp_path / "two.h5ad", "--output", tmp_path / "two.csv")
    evaluate(folder, tmp_path / "one.h5ad", "--output", tmp_path / "one.csv")
    one, two = (table_of(tmp_path / name).loc["mean", "mean", MODEL] for name in ("one.csv", "two.csv"))
    assert two["pearson"] == pytest.approx(one["pearson"], abs=1e-4) and two["mae"] != one["mae"]


def test_what_evaluate_refuses(folder, tmp_path, capsys):
    predicted = predict(folder, tmp_path / "predicted.h5ad", "--perturbation", "pert_0")
    capsys.readouterr()
    for output, message in (("scores.txt", "expected a name that ends in .csv or .json"), ("no/s.csv", "no folder")):
        evaluate(folder, tmp_path / "predicted.h5ad", "--output", tmp_path / output, rc=1)
        assert message in error(capsys)
    evaluate(folder, tmp_path / "gone.h5ad", rc=1)
    assert "gone.h5ad: no such file" in error(capsys)
    evaluate(folder, tmp_path / "predicted.h5ad", "--context-key", "celltype", rc=1)
    assert "screen.h5ad: obs has no column 'celltype' (context)" in error(capsys)

    other = predicted.copy()
    other.obs["perturbation"] = "other"
    other.write_h5ad(tmp_path / "other.h5ad")
    evaluate(folder, tmp_path / "other.h5ad", rc=1)
    assert "no (context, perturbation) of" in error(capsys)

    other = predicted.copy()
    other.X[5, 2] = np.nan
    other.write_h5ad(tmp_path / "nan.h5ad")
    evaluate(folder, tmp_path / "nan.h5ad", rc=1)
    assert f"X holds nan in cell '{other.obs_names[5]}', gene 'gene_2'" in error(capsys)


def test_output_that_nobody_reads_gives_no_error_message():
    words = [sys.executable, "-m", "pertstate.cli", "configs", "demo"]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command.stdout.close()
    assert (command.wait(), command.stderr.read()) == (1, "")
