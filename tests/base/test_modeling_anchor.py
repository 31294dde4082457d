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
    anchor = Anchor(3, GENES, **{"contexts": 0, "expression": True, "by_features": False, **options})
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


def with_controls(contexts: int = 4) -> Anchor:
    anchor = filled(contexts=contexts)
    generator = np.random.default_rng(3)
    anchor.set(
        control_expression=generator.gamma(1.0, 2.0, size=(contexts, GENES)),
        control_counts=np.array([50.0, 0.0, 20.0, 200.0]),
        control_variation=generator.gamma(2.0, 1.0, size=GENES),
    )
    return anchor


def expected_correction(anchor: Anchor, expression: np.ndarray, count: int, context: int) -> np.ndarray:
    """Gene by gene, as the formula is written."""
    table, counts = anchor.control_expression.numpy().astype(float), anchor.control_counts.numpy()
    others = [c for c in range(len(counts)) if counts[c] > 0 and c != context]
    if not others:
        return np.zeros(GENES)
    found = []
    for gene in range(GENES):
        variation = float(anchor.control_variation[gene])
        logs = [np.log(table[c, gene] + 0.01) for c in others] + [np.log(expression[gene] + 0.01)]
        errors = [variation / counts[c] for c in others] + [variation / count]
        between = max(0.0, np.var(logs, ddof=1) - np.mean(errors))
        pooled = np.log(np.mean([table[c, gene] for c in others]) + 0.01)
        found.append(errors[-1] / (errors[-1] + between) * (pooled - logs[-1]))
    return np.array(found)


@pytest.mark.parametrize("context", [-1, 0, 3])
def test_the_correction_is_that_of_the_formula(context):
    anchor = with_controls()
    expression = np.random.default_rng(4).gamma(1.0, 2.0, size=GENES)
    found = anchor.correction(
        torch.tensor(expression, dtype=torch.float32)[None], torch.tensor([30]), torch.tensor([context])
    )
    np.testing.assert_allclose(found[0], expected_correction(anchor, expression, 30, context), rtol=1e-4, atol=1e-5)


def test_many_cells_are_believed_and_few_are_not():
    anchor = with_controls()
    anchor.set(control_expression=np.full((4, GENES), 2.0), control_counts=np.full(4, 1e6))
    expression = torch.full((2, GENES), 2.02)
    few, many = anchor.correction(expression, torch.tensor([5, 10**9]), torch.tensor([-1, -1]))
    torch.testing.assert_close(few, torch.log(torch.full((GENES,), 2.01 / 2.03)), rtol=1e-3, atol=1e-6)
    assert many.abs().max() < 1e-4


def test_a_gene_that_differs_by_more_than_its_noise_is_left_as_it_is():
    anchor = with_controls()
    anchor.set(control_expression=np.full((4, GENES), 2.0), control_variation=np.full(GENES, 1e-4))
    found = anchor.correction(torch.full((1, GENES), 9.0), torch.tensor([1000]), torch.tensor([-1]))
    assert found.abs().max() < 1e-3


def test_there_is_no_correction_without_another_context():
    anchor = with_controls()
    anchor.set(control_counts=np.array([0.0, 0.0, 20.0, 0.0]))
    expression, count = torch.rand(1, GENES), torch.tensor([9])
    assert torch.equal(anchor.correction(expression, count, torch.tensor([2])), torch.zeros(1, GENES))
    assert anchor.correction(expression, count, torch.tensor([-1])).abs().max() > 0


def test_the_correction_multiplies_what_is_predicted_of_perturbed_cells_alone():
    anchor, x = with_controls(), cells()
    expression = torch.rand(2, GENES, generator=torch.Generator().manual_seed(2)) * 4
    given = {
        "context_ids": torch.tensor([0, -1]),
        "control_expression": expression,
        "control_counts": torch.tensor([30, 40]),
    }
    ids = torch.tensor([[1], [-1]])
    plain, corrected = anchor(x, ids), anchor(x, ids, **given)
    factor = anchor.correction(expression, given["control_counts"], given["context_ids"])[0].exp()
    torch.testing.assert_close(corrected[0].expm1(), plain[0].expm1() * factor)
    torch.testing.assert_close(corrected[1], x[1])
