"""`transformers.pipeline("perturbation-prediction", ..)`, with the package and without it."""

import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from predictions import GENES, SET_SIZE, model_of, run, screen

from pertstate import StateProcessor
from pertstate.base import pipeline_perturbation
from pertstate.base.constants import TASK
from pertstate.evaluation import controls_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`screen.h5ad`, `screen.zarr`, and a checkpoint in `model`; another one that knows doses in `dosed`."""
    folder = tmp_path_factory.mktemp("pipeline")
    adata = screen()
    adata.obs["dose"] = np.where(adata.obs["perturbation"] == "control", 0.0, np.arange(adata.n_obs) % 2 + 1.0)
    adata.write_h5ad(folder / "screen.h5ad")
    adata.write_zarr(folder / "screen.zarr")
    for name, options in (("model", {"batch_key": "batch"}), ("dosed", {"dose_key": "dose"})):
        processor = StateProcessor.fit(adata, set_size=SET_SIZE, **options)
        model_of(processor).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return transformers.pipeline(TASK, model=str(folder / "model"))


def loaded(folder):
    return transformers.AutoModel.from_pretrained(folder), transformers.AutoProcessor.from_pretrained(folder)


def test_with_the_package_no_flag_is_needed_and_no_code_of_the_folder_runs(folder, pipe):
    assert type(pipe) is pipeline_perturbation.PerturbationPredictionPipeline
    assert type(pipe.processor) is StateProcessor and not pipe.model.training


@pytest.mark.parametrize("form", ["path", "zarr", "memory"])
def test_it_predicts_what_the_command_does(folder, pipe, tmp_path, form):
    cells = {
        "path": folder / "screen.h5ad",
        "zarr": str(folder / "screen.zarr"),
        "memory": ad.read_h5ad(folder / "screen.h5ad"),
    }
    names = ["pert_0", "pert_2+pert_1"]
    found = pipe(cells[form], perturbation=names, batch_size=2)
    run(folder, loaded(folder / "model"), tmp_path / "out.h5ad", names)
    expected = ad.read_h5ad(tmp_path / "out.h5ad")
    assert sorted(found.obs_names) == sorted(expected.obs_names)
    expected = expected[found.obs_names]
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.layers["control"], controls_of(expected), rtol=1e-6)
    for column in found.obs:
        assert found.obs[column].astype(str).tolist() == expected.obs[column].astype(str).tolist()
    assert found.var_names.tolist() == expected.var_names.tolist()


def test_a_part_of_the_cells_contexts_and_columns(folder, pipe, tmp_path):
    found = pipe(
        folder / "screen.h5ad", "pert_0", context="type_1", cells_per_perturbation=5, seed=3, obs_columns=["depth"]
    )
    run(
        folder,
        loaded(folder / "model"),
        tmp_path / "out.h5ad",
        ["pert_0"],
        contexts=["type_1"],
        cells_per_perturbation=5,
        seed=3,
    )
    expected = ad.read_h5ad(tmp_path / "out.h5ad")
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-5)
    source = screen()[found.obs["control_barcode"]]
    np.testing.assert_array_equal(found.obs["depth"], source.obs["depth"])
    assert pipe(folder / "screen.h5ad", "pert_0", cells_per_perturbation=5).n_obs == 10


def test_all_perturbations_in_many_parts(folder, pipe, monkeypatch):
    whole = pipe(folder / "screen.h5ad", "all")
    assert whole.obs["perturbation"].unique().tolist() == ["pert_0", "pert_1", "pert_2"] and whole.n_obs == 120
    monkeypatch.setattr(pipeline_perturbation, "_TOGETHER", 1)
    parts = pipe(folder / "screen.h5ad", "all")
    assert parts.obs_names.tolist() == whole.obs_names.tolist() and parts.uns["pertstate"] == whole.uns["pertstate"]
    np.testing.assert_allclose(parts.X, whole.X, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(parts.layers["control"], whole.layers["control"])
    pd.testing.assert_frame_equal(parts.var, whole.var)


def test_several_experiments(folder, pipe):
    path = str(folder / "screen.h5ad")
    asked = [{"perturbation": "pert_0", "context": "type_0"}, {"perturbation": ["pert_1", "pert_2"], "adata": path}]
    one, other = pipe(asked, adata=folder / "screen.h5ad")
    assert one.n_obs == 20 and set(one.obs["cell_type"]) == {"type_0"}
    assert other.n_obs == 80 and set(other.obs["perturbation"]) == {"pert_1", "pert_2"}
    table = pd.DataFrame({"perturbation": ["pert_0", "pert_1+pert_0"], "context": ["type_0", None]})
    first, second = pipe(table, adata=path)
    np.testing.assert_array_equal(first.X, one.X)
    assert set(second.obs["cell_type"]) == {"type_0", "type_1"} and set(second.obs["perturbation"]) == {"pert_0+pert_1"}
    assert [len(found) for found in pipe([path, path], "pert_0")] == [40, 40]
    single = pipe({"adata": path, "perturbation": "pert_0", "context": "type_0"})
    np.testing.assert_array_equal(single.X, one.X)
    # What is said for all when the pipeline is made.
    made = transformers.pipeline(TASK, model=pipe.model, processor=pipe.processor, adata=path, context="type_0")
    np.testing.assert_array_equal(made({"perturbation": "pert_0"}).X, one.X)


def test_doses(folder, pipe):
    dosed, path = transformers.pipeline(TASK, model=str(folder / "dosed")), folder / "screen.h5ad"
    found = dosed(path, ["pert_0", "pert_1"], dose=[0.5, 2])
    assert sorted({(p, d) for p, d in zip(found.obs["perturbation"], found.obs["dose"])}) == [
        ("pert_0", 0.5),
        ("pert_0", 2.0),
        ("pert_1", 0.5),
        ("pert_1", 2.0),
    ]
    one = dosed({"adata": path, "perturbation": "pert_0", "dose": np.float32(2)})
    np.testing.assert_allclose(one.X, found[one.obs_names].X, rtol=1e-4, atol=1e-5)
    # Everything that the model knows: each perturbation at each of its doses.
    everything = dosed(path, "all").obs[["perturbation", "dose"]].drop_duplicates()
    assert len(everything) == 6 and set(everything["dose"]) == {1.0, 2.0}
    with pytest.raises(ValueError, match="this model was trained without doses"):
        pipe(path, "pert_0", dose=1.0)


def test_what_it_refuses(folder, pipe):
    path = folder / "screen.h5ad"
    with pytest.raises(ValueError, match="experiment 1 has no 'perturbation'"):
        pipe(path)
    with pytest.raises(ValueError, match="experiment 2 has no 'adata'"):
        pipe([{"adata": path, "perturbation": "pert_0"}, {"perturbation": "pert_0"}])
    with pytest.raises(ValueError, match="an experiment has no 'drug'; "):
        pipe({"adata": path, "drug": "pert_0"})
    with pytest.raises(FileNotFoundError, match=r"gone.h5ad: no such file \(looked from "):
        pipe("gone.h5ad", perturbation="pert_0")
    with pytest.raises(TypeError, match="expected an AnnData, a path, .* found int"):
        pipe(3, "pert_0")
    with pytest.raises(TypeError, match="this pipeline takes no 'contxt'; did you mean 'context'"):
        pipe(path, "pert_0", contxt="type_0")
    with pytest.raises(KeyError, match="perturbation 'pert_7' is unknown to this model"):
        pipe(path, "pert_7")
    with pytest.raises(KeyError, match="context 'type_7' is not in the data"):
        pipe(path, "pert_0", context="type_7")
    with pytest.raises(ValueError, match="cells_per_perturbation must be at least 1, found 0"):
        pipe(path, "pert_0", cells_per_perturbation=0)
    with pytest.raises(ValueError, match="expected at least one name, found an empty list"):
        pipe(path, [])
    with pytest.raises(ValueError, match="expected the processor of the model's checkpoint"):
        pipeline_perturbation.PerturbationPredictionPipeline(pipe.model)
    observed = model_of(pipe.processor)
    observed.is_ceiling = True
    with pytest.raises(ValueError, match="decodes observed cells"):
        transformers.pipeline(TASK, model=observed, processor=pipe.processor)


ALONE = """
import sys
import anndata as ad
import numpy as np
import transformers

folder, cells, again = sys.argv[1:4]
try:
    transformers.pipeline("perturbation-prediction", model=folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
pipe = transformers.pipeline("perturbation-prediction", model=folder, trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules."), type(pipe)
found = pipe(cells, perturbation=["pert_0", "pert_1+pert_2"], context="type_0")
found.write_h5ad(sys.argv[4])
# The folder names one pipeline, so that nobody has to; what is saved is whole again.
pipe.save_pretrained(again)
other = transformers.pipeline(model=again, trust_remote_code=True)
np.testing.assert_array_equal(other(cells, ["pert_0", "pert_1+pert_2"], context="type_0").X, found.X)
# So it is where a model was saved that was loaded without the pipeline.
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
assert transformers.pipeline(model=again, trust_remote_code=True)(cells, "pert_0").n_obs == 40
"""


@pytest.mark.slow
def test_it_works_where_the_package_is_absent(folder, pipe, alone, tmp_path):
    alone.run(ALONE, folder / "model", folder / "screen.h5ad", tmp_path / "again", tmp_path / "out.h5ad")
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    expected = pipe(folder / "screen.h5ad", ["pert_0", "pert_1+pert_2"], context="type_0")
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-5, atol=1e-6)
    assert found.obs_names.tolist() == expected.obs_names.tolist() and found.n_vars == GENES


def test_a_config_that_names_other_code_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    assert content["custom_pipelines"][TASK]["impl"] == "pipeline_perturbation.PerturbationPredictionPipeline"
    content["custom_pipelines"][TASK]["impl"] = "eve/code--evil.Pipeline"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="custom_pipelines is .*: config.json may name no code of others"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model")
    del content["custom_pipelines"]
    path.write_text(json.dumps(content))
    assert transformers.pipeline(TASK, model=str(tmp_path / "model")).model.config.set_size == SET_SIZE


def test_predictions_that_are_no_numbers_are_errors(folder, pipe):
    model, processor = loaded(folder / "model")
    torch.nn.init.constant_(model.output_head.layers[-1].bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the model predicts nan for 'gene_0'"):
        transformers.pipeline(TASK, model=model, processor=processor)(folder / "screen.h5ad", "pert_0")
