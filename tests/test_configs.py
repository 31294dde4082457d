"""Every run that `configs/` documents starts, trains and is scored, on the data that it names."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from family_tests import screen  # noqa: F401

from pertstate import train
from pertstate.families import FAMILIES


ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").glob("*.yaml"))}
ON_REAL_DATA = [name for name, run in CONFIGS.items() if "shared/data" in str(run["data"]["datasets"])]
FEW = [
    "--max_steps",
    "2",
    "--disable_tqdm",
    "true",
    "--use_cpu",
    "true",
    "--save_strategy",
    "no",
    "--eval_strategy",
    "no",
]


def test_every_family_has_a_run():
    named = {run["model"].get("model_type", "state") for run in CONFIGS.values()}
    assert named == set(FAMILIES)


def test_what_is_not_on_real_data_is_on_simulated():
    assert sorted(set(CONFIGS) - set(ON_REAL_DATA)) == ["decoder_only", "demo"]


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", ON_REAL_DATA)
def test_run_on_real_data(shared, tmp_path, name):
    data = {key: str(shared / "data" / Path(path).name) for key, path in CONFIGS[name]["data"]["datasets"].items()}
    flags = [*FEW, "--datasets", yaml.safe_dump(data, default_flow_style=True, width=10_000).strip()]
    metrics = train.main([str(ROOT / "configs" / f"{name}.yaml"), "--output_dir", str(tmp_path / "run"), *flags])
    assert np.isfinite(metrics["test_mae"]) and np.isfinite(metrics["test_energy"])
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_ceiling_of_a_simulated_screen(screen, tmp_path):  # noqa: F811
    flags = [*FEW, "--datasets", str(screen), "--output_dir", str(tmp_path / "run")]
    metrics = train.main([str(ROOT / "configs" / "decoder_only.yaml"), *flags])
    assert np.isfinite(metrics["test_mae"]) and np.isfinite(metrics["test_energy"])


def test_a_run_wins_over_the_arguments_that_a_family_was_published_with(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {datasets: x.h5ad}\nmodel: {model_type: state-cpa}\ntraining: {weight_decay: 0.1}\n")
    published = FAMILIES["state-cpa"].config.training_defaults
    assert train.read_run([str(path)]).training == {**published, "weight_decay": 0.1}
    # A schedule or an optimiser of the run's own takes the place of the published one.
    own = train.read_run([str(path), "--lr_scheduler_type", "linear"]).training
    assert own["lr_scheduler_type"] == "linear" and not {"lr_decay_epochs", "lr_decay_factor"} & set(own)
    assert own["l2_weight_decay"] is True and own["learning_rate"] == published["learning_rate"]
    assert "l2_weight_decay" not in train.read_run([str(path), "--optim", "sgd"]).training
    assert train.read_run([str(path), "--model_type", "state", "--preset", "tiny"]).training == {"weight_decay": 0.1}
