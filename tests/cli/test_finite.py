"""Values, doses and weights that are too large for a model: every command says so in one line, and writes nothing."""

import anndata as ad
import numpy as np
import pytest
import torch
import yaml

from pertstate import StateForPerturbation, StateProcessor
from pertstate.cli import main
from pertstate.configuration_state import StateConfig
from pertstate.data import simulate_screen


HUGE = [np.nan, np.inf, 1e300]


def screen() -> ad.AnnData:
    adata = simulate_screen(num_contexts=2, num_perturbations=2, num_genes=10, cells_per_group=8, seed=0)
    adata.X = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, dtype=np.float64)
    adata.obs["dose"] = 1.0
    adata.obsm["E"] = np.random.default_rng(0).normal(size=(adata.n_obs, 4))
    return adata


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`screen.h5ad`, checkpoints of it, and a run."""
    folder = tmp_path_factory.mktemp("finite")
    adata = screen()
    adata.write_h5ad(folder / "screen.h5ad")
    for name, options in (
        ("plain", {}),
        ("dosed", {"dose_key": "dose"}),
        ("embedding", {"input": "obsm/E"}),
        ("decoder", {"input": "obsm/E", "gene_input": "X"}),
    ):
        processor = StateProcessor.fit(adata, set_size=4, **options)
        fields = {"nonnegative_output": False} if "E" in options.get("input", "") else {}
        config = StateConfig.from_preset("tiny", **{**StateConfig.sizes(processor), "set_size": 4, **fields})
        torch.manual_seed(0)
        model = StateForPerturbation(config)
        for kind in ("", "-huge"):
            if kind:
                part = model.gene_decoder.output if name == "decoder" else model.output_head.layers[-1]
                torch.nn.init.constant_(part.weight, 3e38)
                torch.nn.init.constant_(part.bias, 3e38)
            model.save_pretrained(folder / f"{name}{kind}")
            processor.save_pretrained(folder / f"{name}{kind}")
    run = {
        "data": {"datasets": {"s": str(folder / "screen.h5ad")}},
        "model": {"preset": "tiny", "set_size": 4},
        "training": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def refused(capsys, *words) -> str:
    """What a command says of an error: one line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"pertstate {words[0]}: error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def predict(folder, model, output, *flags, adata=None):
    adata = folder / "screen.h5ad" if adata is None else adata
    return ["predict", "--model", folder / model, "--adata", adata, "--output", output, "--quiet", *flags]


@pytest.mark.parametrize("value", HUGE)
def test_values_that_go_in(folder, tmp_path, capsys, value):
    adata = screen()
    controls = np.flatnonzero(adata.obs["perturbation"] == "control")
    adata.X[controls[1], 2] = value
    adata.obsm["E"][controls[1], 2] = value
    adata.write_h5ad(tmp_path / "bad.h5ad")
    cell = adata.obs_names[controls[1]]
    named = f"X holds {np.float64(value)} in cell {cell!r}, gene {adata.var_names[2]!r}"
    bad = ["--datasets", tmp_path / "bad.h5ad"]
    assert named in refused(capsys, *predict(folder, "plain", tmp_path / "p.h5ad", adata=tmp_path / "bad.h5ad"))
    assert named in refused(capsys, "train", folder / "run.yaml", "--output_dir", tmp_path / "run", *bad)
    assert named in refused(capsys, "prepare", "--config", folder / "run.yaml", "--output", tmp_path / "store", *bad)
    of_embedding = refused(capsys, *predict(folder, "embedding", tmp_path / "p.h5ad", adata=tmp_path / "bad.h5ad"))
    assert f"obsm/E holds {np.float64(value)} in cell {cell!r}, dimension 2" in of_embedding
    embedded = [*bad, "--input", "obsm/E", "--quiet"]
    assert "obsm/E holds" in refused(
        capsys, "prepare", "--config", folder / "run.yaml", "--output", tmp_path / "store", *embedded
    )
    assert main(["info", str(tmp_path / "bad.h5ad")]) == 0
    assert "has values that are NaN or infinite" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == ["bad.h5ad"]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("dose", ["nan", "inf", "-inf", "1e300", "1e-300", "0", "-1"])
def test_doses_that_are_asked_for(folder, tmp_path, capsys, dose):
    flags = ["--perturbation", "pert_0", f"--dose={dose}"]
    said = refused(capsys, *predict(folder, "dosed", tmp_path / "p.h5ad", *flags))
    assert "expected numbers above 0" in said and not any(tmp_path.iterdir())
    said = refused(capsys, *predict(folder, "dosed", tmp_path / "p.h5ad", "--perturbation", f"pert_0@{dose}"))
    assert "'pert_0'" in said and not any(tmp_path.iterdir())


@pytest.mark.parametrize("dose", [*HUGE, 0.0, 1e-300])
def test_doses_of_a_screen(folder, tmp_path, capsys, dose):
    adata = screen()
    adata.obs.loc[adata.obs["perturbation"] == "pert_1", "dose"] = dose
    adata.write_h5ad(tmp_path / "bad.h5ad")
    flags = ["--datasets", tmp_path / "bad.h5ad", "--dose_key", "dose", "--output_dir", tmp_path / "run"]
    said = refused(capsys, "train", folder / "run.yaml", *flags)
    assert "obs['dose'] holds" in said and "for 'pert_1'; expected a number above 0" in said


@pytest.mark.parametrize("model", ["plain", "embedding", "decoder"])
def test_predictions_that_are_not_finite_are_an_error(folder, tmp_path, capsys, model):
    said = refused(capsys, *predict(folder, f"{model}-huge", tmp_path / "p.h5ad"))
    feature = "dim_0" if model == "embedding" else "gene_0"
    assert "the model predicts " in said and f"for '{feature}' of type_0 / pert_" in said and "(control cell '" in said
    assert not any(tmp_path.iterdir())
    assert main([str(word) for word in predict(folder, model, tmp_path / "p.h5ad")]) == 0
    predicted = ad.read_h5ad(tmp_path / "p.h5ad")
    assert all(np.isfinite(of).all() for of in (predicted.X, *predicted.layers.values(), *predicted.obsm.values()))


def test_a_run_that_diverges_after_its_last_log_leaves_no_model(folder, tmp_path, capsys):
    flags = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--logging_steps", "100", "--save_strategy", "no"]
    said = refused(capsys, "train", folder / "run.yaml", "--output_dir", tmp_path / "run", "--max_steps", "4", *flags)
    assert "NaN or infinite" in said and not (tmp_path / "run" / "config.json").exists()
    # One step, whose loss is finite and whose weights are not.
    flags = ["--learning_rate", "3e37", "--weight_decay", "10", "--optim", "adamw_torch", "--save_strategy", "no"]
    said = refused(capsys, "train", folder / "run.yaml", "--output_dir", tmp_path / "one", "--max_steps", "1", *flags)
    assert "NaN or infinite" in said and not (tmp_path / "one" / "config.json").exists()


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("which", ["predicted", "real"])
def test_figures_that_are_not_finite_are_refused(folder, tmp_path, capsys, value, which):
    files = {name: tmp_path / f"{name}.h5ad" for name in ("predicted", "real")}
    assert main([str(word) for word in predict(folder, "plain", files["predicted"])]) == 0
    screen().write_h5ad(files["real"])
    changed = ad.read_h5ad(files[which])
    changed.X = changed.X.astype(np.float64)
    changed.X[np.flatnonzero(changed.obs["perturbation"] == "pert_0")[0], 4] = value
    changed.write_h5ad(files[which])
    words = ["--predicted", files["predicted"], "--real", files["real"], "--train", folder / "screen.h5ad"]
    said = refused(capsys, "evaluate", *words, "--output", tmp_path / "table.csv", "--quiet")
    assert f"X holds {np.float64(value)} in cell " in said and "gene 'gene_4'" in said
    assert not (tmp_path / "table.csv").exists()


def test_a_store_in_half_precision_holds_no_infinity(folder, tmp_path, capsys):
    adata = screen()
    adata.obsm["E"][4, 1] = 70_000
    adata.write_h5ad(tmp_path / "screen.h5ad")
    flags = ["--datasets", tmp_path / "screen.h5ad", "--input", "obsm/E", "--dtype", "float16", "--quiet"]
    said = refused(capsys, "prepare", "--config", folder / "run.yaml", "--output", tmp_path / "store", *flags)
    assert "prepare.dtype='float16' holds numbers up to 65,504, found 70000 in embedding; use 'float32'" in said
    assert not (tmp_path / "store").exists()
