"""Means of training groups, and the changes that follow from them."""

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pertstate.data.group_means import GroupMeans
from pertstate.data.group_sums import PSEUDOCOUNT, GroupSums, log_fold_change


GROUPS = pd.DataFrame(
    [
        ("d", "c", "A", 0, 10),
        ("d", "c", "control", 10, 20),
        ("d", "e", "A", 20, 25),
        ("d", "e", "B", 25, 30),
        ("d", "e", "control", 30, 40),
        ("d", "lonely", "A", 40, 45),
    ],
    columns=["dataset", "context", "perturbation", "start", "stop"],
)


def cells() -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.log1p(generator.poisson(generator.gamma(1, 2, (45, 1)), (45, 6))).astype(np.float32)


def means() -> GroupMeans:
    return GroupMeans.of_sums(GroupSums.of_cells(cells(), GROUPS, "control", log1p=True))


def test_groups_without_controls_have_no_mean():
    found = means()
    assert found.groups == [
        ("d", "c", "A"),
        ("d", "c", "control"),
        ("d", "e", "A"),
        ("d", "e", "B"),
        ("d", "e", "control"),
    ]
    assert found.counts.tolist() == [10, 10, 5, 5, 10]
    assert found.contexts_of("A") == [("d", "c"), ("d", "e")]


def test_changes_weigh_contexts_alike():
    x = cells().astype(np.float64)
    of_c, of_e = (x[a:b].mean(axis=0) - x[c:d].mean(axis=0) for a, b, c, d in ((0, 10, 10, 20), (20, 25, 30, 40)))
    found = means()
    np.testing.assert_allclose(found.changes()["A"], (of_c + of_e) / 2, atol=1e-6)
    np.testing.assert_allclose(found.change(("d", "e"), "A"), of_e, atol=1e-6)


def test_log_fold_changes_are_those_of_mean_expression():
    """If cells had one count on average and get one more, the fold is 2, whatever the logarithms of single cells are."""
    counts = np.expm1(cells().astype(np.float64))
    of_c, of_e = (
        np.log((counts[a:b].mean(axis=0) + PSEUDOCOUNT) / (counts[c:d].mean(axis=0) + PSEUDOCOUNT))
        for a, b, c, d in ((0, 10, 10, 20), (20, 25, 30, 40))
    )
    np.testing.assert_allclose(means().log_folds()["A"], (of_c + of_e) / 2, atol=1e-6)
    assert log_fold_change(np.array([2 - PSEUDOCOUNT]), np.array([1 - PSEUDOCOUNT])) == np.log(2)


def test_sparse_and_dense_cells_and_parts_give_the_same_sums():
    dense = GroupSums.of_cells(cells(), GROUPS, "control", log1p=True)
    sparse = GroupSums("control", expression={})
    matrix = sp.csr_matrix(cells())
    for *key, start, stop in GROUPS.itertuples(index=False):
        sparse.add(tuple(key), matrix[start:stop])
    parts = GroupSums.merged([GroupSums.of_cells(cells(), GROUPS, "control", part, 2, log1p=True) for part in range(2)])
    for key in dense.counts:
        np.testing.assert_allclose(sparse.expression[key], dense.expression[key], rtol=1e-6)
        np.testing.assert_array_equal(parts.expression[key], dense.expression[key])


def test_values_that_are_no_expression_have_no_fold_change():
    found = GroupMeans.of_sums(GroupSums.of_cells(cells(), GROUPS, "control"))
    assert found.expression is None and found.log_folds() == {}
    assert list(found.changes()) == ["A", "B"]


def test_two_trainings_know_the_groups_of_both():
    """A group that both have has the mean of all its cells."""
    values, first = cells(), GROUPS[GROUPS["context"] == "c"]
    parts = pd.DataFrame(
        [("d", "e", "A", 20, 22), ("d", "e", "A", 22, 25), ("d", "e", "B", 25, 30), ("d", "e", "ctrl", 30, 40)],
        columns=GROUPS.columns,
    )
    both = pd.concat([first, parts.iloc[1:]])
    one = GroupMeans.of_sums(GroupSums.of_cells(values, both.replace("ctrl", "control"), "control", log1p=True))
    other = GroupMeans.of_sums(GroupSums.of_cells(values, parts.drop(index=[1, 2]), "ctrl", log1p=True))
    found, expected = one.joined(other), means()
    assert one.is_like(other) and found.groups == expected.groups and found.control == "control"
    assert found.counts.tolist() == [10, 10, 5, 5, 20]  # the control cells of e are in both
    np.testing.assert_allclose(found.means, expected.means, rtol=1e-5)
    np.testing.assert_allclose(found.expression, expected.expression, rtol=1e-5)
    counts = GroupMeans.of_sums(GroupSums.of_cells(values, GROUPS, "control"))
    assert not one.is_like(counts) and not one.is_like(one.of_features(np.arange(3)))


def test_some_perturbations_alone_keep_their_controls():
    found = means().of(["B"])
    assert [key[2] for key in found.groups] == ["control", "B", "control"]
    np.testing.assert_array_equal(found.changes()["B"], means().changes()["B"])
