"""What every family of models must do: an abstract test class. A family gives its getters and golden values."""

import json
import textwrap
from pathlib import Path
from typing import ClassVar

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor

import pertstate.cli
from pertstate import StateProcessor, train
from pertstate.data import simulate_screen
from pertstate.evaluation.metrics import METRICS
from pertstate.families import FAMILIES
from pertstate.training import objective_for


ROOT = Path(__file__).parents[1]
SENTENCES, CELLS, FEATURES = 3, 5, 12
EMBEDDING = {"input": "obsm/X_emb", "gene_input": "X", "genes": 20}


def wave(*shape: int, start: int = 0) -> torch.Tensor:
    """Numbers that are the same on every machine and version, without a pattern that could hide an error."""
    n = torch.arange(start, start + int(np.prod(shape)), dtype=torch.float64)
    return (torch.sin(n * 12.9898 + 0.5) * 43758.5453 % 1 * 2 - 1).float().view(shape)


@pytest.fixture(scope="session")
def screen(tmp_path_factory) -> Path:
    """Counts of four contexts, three perturbations and two batches, and an embedding of the cells."""
    adata = simulate_screen(num_contexts=4, num_perturbations=3, num_genes=40, cells_per_group=16, seed=1)
    adata.layers["counts"] = adata.X.copy()
    loadings = np.random.default_rng(0).normal(0, 0.2, (40, 10))
    adata.obsm["X_emb"] = (np.log1p(adata.X.toarray()) @ loadings).astype(np.float32)
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    adata.write_h5ad(path)
    return path


class FamilyTests:
    """
    Tests of one family. A subclass named `Test..` gives

    - `model_type`;
    - `golden`: `predictions[0, 0, :4]` of `model()` on `batch()`, and `golden_mean`, the mean of all predictions
      (numbers that an independent computation or an earlier version gave);
    - if they differ from the defaults here: `fields` of its config beside the preset `tiny`, the `data` and `model_section`
      of a run, the `batch()`, how `fill` gives a model its weights, and whether it `learns` by gradient steps.
    """

    model_type: ClassVar[str]
    golden: ClassVar[list[float]]
    golden_mean: ClassVar[float]
    # Fields of the config beside the tiny preset, and sections of the run.
    fields: ClassVar[dict] = {}
    data: ClassVar[dict] = {}
    model_section: ClassVar[dict] = {}
    # Whether it is trained by gradient steps.
    learns: ClassVar[bool] = True
    atol: ClassVar[float] = 1e-6

    # Getters

    def config(self, **overrides):
        sizes = {"input_dim": FEATURES, "num_perturbations": 4, "num_contexts": 3, "num_batches": 2}
        return FAMILIES[self.model_type].config.from_preset("tiny", **{**sizes, **self.fields, **overrides})

    def model(self, **overrides):
        """A model whose weights are the same on every machine, in evaluation mode."""
        model = FAMILIES[self.model_type].model(self.config(**overrides)).eval()
        self.fill(model)
        return model

    def fill(self, model):
        with torch.no_grad():
            for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
                scale = 1.0 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * wave(*parameter.shape, start=1000 * i))

    def batch(self) -> dict[str, torch.Tensor]:
        """A single perturbation, a combination and the control; one context and one batch that were not seen."""
        config = self.config()
        batch = {
            "control_cells": 2 * wave(SENTENCES, CELLS, config.input_dim).abs(),
            "perturbation_ids": torch.tensor([[0, -1], [1, 2], [-1, -1]]),
            "context_ids": torch.tensor([0, 2, -1]),
            "batch_ids": torch.tensor([[0, 1, 0, 1, 1], [1] * CELLS, [0] * CELLS]),
            "labels": 2 * wave(SENTENCES, CELLS, config.output_dim, start=77).abs(),
        }
        if config.gene_dim is not None:
            batch["gene_labels"] = 2 * wave(SENTENCES, CELLS, config.gene_dim, start=177).abs()
        return batch

    @pytest.fixture(autouse=True)
    def _single_thread_and_seed(self):
        torch.manual_seed(0)

    def predict(self, model, batch):
        with torch.no_grad():
            outputs = model(**batch)
        return outputs.gene_predictions if model.is_ceiling else outputs.predictions

    # The model

    def test_golden_values(self):
        predictions = self.predict(self.model(), self.batch())
        assert predictions.shape[:2] == (SENTENCES, CELLS) and predictions.dtype == torch.float32
        np.testing.assert_allclose(predictions[0, 0, :4].numpy(), self.golden, rtol=1e-4, atol=1e-5)
        assert predictions.mean().item() == pytest.approx(self.golden_mean, rel=1e-4)

    def test_permuting_the_cells_permutes_the_predictions(self):
        model, batch = self.model(), self.batch()
        order = torch.tensor([3, 0, 4, 1, 2])
        per_cell = ("control_cells", "batch_ids", "labels", "gene_labels")
        permuted = {key: value[:, order] if key in per_cell else value for key, value in batch.items()}
        expected = self.predict(model, batch)[:, order]
        torch.testing.assert_close(self.predict(model, permuted), expected, atol=self.atol, rtol=1e-5)

    def test_padded_cells_change_nothing(self):
        model, batch = self.model(), self.batch()
        per_cell = ("control_cells", "batch_ids", "labels", "gene_labels")
        padded = {}
        for key, value in batch.items():
            if key in per_cell:
                extra = torch.full((SENTENCES, 2, *value.shape[2:]), 1 if key == "batch_ids" else 50, dtype=value.dtype)
                value = torch.cat((value, extra), dim=1)
            padded[key] = value
        padded["cell_mask"] = torch.arange(CELLS + 2).expand(SENTENCES, -1) < CELLS
        found, expected = self.predict(model, padded)[:, :CELLS], self.predict(model, batch)
        torch.testing.assert_close(found, expected, atol=self.atol, rtol=1e-5)

    def test_wrong_inputs_are_named(self):
        model, batch = self.model(), self.batch()
        with pytest.raises(TypeError, match="takes no input 'contex_ids'; did you mean 'context_ids'"):
            model(**batch, contex_ids=batch["context_ids"])
        with pytest.raises(ValueError, match=r"control_cells: expected shape \(batch_size, set_size, \d+\), found"):
            model(**{**batch, "control_cells": batch["control_cells"][..., :-1]})
        with pytest.raises(
            ValueError, match="expected one of perturbation_ids and perturbation_features, found neither"
        ):
            model(**{key: value for key, value in batch.items() if key != "perturbation_ids"})

    def test_a_saved_model_predicts_the_same_bits(self, tmp_path):
        model, batch = self.model(), self.batch()
        model.save_pretrained(tmp_path)
        again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        written = {"architectures", "custom_pipelines", "dtype", "_name_or_path"}  # what saving or loading adds
        assert {k: v for k, v in again.config.to_dict().items() if k not in written} == {
            k: v for k, v in model.config.to_dict().items() if k not in written
        }
        assert torch.equal(self.predict(again.eval(), batch), self.predict(model, batch))

    def test_nothing_is_allocated_on_the_meta_device(self):
        model, config = self.model(), self.config()
        with torch.device("meta"):
            empty = type(model)(config)
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
        # A tensor that is not in the state dict would stay without a value.
        filled = empty.to_empty(device="cpu").eval()
        filled.load_state_dict(model.state_dict())
        assert torch.equal(self.predict(filled, self.batch()), self.predict(model, self.batch()))

    def test_initialisation_reaches_every_weight(self):
        if not self.learns:
            return
        model = FAMILIES[self.model_type].model(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        for module in model.modules():
            module._is_hf_initialized = False
        for parameter in model.parameters():
            parameter._is_hf_initialized = False
        model.initialize_weights()
        assert [name for name, value in model.named_parameters() if not torch.isfinite(value).all()] == []

    def test_the_loss_is_finite_and_reaches_every_parameter(self):
        if not self.learns:
            return
        model, batch = self.model().train(), self.batch()
        batch["batch_ids"], batch["context_ids"] = batch["batch_ids"].clamp(min=0), batch["context_ids"].clamp(min=0)
        objective = objective_for(model.config).train()
        terms = objective(model(**batch), batch)
        assert all(torch.isfinite(value).all() and value.dim() == 0 for value in terms.values()), terms
        terms["loss"].backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_the_loss_of_the_first_sentences_is_that_of_these_sentences_alone(self):
        model, batch = self.model(), self.batch()
        objective = objective_for(model.config).eval()
        for number in (1, 2):
            first = {name: value[:number] for name, value in batch.items()}
            with torch.no_grad():
                whole, alone = model(**batch), model(**first)
                found, expected = objective(whole.first(number), first), objective(alone, first)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_published_sizes_can_be_built(self):
        sizes = {"input_dim": 2000, "num_perturbations": 25, "num_contexts": 7, "num_batches": 3}
        fields = {name: value for name, value in self.fields.items() if name in ("gene_dim",)}
        config = FAMILIES[self.model_type].config.from_preset("published", **{**sizes, **fields})
        with torch.device("meta"):
            model = FAMILIES[self.model_type].model(config)
        assert model.num_parameters() > 0

    # A run

    def run_yaml(self, screen, folder, **training) -> Path:
        content = {
            "data": {
                "datasets": {"screen": str(screen)},
                "batch_key": "batch",
                "test_contexts": ["type_3"],
                **self.data,
            },
            "model": {"model_type": self.model_type, "preset": "tiny", "set_size": 8, **self.model_section},
            "training": {
                "output_dir": str(folder / "run"),
                "max_steps": 6,
                "logging_steps": 1,
                "per_device_train_batch_size": 4,
                "save_strategy": "no",
                "disable_tqdm": True,
                "use_cpu": True,
                **training,
            },
        }
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    @pytest.fixture(scope="class")
    def run(self, screen, tmp_path_factory) -> tuple[Path, dict]:
        """The checkpoint that a run of `train.py` writes, and the figures of its test split."""
        folder = tmp_path_factory.mktemp("run")
        metrics = train.main([str(self.run_yaml(screen, folder))])
        return folder / "run", metrics

    def test_a_run_leaves_a_whole_checkpoint(self, run):
        folder, metrics = run
        names = {path.name for path in folder.iterdir()}
        code = (
            "checkpoint_files",
            "configuration_perturbation",
            "modeling_perturbation",
            "processing",
            "processor_files",
            "vocabulary",
        )
        code = {f"{module}.py" for module in code}
        needed = {"README.md", "config.json", "model.safetensors", "processor_config.json", "training_args.json"}
        assert needed | code <= names and not any(name.endswith((".bin", ".pt", ".pkl", ".partial")) for name in names)
        assert json.loads((folder / "config.json").read_text())["model_type"] == self.model_type
        for metric in ("mae", "energy"):
            assert np.isfinite(metrics[f"test_{metric}"]) and np.isfinite(metrics[f"test_no_change_{metric}"])
        card = ModelCard.load(folder / "README.md")
        about = FAMILIES[self.model_type].card
        assert self.model_type in card.text and about in card.text and len(about) > 200

    def test_a_run_moves_every_parameter(self, screen, run, tmp_path):
        by_cells = str(self.run_yaml(screen, tmp_path, max_steps=1, cells_per_batch=40))
        if not self.learns:
            with pytest.raises(
                ValueError, match=f"cells_per_batch=40: .* found {self.model_type}, which is fitted in one"
            ):
                train.main([by_cells])
            return
        train.main([by_cells])
        after, before = (load_file(f / "model.safetensors") for f in (run[0], tmp_path / "run"))
        trained = [name for name, p in AutoModel.from_pretrained(run[0]).named_parameters() if p.requires_grad]
        # Rows of names that the data do not hold stay as they are, but every tensor as a whole moves.
        assert [name for name in trained if torch.equal(before[name], after[name])] == []

    def test_auto_classes_give_it_back(self, run):
        folder, _ = run
        family = FAMILIES[self.model_type].model
        assert type(AutoConfig.from_pretrained(folder)) is family.config_class
        assert type(AutoModel.from_pretrained(folder)) is family
        assert type(AutoProcessor.from_pretrained(folder)) is StateProcessor

    def test_the_folder_is_enough_without_the_package(self, run, screen, tmp_path, alone):
        folder, _ = run
        script = textwrap.dedent(
            """
            import sys
            import anndata as ad, torch
            from transformers import AutoModel, AutoProcessor
            folder, screen, output = sys.argv[1:]
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            sentences = processor(ad.read_h5ad(screen), perturbation="pert_1", context=["type_0", "type_3"])
            if model.is_ceiling:
                sentences["labels"] = sentences["control_cells"]
            with torch.inference_mode():
                outputs = model(**sentences)
            processor.decode(outputs, sentences).write_h5ad(output)
            print(type(model).__module__)
            """
        )
        assert alone.run(script, folder, screen, tmp_path / "alone.h5ad").startswith("transformers_modules.")
        model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
        sentences = processor(ad.read_h5ad(screen), perturbation="pert_1", context=["type_0", "type_3"])
        if model.is_ceiling:
            sentences["labels"] = sentences["control_cells"]
        with torch.inference_mode():
            expected = processor.decode(model(**sentences), sentences)
        assert np.array_equal(ad.read_h5ad(tmp_path / "alone.h5ad").X, expected.X)

    def test_predict_and_evaluate_through_the_command_line(self, run, screen, tmp_path, capsys):
        folder, metrics = run
        out, scores = tmp_path / "predicted.h5ad", tmp_path / "scores.csv"
        flags = ["--context", "type_3", "--quiet"]
        words = ["predict", "--model", folder, "--adata", screen, "--output", out, *flags]
        assert pertstate.cli.main([str(word) for word in words]) == 0
        predicted = ad.read_h5ad(out)
        assert set(predicted.obs["perturbation"]) == {"pert_0", "pert_1", "pert_2"} and np.isfinite(predicted.X).all()
        words = ["evaluate", "--predicted", out, "--real", screen, "--train", screen, "--output", scores, "--quiet"]
        assert pertstate.cli.main([str(word) for word in words]) == 0
        table = pd.read_csv(scores)
        ceiling = FAMILIES[self.model_type].model.is_ceiling
        assert ("ceiling" in capsys.readouterr().err) is ceiling
        of_model = table[table["method"] == ("model (ceiling)" if ceiling else "model")]
        assert len(of_model) == 4 and np.isfinite(of_model[["mae", "energy"]].to_numpy()).all()
        # All figures stand beside those of the baselines.
        assert {"no change", "perturbation mean"} <= set(table["method"]) and set(METRICS) <= set(table.columns)
