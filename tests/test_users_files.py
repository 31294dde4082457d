"""Users' files: labels in any spelling, several controls, guides, doses, others' files. Values are checked from end to end."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import yaml
from transformers import AutoModel, AutoProcessor

from pertstate import StateProcessor, train
from pertstate.cli import main as pertstate
from pertstate.evaluation import controls_of
from pertstate.evaluation.comparison import evaluate
from pertstate.evaluation.prediction import predict


def screen(
    perturbations=("A", "B"), contexts=("k562", "rpe1"), cells=8, controls=12, genes=20, seed=0, control="control"
):
    """Counts of a small screen: obs `perturbation` and `cell_type`, as plain text."""
    r = np.random.default_rng(seed)
    base = r.gamma(1.0, 2.0, genes) + 0.2
    effect = {name: np.exp(r.normal(0, 0.8, genes) * (r.random(genes) < 0.3)) for name in perturbations}
    rows, labels, where = [], [], []
    for context in contexts:
        for name in (control, *perturbations):
            number = controls if name == control else cells
            rows.append(r.poisson(base * effect.get(name, 1) * r.gamma(5, 0.2, (number, 1)) + 0.05))
            labels += [name] * number
            where += [context] * number
    obs = pd.DataFrame({"perturbation": labels, "cell_type": where}, index=[f"c{i}" for i in range(len(labels))])
    obs = obs.astype(object)
    var = pd.DataFrame(index=[f"G{i}" for i in range(genes)])
    return ad.AnnData(sp.csr_matrix(np.vstack(rows).astype(np.float32)), obs=obs, var=var)


def written(adata: ad.AnnData, path: Path) -> str:
    adata.copy().write_h5ad(path)
    return str(path)


def trained(
    folder: Path,
    data: dict,
    name: str = "model",
    steps: int = 2,
    model: dict | None = None,
    stream: dict | None = None,
    **training,
) -> Path:
    """The checkpoint of a short training. `model` sets fields of its model, or the checkpoint that is trained further."""
    section = {} if model and "pretrained" in model else {"preset": "tiny", "set_size": 8}
    content = {
        "data": data,
        "model": section | (model or {}),
        **({} if stream is None else {"stream": stream}),
        "training": {"max_steps": steps, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **training},
    }
    content["training"]["per_device_train_batch_size"] = 4
    content["training"]["output_dir"] = str(folder / name)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    train.main([str(folder / f"{name}.yaml")])
    return folder / name


def vocabulary(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "vocabulary.json").read_text())


# Labels that name the same


def test_labels_in_every_order_are_those_of_the_plain_file(tmp_path):
    """A file with `A+ctrl`, `ctrl+A`, `ctrl` and `B+A` gives the same bits as a file with `A`, `control` and `A+B`."""
    plain = screen(("A", "B", "A+B"))
    other = plain.copy()
    names = {"A": ["A+ctrl", "ctrl+A", "A"], "B": ["B+ctrl"], "A+B": ["B+A", "A + B"], "control": ["ctrl", "ctrl+ctrl"]}
    other.obs["perturbation"] = [names[n][i % len(names[n])] for i, n in enumerate(plain.obs["perturbation"])]
    one = trained(tmp_path, {"datasets": written(plain, tmp_path / "plain.h5ad")}, "one")
    two = trained(tmp_path, {"datasets": written(other, tmp_path / "other.h5ad"), "control": "ctrl"}, "two")
    assert vocabulary(one) == vocabulary(two) and vocabulary(two)["perturbations"] == ["A", "B"]
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()

    assert (
        pertstate(
            [
                "predict",
                "--model",
                str(two),
                "--adata",
                str(tmp_path / "other.h5ad"),
                "--output",
                str(tmp_path / "p.h5ad"),
                "--quiet",
            ]
        )
        == 0
    )
    assert set(ad.read_h5ad(tmp_path / "p.h5ad").obs["perturbation"]) == {"A", "B", "A+B"}
    scores = evaluate(tmp_path / "p.h5ad", tmp_path / "other.h5ad", tmp_path / "other.h5ad", quiet=True)
    assert set(scores.table["perturbation"]) == {"A", "B", "A+B"}
    assert not [note for note in scores.notes if "no real cells" in note]


def test_the_additive_baseline_of_gears_labels_is_that_of_plain_ones(tmp_path):
    """The singles of `A+B` are found although they are written `A+ctrl` and `ctrl+B`."""
    plain = screen(("A", "B", "A+B"))
    other = plain.copy()
    names = {"A": "A+ctrl", "B": "ctrl+B", "A+B": "B+A", "control": "ctrl"}
    other.obs["perturbation"] = [names[name] for name in plain.obs["perturbation"]]
    rows = []
    for name, adata, control in (("plain", plain, "control"), ("other", other, "ctrl")):
        path = written(adata, tmp_path / f"{name}.h5ad")
        data = {"datasets": path, "control": control, "test_perturbations": ["A+B"]}
        content = json.loads((trained(tmp_path, data, name) / "training_args.json").read_text())
        assert content
        processor, model = AutoProcessor.from_pretrained(tmp_path / name), AutoModel.from_pretrained(tmp_path / name)
        predict(model, processor, path, tmp_path / "p.h5ad", perturbations=["A+B"], quiet=True, overwrite=True)
        table = evaluate(tmp_path / "p.h5ad", path, path, quiet=True).table
        rows.append(table[table["method"] == "additive"].reset_index(drop=True))
    assert len(rows[0]) == 2
    pd.testing.assert_frame_equal(rows[0], rows[1])


def test_a_name_with_the_separator_in_it_stays_whole(tmp_path, caplog):
    adata = screen(("(+)-JQ1", "AR-42", "TGF+ low", "low+AR-42"), control="Vehicle")
    path = written(adata, tmp_path / "s.h5ad")
    model = trained(tmp_path, {"datasets": path, "control": "Vehicle"})
    # `TGF` stands nowhere else; `low` and `AR-42` do.
    assert vocabulary(model)["perturbations"] == ["(+)-JQ1", "AR-42", "TGF", "low"]
    assert (
        "1 labels are read as combinations, and a part of each stands nowhere else in the data: ['TGF+ low']"
        in caplog.text
    )
    model = trained(tmp_path, {"datasets": path, "control": "Vehicle", "combination_separator": None}, "whole")
    assert vocabulary(model)["perturbations"] == ["(+)-JQ1", "AR-42", "TGF+ low", "low+AR-42"]
    processor = AutoProcessor.from_pretrained(model)
    assert processor(adata, ["(+)-JQ1", "TGF+ low"], context="rpe1")["perturbation_ids"].unique().tolist() == [0, 2]


# Controls


def test_several_controls_are_one_however_they_are_named(tmp_path):
    plain = screen(("KLF1", "MYC"))
    is_control = (plain.obs["perturbation"] == "control").to_numpy()
    guides = plain.copy()
    guides.obs.loc[is_control, "perturbation"] = [f"non-targeting_{i % 5:05d}" for i in range(is_control.sum())]
    path = written(guides, tmp_path / "guides.h5ad")
    listed = [f"non-targeting_{i:05d}" for i in range(5)]
    one = trained(tmp_path, {"datasets": written(plain, tmp_path / "plain.h5ad")}, "plain")
    for name, control in (
        ("list", listed),
        ("pattern", "non-targeting*"),
        ("of", {"guides": "non-targeting*", "x": ["y"]}),
    ):
        model = trained(tmp_path, {"datasets": {"guides": path}, "control": control}, name)
        assert vocabulary(model)["perturbations"] == ["KLF1", "MYC"]
        assert (model / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    processor = AutoProcessor.from_pretrained(tmp_path / "pattern")
    assert (processor.control, processor.control_labels) == ("non-targeting", ["non-targeting*"])
    assert (processor(guides, "MYC")["cell_mask"]).sum() == is_control.sum()
    with pytest.raises(
        ValueError, match=r"no control cells.* say which label marks the controls with control='non-targeting\*'"
    ):
        trained(tmp_path, {"datasets": path, "control": "non-targeting"}, "none")


def test_info_says_that_several_labels_look_like_controls(tmp_path, capsys):
    adata = screen(("KLF1",))
    adata.obs["perturbation"] = [
        n if n != "control" or i % 2 else "Control" for i, n in enumerate(adata.obs["perturbation"])
    ]
    path = written(adata, tmp_path / "case.h5ad")
    assert pertstate(["info", path]) == 0
    said = capsys.readouterr().out
    assert "2 labels look like controls and are taken together: ['Control', 'control']" in said
    assert 'control: ["Control", "control"]' in said and "2 contexts x 1 perturbation," in said
    assert pertstate(["info", path, "--control", "control"]) == 0
    assert "these labels look like controls too: ['Control']" in capsys.readouterr().out


# Guides, cells left out, columns


def test_guides_are_collapsed_and_cells_left_out(tmp_path):
    plain = screen(("STAT1", "MYC"))
    adata = plain.copy()
    adata.obs["perturbation"] = [
        name if name == "control" else f"{name}_g{i % 3}" for i, name in enumerate(plain.obs["perturbation"])
    ]
    extra = plain[:6].copy()
    extra.obs["perturbation"] = [None, "NA", "unassigned", "MYC_g1", "MYC_g1", "STAT1_g0"]
    extra.obs_names = [f"extra{i}" for i in range(6)]
    adata.obs["good"], extra.obs["good"] = True, [True, True, True, False, False, False]
    both = ad.concat([extra, adata])
    path = written(both, tmp_path / "guides.h5ad")
    data = {"datasets": path, "perturbation_map": {"*_g0": "*", "*_g1": "*", "*_g2": "*"}}
    with pytest.raises(
        ValueError, match=r"obs\['perturbation'\] is empty in 3 cells, first in 'extra0'; label them, or set"
    ):
        trained(tmp_path, data, "error")
    model = trained(tmp_path, {**data, "unlabelled": "drop", "exclude": {"good": [False]}}, "model")
    one = trained(tmp_path, {"datasets": written(plain, tmp_path / "plain.h5ad")}, "one")
    assert vocabulary(model) == vocabulary(one)
    assert (model / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    processor = AutoProcessor.from_pretrained(model)
    assert processor.labels(both)["perturbation"].isna().sum() == 6
    only = trained(tmp_path, {**data, "unlabelled": "drop", "include": {"good": "True"}}, "include")
    assert (only / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_contexts_of_several_columns_or_of_none(tmp_path):
    adata = screen(contexts=("k562|day 1", "rpe1/β"))
    adata.obs["donor"] = np.tile([1, 2], adata.n_obs // 2)
    path = written(adata, tmp_path / "s.h5ad")
    model = trained(tmp_path, {"datasets": path, "context_key": ["cell_type", "donor"]}, "two")
    assert vocabulary(model)["contexts"] == ["k562|day 1|1", "k562|day 1|2", "rpe1/β|1", "rpe1/β|2"]
    out = tmp_path / "p.h5ad"
    assert pertstate(["predict", "--model", str(model), "--adata", path, "--output", str(out), "--all", "--quiet"]) == 0
    assert set(ad.read_h5ad(out).obs["context"]) == set(vocabulary(model)["contexts"])
    model = trained(tmp_path, {"datasets": path, "context": "k562"}, "one")
    assert vocabulary(model)["contexts"] == ["k562"]
    processor = AutoProcessor.from_pretrained(model)
    assert processor.context_key is None and set(processor.labels(adata)["context"]) == {"k562"}


# Files of others


def test_controls_of_others_need_no_column_that_the_model_does_not_use(tmp_path, capsys):
    adata = screen(control="non-targeting")
    adata.obs["gem_group"] = np.where(np.arange(adata.n_obs) % 2, "1", "2")
    path = written(adata, tmp_path / "s.h5ad")
    model = trained(tmp_path, {"datasets": path, "control": "non-targeting", "batch_key": "gem_group"})
    new = screen((), ("new",), seed=9, control="non-targeting")
    expected = None
    variants = {
        "as it is": (new.obs, []),
        "another batch": (new.obs.assign(gem_group="77"), []),
        "other names": (
            pd.DataFrame({"guide": ["DMSO"] * new.n_obs, "line": "new"}, index=new.obs_names),
            ["--control", "DMSO", "--perturbation-key", "guide", "--context-key", "line"],
        ),
        "no perturbation": (new.obs[["cell_type"]], ["--all-are-controls"]),
        "no column at all": (pd.DataFrame(index=new.obs_names), ["--all-are-controls", "--context", "new"]),
    }
    for name, (obs, flags) in variants.items():
        file = new.copy()
        file.obs = obs
        words = ["predict", "--model", str(model), "--adata", written(file, tmp_path / "new.h5ad")]
        assert (
            pertstate([*words, "--output", str(tmp_path / "p.h5ad"), "--all", "--quiet", "--overwrite", *flags]) == 0
        ), name
        found = ad.read_h5ad(tmp_path / "p.h5ad")
        assert found.n_obs == 2 * new.n_obs and ("gem_group" in found.obs) == ("gem_group" in obs)
        expected = found.X if expected is None else expected
        assert np.array_equal(found.X, expected), name
    file.obs = pd.DataFrame({"cell_type": "new"}, index=new.obs_names)
    written(file, tmp_path / "new.h5ad")
    capsys.readouterr()
    assert pertstate([*words, "--output", str(tmp_path / "p.h5ad"), "--all", "--quiet", "--overwrite"]) == 1
    assert "say with --all-are-controls that every cell is a control" in capsys.readouterr().err


# Doses


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    """A drug at three doses, and a model that learned them."""
    folder = tmp_path_factory.mktemp("doses")
    r, base = np.random.default_rng(0), screen((), controls=16)
    effect = np.exp(r.normal(0, 1, base.n_vars) * (r.random(base.n_vars) < 0.5))
    parts = [base.copy()]
    parts[0].obs["dose"] = 0.0
    for dose in (0.01, 0.1, 1.0):
        treated = base.copy()
        treated.X = sp.csr_matrix(r.poisson((base.X.toarray() + 0.2) * effect**dose).astype(np.float32))
        treated.obs["perturbation"], treated.obs["dose"] = "drug", dose
        treated.obs_names = [f"{name}_{dose}" for name in treated.obs_names]
        parts.append(treated)
    written(ad.concat(parts), folder / "s.h5ad")
    trained(folder, {"datasets": str(folder / "s.h5ad"), "dose_key": "dose"}, steps=60, learning_rate=3e-3)
    return folder


def test_one_name_at_several_doses_is_several_groups(series):
    processor = AutoProcessor.from_pretrained(series / "model")
    assert vocabulary(series / "model")["perturbations"] == ["drug"] and processor.doses == {"drug": [0.01, 0.1, 1.0]}
    data = ad.read_h5ad(series / "s.h5ad")
    names = processor.labels(data)["perturbation"]
    assert names.value_counts().to_dict() == {"control": 32, "drug@0.01": 32, "drug@0.1": 32, "drug@1": 32}
    encoded = processor.encode(["drug@1", "drug@0.01", "control", "drug@0.1"])
    assert encoded["perturbation_ids"].ravel().tolist() == [0, 0, -1, 0]
    expected = [1, np.log(2) / np.log(101), 0, np.log(11) / np.log(101)]
    np.testing.assert_allclose(encoded["perturbation_doses"].ravel(), expected, rtol=1e-6)
    held = {"datasets": str(series / "s.h5ad"), "dose_key": "dose", "test_perturbations": ["drug@0.1"]}
    assert AutoProcessor.from_pretrained(trained(series, held, "held")).doses == {"drug": [0.01, 1.0]}


def test_doses_stand_in_the_output_and_in_its_scores(series, caplog, capsys):
    out, words = series / "p.h5ad", ["predict", "--model", str(series / "model"), "--adata", str(series / "s.h5ad")]
    words += ["--output", str(out), "--quiet", "--perturbation", "drug"]
    assert pertstate([*words, "--dose", "0.01", "0.1", "1", "3"]) == 0
    assert "no training cell had the dose of 1 perturbation: ['drug@3']" in caplog.text
    assert "p.h5ad: 128 cells, 1 perturbation (4 with their doses) in 2 contexts\n" in capsys.readouterr().out
    found = ad.read_h5ad(out)
    assert set(found.obs["perturbation"]) == {"drug"} and found.obs["dose"].value_counts().to_dict() == dict.fromkeys(
        (0.01, 0.1, 1, 3), 32
    )
    assert found.obs_names.is_unique and found.obs_names[0].endswith("|drug@0.01")
    change = {
        d: float(np.abs(found.X - controls_of(found))[(found.obs["dose"] == d).to_numpy()].mean())
        for d in (0.01, 0.1, 1)
    }
    assert change[0.01] < change[0.1] < change[1]
    table = evaluate(out, series / "s.h5ad", series / "s.h5ad", quiet=True).table
    assert set(table["perturbation"]) == {"drug@0.01", "drug@0.1", "drug@1"}


@pytest.mark.parametrize(
    ("doses", "message"),
    [
        ([float("nan")], "expected numbers above 0, found nan"),
        ([-1.0], "expected numbers above 0, found -1.0"),
        ([0.0], "expected numbers above 0, found 0.0"),
        ([1.0, 2.0], r"expected 1 \(one for each perturbation together\), found 2"),
        (None, "perturbation 'drug': expected a dose, drug@DOSE, found none; training had 0.01, 0.1, 1"),
    ],
)
def test_doses_that_say_nothing_are_errors(series, doses, message):
    processor = AutoProcessor.from_pretrained(series / "model")
    with pytest.raises(ValueError, match=message):
        processor(ad.read_h5ad(series / "s.h5ad"), "drug", doses=doses)


@pytest.mark.parametrize("dose", [np.nan, np.inf, -0.1, 0.0, "low"])
def test_a_cell_without_a_dose_is_an_error(tmp_path, dose):
    adata = screen()
    adata.obs["dose"] = pd.Series(
        [0.0 if n == "control" else 0.5 for n in adata.obs["perturbation"]], adata.obs_names, object
    )
    adata.obs.iloc[-1, 2] = dose
    with pytest.raises(ValueError, match=r"obs\['dose'\] holds .* for 'B'; expected a number above 0"):
        StateProcessor.fit(adata, dose_key="dose")


def test_a_model_without_doses_says_that_a_dose_means_little(tmp_path):
    adata = screen()
    processor = StateProcessor.fit(adata)
    with pytest.warns(UserWarning, match="trained without doses"):
        sentences = processor(adata, "A", doses=[0.5])
    assert set(sentences.obs["dose"]) == {0.5} and torch.all(sentences["perturbation_doses"] == 0.5)


def test_combinations_at_doses(tmp_path):
    adata = screen(("A", "B", "B+A"))
    texts = {"control": "", "A": "2", "B": "0.5", "B+A": "0.5;2"}
    adata.obs["dose"] = [texts[name] for name in adata.obs["perturbation"]]
    processor = StateProcessor.fit(adata, dose_key="dose")
    assert set(processor.labels(adata)["perturbation"]) == {"control", "A@2", "B@0.5", "A@2+B@0.5"}
    assert processor.doses == {"A": [2.0], "B": [0.5]}
    sentences = processor(adata, "B+A", doses=[0.5, 2])
    assert sentences["perturbation_ids"][0].tolist() == [0, 1]
    assert sentences["perturbation_doses"][0].tolist() == pytest.approx([1, np.log(2) / np.log(5)])
    assert set(sentences.obs["dose"]) == {"2;0.5"} and set(sentences.obs["perturbation"]) == {"A+B"}


@pytest.mark.parametrize("missing", ["", " ", "nan", None])
def test_genes_without_a_name_are_not_joined_into_one(tmp_path, missing):
    adata = screen()
    adata.var["symbol"] = [missing if i < 3 else f"S{i}" for i in range(20)]
    path = written(adata, tmp_path / "s.h5ad")
    with pytest.raises(ValueError, match=r"var\['symbol'\] has no name for 3 genes, first for 'G0'; name them"):
        trained(tmp_path, {"datasets": path, "gene_key": "symbol", "duplicate_genes": "sum"})
    adata.var["symbol"] = ["nan", *(f"S{i}" for i in range(19))]  # a gene of the fly
    data = {"datasets": written(adata, path), "gene_key": "symbol"}
    assert vocabulary(trained(tmp_path, data))["genes"][:2] == ["nan", "S0"]


def test_files_without_a_common_gene_show_their_names(tmp_path):
    other = screen()
    other.var_names = [name.lower() for name in other.var_names]
    paths = {"a": written(screen(), tmp_path / "a.h5ad"), "b": written(other, tmp_path / "b.h5ad")}
    with pytest.raises(ValueError, match=r"found \['G0', .* and \['g0', .* they match in another case"):
        trained(tmp_path, {"datasets": paths})


def test_what_is_left_out_by_mistake_is_said(tmp_path, caplog):
    adata = screen(contexts=("K562", "k562"))
    path = written(adata, tmp_path / "s.h5ad")
    trained(tmp_path, {"datasets": path, "exclude": {"perturbation": ["a"]}})
    assert "exclude: no cell has 'a' in obs['perturbation']; did you mean 'A'?" in caplog.text
    assert "contexts ['K562', 'k562'] are written almost alike, and are told apart" in caplog.text
    with pytest.raises(ValueError, match="all of them are left out.; include: no cell has 'C' in obs"):
        trained(tmp_path, {"datasets": path, "include": {"perturbation": ["C"]}}, "other")
