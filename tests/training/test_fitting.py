"""One pass over the training cells is exact on real data, and the same from memory, stores, streams and processes."""

import json
import logging
from pathlib import Path

import anndata as ad
import launches
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import yaml
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from transformers import AutoModel, AutoProcessor

import pertstate.cli
from pertstate import train
from pertstate.base.modeling_perturbation import UnseenPerturbationError
from pertstate.data import (
    SentenceDataset,
    Splits,
    load_cells,
    prepare,
    simulate_screen,
)
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import GroupSums
from pertstate.data.stores import write_parquet
from pertstate.evaluation import Baselines, controls_of, predict
from pertstate.evaluation.baselines import ADDITIVE, LOG_FOLD_CHANGE, PERTURBATION_MEAN
from pertstate.families import FAMILIES
from pertstate.training import StateTrainer, StateTrainingArguments


ROOT = Path(__file__).parents[2]
FITTED = [name for name, family in FAMILIES.items() if family.model.fitted]


# Sums


def test_every_cell_is_summed_once_in_float64():
    features = np.random.default_rng(0).random((1000, 3)).astype(np.float32) * 1e4 + 0.1
    reads = np.zeros(1000, dtype=int)

    class Counting:
        def __getitem__(self, part):
            reads[part] += 1
            return features[part]

    names = [("a", "c0", "control"), ("a", "c0", "P"), ("a", "c0", "P"), ("a", "c1", "P"), ("b", "c0", "control")]
    names += [("b", "c0", "P"), ("b", "c2", "control"), ("b", "c0", "Q")]
    bounds = np.linspace(0, 1000, len(names) + 1).astype(int)
    groups = pd.DataFrame(names, columns=["dataset", "context", "perturbation"])
    groups = groups.assign(start=bounds[:-1], stop=bounds[1:])
    sums = GroupSums.of_cells(Counting(), groups, "control", block=16)
    # c1 has no controls, and c2 has only controls, so no change can be learned from either.
    lonely = np.zeros(1000, dtype=bool)
    for group in (3, 6):
        lonely[bounds[group] : bounds[group + 1]] = True
    assert (reads == ~lonely).all() and sums.num_cells == (~lonely).sum()
    mean = {key: features[lo:hi].mean(axis=0, dtype=np.float64) for key, lo, hi in zip(names, bounds, bounds[1:])}
    mean["a", "c0", "P"] = features[bounds[1] : bounds[3]].mean(axis=0, dtype=np.float64)
    of_a, of_b = (mean[d, "c0", "P"] - mean[d, "c0", "control"] for d in "ab")
    np.testing.assert_allclose(sums.changes()["P"], (of_a + of_b) / 2, rtol=1e-12)
    # A context is the same one in all data sets, and all its cells weigh alike.
    rows = [1, 2, 5, 7]
    perturbed = np.concatenate([features[bounds[i] : bounds[i + 1]] for i in rows])
    np.testing.assert_allclose(sums.context_means()["c0"][0], perturbed.mean(axis=0, dtype=np.float64), rtol=1e-12)
    parts = [GroupSums.of_cells(features, groups, "control", part, 3) for part in range(3)]
    assert min(len(part.counts) for part in parts) > 0
    merged = GroupSums.merged(parts)
    assert merged.counts == sums.counts and sums.lonely == []
    assert all(
        np.array_equal(merged.sums[key], GroupSums.of_cells(features, groups, "control").sums[key]) for key in sums.sums
    )


def test_sparse_cells_are_not_summed_in_float32():
    cells = sp.csr_matrix(np.tile(np.float32([[16777216, 0], [1, 0]]), (50, 1)))
    sums = GroupSums("control")
    sums.add(("a", "c", "P"), cells)
    assert sums.sums["a", "c", "P"].tolist() == [50 * 16777217, 0] and sums.counts["a", "c", "P"] == 100
    assert sums.lonely == [("a", "c")]


# Real data


def load_real(shared, name: str, **options):
    path = shared / "data" / f"{name}.h5ad"
    splits = DataArguments(datasets={"real": str(path)}, **options.pop("held")).resolve_splits()
    return *load_cells(splits, **options), ad.read_h5ad(path)


def fit(model_type: str, cells, processor, tmp_path, **fields) -> StateTrainer:
    family = FAMILIES[model_type].model
    config = family.config_class(**family.config_class.sizes(processor), **fields)
    args = StateTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
    dataset = SentenceDataset(cells, processor, "train", config.set_size)
    trainer = StateTrainer(family(config), args, dataset, processing_class=processor)
    done = trainer.train()
    assert done.global_step == 0 and np.isnan(done.training_loss)
    groups = cells.groups[cells.groups["split"].isin(["train", "control"])]
    trained = groups.loc[groups["split"] == "train", "context"].unique()
    seen = groups[groups["context"].isin(trained)]
    assert done.metrics["fit_cells"] == (seen["stop"] - seen["start"]).sum()
    return trainer


@pytest.mark.shared
def test_means_are_exact_on_real_cells(shared, tmp_path):
    """On IFN-beta in PBMC with NK cells held out, they equal numpy's means of the file, and the baseline of evaluations."""
    cells, processor, adata = load_real(shared, "kang2018_pbmc_ifnb", held={"test_contexts": ["NK"]}, genes=2000)
    values = adata[:, processor.vocabulary.genes].X.toarray().astype(np.float64)
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    contexts = processor.vocabulary.contexts
    assert "NK" not in contexts and len(contexts) == 6
    of_context = {name: (adata.obs["cell_type"] == name).to_numpy() for name in contexts}
    base = {name: values[here & is_control].mean(axis=0) for name, here in of_context.items()}
    stimulated = {name: values[here & ~is_control].mean(axis=0) for name, here in of_context.items()}
    change = np.mean([stimulated[name] - base[name] for name in contexts], axis=0)

    model = fit("state-perturbation-mean", cells, processor, tmp_path).model
    np.testing.assert_array_equal(model.changes.numpy(), np.stack([0 * change, change]).astype(np.float32))
    controls = processor.features(adata, np.flatnonzero(is_control & (adata.obs["cell_type"] == "NK").to_numpy()))
    groups = cells.groups[cells.groups["split"].isin(["train", "control"])]
    means = GroupMeans.of_sums(GroupSums.of_cells(cells.features, groups, "control"))
    [name] = processor.vocabulary.perturbations
    outputs = model(
        torch.from_numpy(controls)[None], **{k: torch.from_numpy(v) for k, v in processor.encode([name]).items()}
    )
    # A value is rounded to float32 once, and once more when the change is added.
    known = Baselines(means, lambda name: [name], clip=True).of(name, controls.mean(axis=0))
    expected = known[PERTURBATION_MEAN].apply(controls, True)
    np.testing.assert_allclose(outputs.predictions[0].numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(means.changes()[name], model.changes[1].numpy(), rtol=0, atol=1e-6)

    model = fit("state-context-mean", cells, processor, tmp_path).model
    for table, means in ((model.perturbed_means, stimulated), (model.control_means, base)):
        np.testing.assert_array_equal(table.numpy(), np.stack([means[c] for c in contexts]).astype(np.float32))


@pytest.mark.shared
def test_closed_forms_are_exact_on_real_cells(shared, tmp_path):
    """For doubles from singles in K562, they equal the additive baseline of evaluations and another ridge regression."""
    held = yaml.safe_load((ROOT / "configs" / "norman_combinations.yaml").read_text())["data"]["test_perturbations"]
    cells, processor, adata = load_real(
        shared, "norman2019_mcfaline2023", held={"test_perturbations": held}, contexts=["k562"]
    )
    values, names = adata.X.toarray().astype(np.float64), adata.obs["perturbation"].astype(str).to_numpy()
    here = (adata.obs["cell_type"] == "k562").to_numpy()
    controls = values[here & (names == "control")].astype(np.float32)
    changes = {
        name: values[here & (names == name)].mean(axis=0) - controls.mean(axis=0, dtype=np.float64)
        for name in sorted(set(names[here]) - {"control", *held})
    }
    trainer = fit("state-additive", cells, processor, tmp_path)
    batch = torch.from_numpy(controls)[None].expand(len(held), -1, -1)
    encoded = {key: torch.from_numpy(value) for key, value in processor.encode(held).items()}
    predictions = trainer.model(batch, **encoded).predictions.numpy()
    for name, found in zip(held, predictions):
        a, b = name.split("+")
        expected = np.maximum(controls + changes[a] + changes[b], 0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        known = trainer.baselines().of(name, controls.mean(axis=0))
        np.testing.assert_allclose(known[ADDITIVE].apply(controls, True), expected, rtol=0, atol=1e-6)

    model = fit("state-linear", cells, processor, tmp_path, nonnegative_output=False).model
    singles = processor.vocabulary.perturbations
    design = np.array([[float(p in name.split("+")) for p in singles] for name in changes])
    reference = Ridge(alpha=0.1, fit_intercept=False).fit(design, np.stack(list(changes.values())))
    np.testing.assert_allclose(model.weight.T.numpy(), reference.coef_, atol=1e-7)


FIGURES = {
    "perturbation_mean": {"same as": PERTURBATION_MEAN},
    "additive": {"same as": ADDITIVE},
    "log_fold_change": {"same as": LOG_FOLD_CHANGE},
    # Pearson, MAE and energy distance of the five held-out doubles.
    "linear": {"test_pearson": 0.8693, "test_mae": 0.0050, "test_energy": 0.0410},
    "context_mean": {"test_pearson": 0.1675, "test_mae": 0.0086, "test_energy": 1.1016},
}


@pytest.mark.shared
@pytest.mark.parametrize("name", FIGURES)
def test_the_documented_runs(shared, tmp_path, monkeypatch, name):
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    content["data"]["datasets"] = {
        key: str(shared / "data" / Path(path).name) for key, path in content["data"]["datasets"].items()
    }
    content["training"] |= {"output_dir": str(tmp_path / "run"), "use_cpu": True, "disable_tqdm": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    metrics = train.main([str(tmp_path / "run.yaml")])
    expected = dict(FIGURES[name])
    if same := expected.pop("same as", None):
        expected = {f"test_{m}": metrics[f"test_{same.replace(' ', '_')}_{m}"] for m in ("pearson", "mae", "energy")}
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-6 if same else 6e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Fitted in one pass over the training cells, without gradient steps" in card
    assert "Control cells of contexts that are held out whole were not used in training." in card


# Where the cells are


COMBINED = ["pert_0+pert_1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A screen as `.h5ad`, store and parquet in several shards; type_3 is held out, and pert_2 in type_1."""
    folder = tmp_path_factory.mktemp("fit")
    adata = simulate_screen(
        num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=20, combinations=[(0, 1)], seed=1
    )
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    adata.write_h5ad(folder / "screen.h5ad")
    from pertstate.data import preparation

    data = DataArguments(datasets={"screen": str(folder / "screen.h5ad")}, batch_key="batch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "_cells_of_shard", lambda *_: 100)
        store = prepare(data, folder / "store", PrepareArguments(), quiet=True)
    assert len(store.manifest.shards) >= 4
    write_parquet(store, folder / "parquet")
    (folder / "splits.toml").write_text(
        f'[datasets]\nscreen = "{folder}/screen.h5ad"\n[training]\nscreen = "train"\n'
        '[zeroshot]\n"screen.type_3" = "test"\n[fewshot."screen.type_1"]\nval = ["pert_2"]\n'
    )
    return folder


def run_yaml(folder, output, model_type, source, **training) -> Path:
    data, stream = {"splits": str(folder / "splits.toml")}, {}
    if source == "files":
        data["batch_key"] = "batch"
    elif source == "store":
        data["store"] = str(folder / "store")
    else:
        # Few controls are sampled: the fit reads all of them.
        stream = {"path": str(folder / "parquet"), "reservoir_cells": 8, "block_size": 64, "buffer_cells": 256}
    content = {
        "data": data,
        "model": {"model_type": model_type, "set_size": 8},
        "training": {"output_dir": str(output), "use_cpu": True, "disable_tqdm": True, **training},
    }
    if stream:
        content["stream"] = stream
    output.mkdir(parents=True, exist_ok=True)
    path = output / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(folder, output, model_type, source, *flags) -> dict[str, torch.Tensor]:
    train.main([str(run_yaml(folder, output, model_type, source)), *flags])
    return load_file(output / "model.safetensors")


def by_hand(folder, processor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Changes by label, and means of perturbed cells by context, computed here from the training cells of the file."""
    adata = ad.read_h5ad(folder / "screen.h5ad")
    values = processor.features(adata).astype(np.float64)
    context, name = adata.obs["cell_type"].to_numpy(), adata.obs["perturbation"].to_numpy()
    held = (context == "type_3") | ((context == "type_1") & (name == "pert_2"))
    changes, perturbed = {}, {}
    for c in ("type_0", "type_1", "type_2"):
        base = values[(context == c) & (name == "control")].mean(axis=0)
        perturbed[c] = values[(context == c) & (name != "control") & ~held].mean(axis=0)
        for p in sorted(set(name[(context == c) & ~held]) - {"control"}):
            changes.setdefault(p, []).append(values[(context == c) & (name == p)].mean(axis=0) - base)
    return {p: np.mean(found, axis=0) for p, found in changes.items()}, perturbed


@pytest.mark.parametrize("model_type", FITTED)
def test_memory_store_and_stream_give_the_same_weights(folder, tmp_path, model_type):
    weights = {source: run(folder, tmp_path / source, model_type, source) for source in ("files", "store", "stream")}
    changes, perturbed = by_hand(folder, AutoProcessor.from_pretrained(tmp_path / "files"))
    for source, found in weights.items():
        assert found.keys() == weights["files"].keys()
        for name, value in found.items():
            if source == "store":
                assert torch.equal(value, weights["files"][name]), name
            # A stream has another order of summation.
            torch.testing.assert_close(value, weights["files"][name], atol=1e-6, rtol=1e-6)
    found = weights["files"]
    if model_type == "state-perturbation-mean":
        names = [[], ["pert_0"], ["pert_0", "pert_1"], ["pert_1"], ["pert_2"]]
        entries = [sorted((int(p[-1]) for p in parts), reverse=True) for parts in names]
        places = [found["entries"].tolist().index(ids + [-1] * (2 - len(ids))) for ids in entries]
        expected = np.stack([changes["+".join(parts)] if parts else np.zeros(40) for parts in names])
        np.testing.assert_allclose(found["changes"][places].numpy(), expected, atol=1e-6)
    elif model_type == "state-log-fold-change":
        assert found["log_folds"].shape == (5, 40) and (found["log_folds"][1:] != 0).any(dim=1).all()
    elif model_type == "state-context-mean":
        np.testing.assert_allclose(found["perturbed_means"].numpy(), np.stack(list(perturbed.values())), atol=1e-6)
    elif model_type == "state-additive":
        expected = np.stack([changes[f"pert_{i}"] for i in range(3)])
        np.testing.assert_allclose(found["changes"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("source", ["files", "stream"])
def test_two_processes_fit_what_one_does(folder, tmp_path, source):
    path = run_yaml(folder, tmp_path / "two", "state-perturbation-mean", source)
    done = launches.run_together([launches.TRAIN, path])
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        run(folder, tmp_path / "one", "state-perturbation-mean", source),
        load_file(tmp_path / "two" / "model.safetensors"),
    )
    assert torch.equal(one["entries"], two["entries"])
    if source == "files":
        assert torch.equal(one["changes"], two["changes"])
    torch.testing.assert_close(one["changes"], two["changes"], atol=1e-6, rtol=1e-6)
    # Each process evaluates its share with the same model.
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["num_entries"] == len(two["changes"]) == 5 and config["entry_width"] == 2


def test_held_out_cells_do_not_enter(folder, tmp_path):
    """Fitted weights do not depend on held-out cells, nor on the controls of a context that is held out whole."""
    adata = ad.read_h5ad(folder / "screen.h5ad")
    held = (adata.obs["cell_type"] == "type_3") | (
        (adata.obs["cell_type"] == "type_1") & (adata.obs["perturbation"] == "pert_2")
    )
    splits = Splits.from_toml(folder / "splits.toml")
    fitted = {}
    for name in ("as it is", "altered"):
        if name == "altered":
            counts = adata.X.toarray()
            counts[held] = counts[held] * 3 + 1
            adata.X = sp.csr_matrix(counts)
        adata.write_h5ad(tmp_path / "screen.h5ad")
        splits.datasets["screen"] = [tmp_path / "screen.h5ad"]
        cells, processor = load_cells(splits)
        fitted[name] = [fit(family, cells, processor, tmp_path).model.state_dict() for family in FITTED]
    for before, after in zip(*fitted.values()):
        assert all(torch.equal(before[key], after[key]) for key in before)


# The run


def test_validation_is_scored_once_and_unseen_sentences_are_counted(folder, tmp_path, caplog, recwarn):
    path = run_yaml(folder, tmp_path / "run", "state-context-mean", "files", logging_steps=1)
    with caplog.at_level(logging.INFO, logger="pertstate"):
        metrics = train.main([str(path)])
    warned = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert [message for message in warned if "training cells" in message] == [
        "test: 12 of 12 sentences are of a perturbation or context without training cells; the model card says how "
        "these are predicted"
    ]
    assert not [w for w in recwarn if "sentences" in str(w.message)]
    assert sum("  validation: loss " in r.message for r in caplog.records) == 1
    assert metrics["test_energy"] > metrics["test_no_change_energy"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_there_is_nothing_to_resume(folder, tmp_path):
    path = run_yaml(folder, tmp_path / "run", "state-linear", "files", resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="state-linear is fitted in one pass, which is not continued; leave it out"):
        train.main([str(path)])
    train.main([str(path), "--resume_from_checkpoint", "last"])  # there is no checkpoint, so the run starts anew


def test_predict_says_once_what_is_unseen(folder, tmp_path, caplog, recwarn):
    run(folder, tmp_path / "run", "state-perturbation-mean", "files")
    model, processor = (kind.from_pretrained(tmp_path / "run") for kind in (AutoModel, AutoProcessor))
    with caplog.at_level(logging.WARNING):
        done = predict(
            model,
            processor,
            folder / "screen.h5ad",
            tmp_path / "out.h5ad",
            ["pert_0", "pert_0+pert_2"],
            ["type_0", "type_3"],
            quiet=True,
        )
    assert done["unseen"] == 2 and done["perturbations"] == 2
    [message] = [record.message for record in caplog.records if "training cells" in record.message]
    assert message.startswith("2 of 4 groups (context / perturbation) have a perturbation or a context without")
    assert "['type_0 / pert_0+pert_2', 'type_3 / pert_0+pert_2']" in message
    assert not [w for w in recwarn if "sentences" in str(w.message)]
    out = ad.read_h5ad(tmp_path / "out.h5ad")
    unseen = (out.obs["perturbation"] == "pert_0+pert_2").to_numpy()
    assert np.array_equal(out.X[unseen], controls_of(out)[unseen])
    assert not np.array_equal(out.X[~unseen], controls_of(out)[~unseen])


def test_singles_never_measured_are_named(folder, tmp_path, capsys):
    """If training cells have pert_1 only together with pert_0, the additive model cannot know the change of pert_1."""
    adata = ad.read_h5ad(folder / "screen.h5ad")
    adata = adata[adata.obs["perturbation"] != "pert_1"].copy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    options = ["--data.datasets", f"{{screen: {tmp_path}/screen.h5ad}}", "--output_dir", str(tmp_path / "run")]
    (tmp_path / "run.yaml").write_text(
        "model: {model_type: state-additive}\ntraining: {disable_tqdm: true, use_cpu: true}"
    )
    train.main([str(tmp_path / "run.yaml"), *options])
    words = ["predict", "--model", tmp_path / "run", "--adata", tmp_path / "screen.h5ad", "--quiet"]
    words += ["--output", tmp_path / "out.h5ad"]
    assert pertstate.cli.main([str(word) for word in words]) == 1
    assert "perturbations ['pert_1']: no training cells have one of these alone" in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()
    assert pertstate.cli.main([*map(str, words), "--perturbation", "pert_2", "pert_2+pert_0"]) == 0
    # If the model could not predict held-out groups, the run gives an error before it scores them.
    with pytest.raises(UnseenPerturbationError, match=r"perturbations \['pert_1'\]: no training cells"):
        train.main([str(tmp_path / "run.yaml"), *options, "--test_contexts", "type_1", "--overwrite"])


def test_with_vectors_the_linear_family_predicts_what_was_never_measured(folder, tmp_path):
    vectors = {"pert_0": [1.0, 0.5], "pert_1": [-1.0, 1.0], "pert_2": [0.5, -1.0]}
    pd.DataFrame.from_dict(vectors, orient="index").to_csv(tmp_path / "vectors.csv")
    path = run_yaml(folder, tmp_path / "run", "state-linear", "files")
    content = yaml.safe_load(path.read_text())
    content["data"] = {
        "datasets": {"screen": str(folder / "screen.h5ad")},
        "perturbation_features": str(tmp_path / "vectors.csv"),
        "test_perturbations": ["pert_2"],
    }
    found = {}
    for family in ("state-linear", "state-perturbation-mean", "state-context-mean"):
        content["model"]["model_type"] = family
        path.write_text(yaml.safe_dump(content))
        found[family] = train.main([str(path), "--output_dir", str(tmp_path / family)])
    linear = found["state-linear"]
    assert abs(linear["test_mae"] - linear["test_no_change_mae"]) > 1e-3
    unseen = found["state-perturbation-mean"]
    assert unseen["test_mae"] == pytest.approx(unseen["test_no_change_mae"], rel=1e-6)
    # Singles and the combination, whose vector is the sum of theirs, and the mean change of each.
    weights = load_file(tmp_path / "state-perturbation-mean" / "model.safetensors")
    features, changes = weights["entries"][1:].double().numpy(), weights["changes"][1:].double().numpy()
    assert sorted(features.tolist()) == [[-1.0, 1.0], [0.0, 1.5], [1.0, 0.5]]
    expected = np.linalg.solve(features.T @ features + 0.1 * np.eye(2), features.T @ changes)
    weight = load_file(tmp_path / "state-linear" / "model.safetensors")["weight"]
    np.testing.assert_allclose(weight.numpy(), expected, atol=1e-6)
    content["model"]["model_type"] = "state-additive"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(
        ValueError, match="found perturbation_dim=2; leave perturbation_features out, or use state-linear"
    ):
        train.main([str(path)])


def test_embeddings_are_moved_and_not_clipped(folder, tmp_path):
    adata = ad.read_h5ad(folder / "screen.h5ad")
    adata.obsm["X_emb"] = np.random.default_rng(0).normal(size=(adata.n_obs, 5)).astype(np.float32)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    path = run_yaml(folder, tmp_path / "run", "state-perturbation-mean", "files")
    content = yaml.safe_load(path.read_text())
    content["data"] = {"datasets": {"screen": str(tmp_path / "screen.h5ad")}, "input": "obsm/X_emb"}
    path.write_text(yaml.safe_dump(content))
    train.main([str(path)])
    model = AutoModel.from_pretrained(tmp_path / "run")
    cells = torch.full((1, 2, 5), -3.0)
    found = model(cells, perturbation_ids=torch.tensor([[1]])).predictions - cells
    entry = model.entries.tolist().index([1, -1])
    torch.testing.assert_close(found[0], model.changes[entry].expand(2, -1), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="gene_dim=40: state-perturbation-mean predicts the features that it reads"):
        train.main([str(path), "--gene_input", "X", "--overwrite"])
