"""The anchor against its formula, and a State model that starts from it."""

import numpy as np
import pytest
import torch

from pertstate import StateForPerturbation
from pertstate.base.modeling_anchor import Anchor
from pertstate.base.vocabulary import Vocabulary
from pertstate.configuration_state import StateConfig


GENES = 7


def filled(**options) -> Anchor:
    anchor = Anchor(3, GENES, **{"expression": True, "by_features": False, **options})
    generator = np.random.default_rng(0)
    anchor.set(**{name: generator.normal(size=table.shape) for name, table in anchor.named_buffers()})
    return anchor


def cells(seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 5, GENES, generator=torch.Generator().manual_seed(seed)) * 3


def expected(x: torch.Tensor, change: torch.Tensor, log_fold: torch.Tensor) -> torch.Tensor:
    added, multiplied = (x + change).clamp(min=0), torch.log1p(torch.expm1(x) * torch.exp(log_fold))
    return 0.5 * added + 0.5 * multiplied


def test_expression_is_changed_by_half_a_sum_and_half_a_product():
    anchor, x = filled(), cells()
    ids, doses = torch.tensor([[0, 2], [1, -1]]), torch.tensor([[1.0, 0.5], [2.0, 1.0]])
    change, fold = anchor.change, anchor.log_fold
    wanted = torch.stack(
        [
            expected(x[0], change[0] + change[2] / 2, fold[0] + fold[2] / 2),
            expected(x[1], 2 * change[1], 2 * fold[1]),
        ]
    )
    torch.testing.assert_close(anchor(x, ids, doses), wanted)
    torch.testing.assert_close(anchor(x, torch.full((2, 1), -1)), x)


def test_an_embedding_is_changed_by_a_sum_alone():
    anchor, x = filled(expression=False), cells() - 2
    assert anchor.tables == ("change",)
    torch.testing.assert_close(
        anchor(x, torch.tensor([[1], [-1]])), x + torch.stack([anchor.change[1], torch.zeros(GENES)])[:, None]
    )


def test_features_give_a_linear_change_and_the_control_none():
    anchor, x = filled(by_features=True), cells()
    features = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    change = features[0] @ anchor.change + anchor.shared_change
    fold = features[0] @ anchor.log_fold + anchor.shared_log_fold
    torch.testing.assert_close(anchor(x, perturbation_features=features)[0], expected(x[0], change, fold))
    torch.testing.assert_close(anchor(x, perturbation_features=features)[1], x[1])
    of_cells = features[:, None].expand(-1, 5, -1)
    torch.testing.assert_close(anchor(x, perturbation_features=of_cells), anchor(x, perturbation_features=features))


def test_a_multi_hot_vector_is_the_same_as_ids():
    anchor, x = filled(), cells()
    multi_hot = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(anchor(x, perturbation_features=multi_hot), anchor(x, torch.tensor([[0, 2], [1, -1]])))


def test_a_fold_change_beyond_reach_stays_finite():
    anchor = filled()
    anchor.set(log_fold=np.full((3, GENES), 50.0))
    assert anchor(cells(), torch.tensor([[0, 1], [2, -1]]), torch.full((2, 2), 40.0)).isfinite().all()


def test_tables_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"change: expected shape \(3, 7\), found \(2, 7\)"):
        filled().set(change=np.zeros((2, GENES)))


def config(**options) -> StateConfig:
    fields = {"input_dim": GENES, "num_perturbations": 3, "residual": "anchor", "hidden_dropout": 0.0, **options}
    return StateConfig.from_preset("tiny", **fields)


def test_a_new_model_predicts_its_anchor_exactly_and_saves_it(tmp_path):
    model = StateForPerturbation(config()).eval()
    x, ids = cells(), torch.tensor([[0], [2]])
    torch.testing.assert_close(model(x, ids).predictions, x)  # it knows of no change yet
    model.anchor.load_state_dict(filled().state_dict())
    torch.testing.assert_close(model(x, ids).predictions, filled()(x, ids))
    model.save_pretrained(tmp_path)
    again = StateForPerturbation.from_pretrained(tmp_path)
    assert torch.equal(again(x, ids).predictions, model(x, ids).predictions)
    # What training cells show is no weight: no optimiser moves it.
    assert not [name for name, _ in again.named_parameters() if name.startswith("anchor")]


def test_predictions_are_a_function_of_sets():
    torch.manual_seed(0)
    model = StateForPerturbation(config()).eval()
    torch.nn.init.normal_(model.output_head.layers[-1].weight)
    model.anchor.load_state_dict(filled().state_dict())
    x, ids, order = cells(), torch.tensor([[0], [2]]), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(x[:, order], ids).predictions, model(x, ids).predictions[:, order])


def test_half_precision_weights_keep_the_anchor_in_single_precision_sums():
    model = StateForPerturbation(config()).to(torch.bfloat16).eval()
    model.anchor.load_state_dict(filled().state_dict())
    x, ids = cells().to(torch.bfloat16), torch.tensor([[0], [2]])
    torch.testing.assert_close(model(x, ids).predictions.float(), filled()(x, ids), atol=0.03, rtol=0.03)


def test_rows_follow_the_names_of_perturbations_and_columns_those_of_genes():
    genes = [f"g{i}" for i in range(GENES)]
    model = StateForPerturbation(config()).eval()
    model.anchor.load_state_dict(filled().state_dict())
    x, before = cells(), filled()
    old = Vocabulary(genes=genes, perturbations=["a", "b", "c"])
    new = Vocabulary(genes=genes[::-1], perturbations=["c", "new", "a"])
    model.resize_vocabulary(old, new)
    moved = model(x.flip(-1), torch.tensor([[0], [2]])).predictions
    torch.testing.assert_close(moved.flip(-1), before(x, torch.tensor([[2], [0]])))
    # A perturbation that was not there does what the others do on average.
    torch.testing.assert_close(model.anchor.change[1].flip(-1), before.change.mean(dim=0))


def test_the_anchor_adds_to_control_cells_and_needs_their_features():
    with pytest.raises(ValueError, match="residual='anchor' adds to or compares with the control cell"):
        config(output_dim=4)
