"""A simulated screen, and trainers of a small model on it."""

import torch

from pertstate import StateForPerturbation
from pertstate.configuration_state import StateConfig
from pertstate.data import SentenceDataset, Splits, load_cells, simulate_screen
from pertstate.training import StateTrainer, StateTrainingArguments


def simulated_cells(folder):
    """Cells of a simulated screen in four contexts, one for validation and one for a test, and their processor."""
    path = folder / "screen.h5ad"
    simulate_screen(num_contexts=4, num_perturbations=3, num_genes=60, cells_per_group=24, seed=1).write_h5ad(path)
    splits = Splits({"screen": [path]}, {"screen"}, {("screen", "type_2"): "val", ("screen", "type_3"): "test"})
    return load_cells(splits)


def make_trainer(screen, tmp_path, multiple_of=1, config=None, **arguments):
    cells, processor = screen
    fields = {"input_dim": processor.feature_dim, "num_perturbations": 3, "hidden_dropout": 0.0, **(config or {})}
    torch.manual_seed(0)
    model = StateForPerturbation(StateConfig.from_preset("tiny", **fields))
    train = SentenceDataset(cells, processor, "train", 12, multiple_of=multiple_of)
    val = SentenceDataset(cells, processor, "val", 12, shuffle=False)
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 6,
        **arguments,
    }
    return StateTrainer(model, StateTrainingArguments(**settings), train, val, processing_class=processor)
