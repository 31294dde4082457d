"""Sentences: every perturbed cell once, controls that match, new draws each epoch, padding that says so."""

import numpy as np
import pandas as pd
import pytest
import torch

from pertstate.data import Cells, SentenceCollator, SentenceDataset
from pertstate.data.cells import sort_into_groups
from pertstate.processing import StateProcessor, Vocabulary


# (dataset, context, perturbation, batch): cells
TRAIN = {
    ("a", "T", "P", "b0"): 11,
    ("a", "T", "P", "b1"): 6,
    ("a", "T", "Q", "b0"): 3,
    ("a", "B", "P", "b1"): 9,
    ("c", "T", "Q", "b1"): 4,
}
CONTROLS = {
    ("a", "T", "control", "b0"): 10,
    ("a", "T", "control", "b1"): 7,
    ("a", "B", "control", "b1"): 5,
    ("c", "T", "control", "b1"): 12,
    ("a", "NK", "control", "b0"): 8,  # a held-out context
}
TEST = {("a", "NK", "P", "b0"): 13, ("a", "NK", "P+Q", "b0"): 2, ("a", "T", "P+Q", "b0"): 1}


def cells(with_batches=True, with_genes=False, leave_out=()) -> Cells:
    rows = [
        (*key, split)
        for groups, split in ((TRAIN, "train"), (CONTROLS, "control"), (TEST, "test"))
        for key, n in groups.items()
        if key not in leave_out
        for _ in range(n)
    ]
    obs = pd.DataFrame(rows, columns=["dataset", "context", "perturbation", "batch", "split"])
    if not with_batches:
        obs = obs.drop(columns="batch")
    _, groups = sort_into_groups(obs.drop(columns="split"))
    split_of = {key[:3]: split for *key, split in map(tuple, rows) for key in [tuple(key)]}
    groups["split"] = [split_of[key] for key in zip(groups["dataset"], groups["context"], groups["perturbation"])]
    # The features of a cell are its row number, so that what comes out says which cell it was.
    features = np.repeat(np.arange(len(obs), dtype=np.float32)[:, None], 2, axis=1)
    return Cells(features, features[:, :1] + 0.5 if with_genes else None, groups)


def processor(batches=True) -> StateProcessor:
    vocabulary = Vocabulary(["g0", "g1"], ["P", "Q"], ["B", "T"], ["b0", "b1"] if batches else [])
    return StateProcessor(vocabulary, batch_key="batch" if batches else None)


def dataset(split="train", set_size=4, **options) -> SentenceDataset:
    return SentenceDataset(cells(), processor(), split, set_size, **options)


def sentences(data: SentenceDataset) -> list[tuple[list[int], list[int]]]:
    """Rows of the perturbed and the control cells of each sentence, as their features say."""
    return [(s["labels"][:, 0].astype(int).tolist(), s["control_cells"][:, 0].astype(int).tolist()) for s in data]


def test_the_collator_says_where_the_cells_are_where_much_is_padding():
    sizes = (4, 1, 3)
    sentences = [{"control_cells": np.ones((n, 2)), "perturbation_ids": np.array([1])} for n in sizes]
    batch = SentenceCollator(places=True)(sentences)
    assert batch["cell_places"].tolist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert batch["cell_mask"].flatten()[batch["cell_places"]].all()
    assert "cell_places" not in SentenceCollator()(sentences)
    assert "cell_places" not in SentenceCollator(places=True)(sentences[:1] * 7 + sentences[2:])


@pytest.mark.parametrize("set_size", [1, 4, 5, 64])
@pytest.mark.parametrize("control_matching", ["context", "batch"])
def test_every_perturbed_cell_stands_once_in_an_epoch(set_size, control_matching):
    data = dataset(set_size=set_size, control_matching=control_matching)
    obs = data.cells.obs
    for epoch in range(3):
        data.set_epoch(epoch)
        targets = [row for sentence, _ in sentences(data) for row in sentence]
        used = obs.iloc[targets]["split"].value_counts()
        assert used["train"] == sum(TRAIN.values()) and used["control"] == sum(CONTROLS.values())
        assert len(set(targets)) == len(targets)


@pytest.mark.parametrize("control_matching", ["context", "batch"])
@pytest.mark.parametrize("small_groups", ["pad", "repeat"])
def test_controls_match_and_are_drawn_without_replacement(control_matching, small_groups):
    data = dataset(control_matching=control_matching, small_groups=small_groups, set_size=6)
    obs = data.cells.obs
    by = ["dataset", "context"] + (["batch"] if control_matching == "batch" else [])
    seen = set()
    for i, (targets, controls) in enumerate(sentences(data)):
        index, *_ = data.rows(i)
        assert len(targets) == len(controls)
        assert len(obs.iloc[targets][[*by, "perturbation"]].drop_duplicates()) == 1
        assert (obs.iloc[controls]["split"] == "control").all()
        expected = obs.iloc[targets[:1]][by].to_numpy()
        assert (obs.iloc[controls][by].to_numpy() == expected).all()
        pool = len(data.groups[index].controls)
        assert len(set(controls)) == min(len(controls), pool)
        seen.update(controls)
    assert len(seen) > 0.8 * sum(CONTROLS.values())  # draws reach the whole pool


def test_with_context_matching_controls_come_from_every_batch():
    data = dataset(control_sentences=False)
    obs = data.cells.obs
    both = [
        set(obs.iloc[controls]["batch"])
        for targets, controls in sentences(data)
        if obs.iloc[targets[0]][["dataset", "context"]].tolist() == ["a", "T"]
    ]
    assert {"b0", "b1"} in both


@pytest.mark.parametrize("split", ["train", "test"])
def test_ids_are_those_of_the_sentence(split):
    data = dataset(split, set_size=5)
    obs, vocabulary = data.cells.obs, data.processor.vocabulary
    ids = {"P": [0], "Q": [1], "control": [-1]} if split == "train" else {"P": [0, -1], "P+Q": [0, 1]}
    for i in range(len(data)):
        index, targets, controls = data.rows(i)
        sentence = data[i]
        perturbation = obs.iloc[targets[0]]["perturbation"]
        assert sentence["perturbation_ids"].tolist() == ids[perturbation]
        context = obs.iloc[targets[0]]["context"]
        assert sentence["context_ids"] == {"B": 0, "T": 1, "NK": -1}[context]
        assert [vocabulary.batches[b] for b in sentence["batch_ids"]] == obs.iloc[controls]["batch"].tolist()
        assert data.groups[index].perturbation == perturbation and data.groups[index].context == context


def test_gene_labels_belong_to_the_perturbed_cells():
    data = SentenceDataset(cells(with_genes=True), processor(), "train", 4)
    for sentence in data:
        np.testing.assert_array_equal(sentence["gene_labels"], sentence["labels"][:, :1] + 0.5)
    assert "gene_labels" not in dataset()[0]


def test_batches_are_optional():
    data = SentenceDataset(cells(with_batches=False), processor(batches=False), "train", 4)
    assert "batch_ids" not in data[0]
    with pytest.raises(ValueError, match="control_matching='batch' needs batch_key"):
        SentenceDataset(cells(with_batches=False), processor(batches=False), "train", 4, control_matching="batch")


# Draws


def test_the_seed_and_the_epoch_decide_the_draw():
    one, same, other = dataset(seed=1), dataset(seed=1), dataset(seed=2)
    first = sentences(one)
    assert sentences(one) == first == sentences(same)
    assert sentences(other) != first
    one.set_epoch(1)
    second = sentences(one)
    assert second != first
    assert [t for t, _ in second] != [t for t, _ in first] and [c for _, c in second] != [c for _, c in first]
    one.set_epoch(0)
    assert sentences(one) == first
    # In any order, as the workers of a loader ask.
    backwards = [one[i]["control_cells"][:, 0].tolist() for i in reversed(range(len(one)))]
    assert backwards[::-1] == [c for _, c in first]


def test_sentences_are_shuffled_between_groups():
    data = dataset()
    order = [data.rows(i)[0] for i in range(len(data))]
    assert order != sorted(order)
    unshuffled = dataset(shuffle=False)
    order = [unshuffled.rows(i)[0] for i in range(len(unshuffled))]
    assert order == sorted(order)


# Sizes


def test_sizes_of_a_group_differ_by_one_at_most():
    data = dataset(set_size=5, control_sentences=False)
    sizes: dict[int, list[int]] = {}
    for i in range(len(data)):
        index, targets, _ = data.rows(i)
        sizes.setdefault(index, []).append(len(targets))
    named = {(data.groups[i].dataset, data.groups[i].context, data.groups[i].perturbation): s for i, s in sizes.items()}
    assert {key: sorted(s) for key, s in named.items()} == {
        ("a", "T", "P"): [4, 4, 4, 5],
        ("a", "T", "Q"): [3],
        ("a", "B", "P"): [4, 5],
        ("c", "T", "Q"): [4],
    }


def test_a_sentence_is_no_longer_than_its_controls():
    # Five controls in a / B: nine cells stand in two sentences.
    data = dataset(set_size=64, control_sentences=False)
    sizes = [len(t) for t, _ in sentences(data)]
    assert sorted(sizes) == [3, 4, 4, 5, 17]


@pytest.mark.parametrize("set_size", [5, 64])
def test_repeat_fills_every_training_sentence(set_size):
    data = dataset(set_size=set_size, small_groups="repeat")
    obs = data.cells.obs
    targets = set()
    for sentence, controls in sentences(data):
        assert len(sentence) == len(controls) == set_size
        assert len(obs.iloc[sentence][["dataset", "context", "perturbation"]].drop_duplicates()) == 1
        targets.update(sentence)
    assert len(targets) == sum(TRAIN.values()) + sum(CONTROLS.values())
    assert "cell_mask" not in SentenceCollator()([data[i] for i in range(len(data))])


@pytest.mark.parametrize("small_groups", ["pad", "repeat"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_evaluation_uses_every_cell_exactly_once(small_groups, shuffle):
    data = dataset("test", set_size=6, small_groups=small_groups, shuffle=shuffle)
    targets = [row for sentence, _ in sentences(data) for row in sentence]
    expected = np.flatnonzero(data.cells.obs["split"] == "test")
    assert sorted(targets) == expected.tolist()
    assert all(group.perturbation != "control" for group in data.groups)


@pytest.mark.parametrize("multiple_of", [1, 4, 8])
def test_an_epoch_holds_whole_steps(multiple_of):
    data = dataset(set_size=4, multiple_of=multiple_of)
    everything = len(dataset(set_size=4))
    assert len(data) == everything // multiple_of * multiple_of
    left_out = []
    for epoch in range(2):
        data.set_epoch(epoch)
        assert len(data) == everything // multiple_of * multiple_of
        targets = [row for sentence, _ in sentences(data) for row in sentence]
        assert len(set(targets)) == len(targets)
        left_out.append(set(np.flatnonzero(data.cells.obs["split"].isin(["train", "control"]))) - set(targets))
    assert multiple_of == 1 or left_out[0] != left_out[1]


def test_a_step_takes_all_sentences_where_there_are_fewer(caplog):
    data = dataset(multiple_of=1000)
    assert len(data) == len(dataset())
    said = f"train: the data make {len(data)} sentences of up to 4 cells, fewer than the 1000 of one optimiser step: each step takes"
    assert said in caplog.text


# Control sentences


@pytest.mark.parametrize("control_matching", ["context", "batch"])
def test_control_sentences_are_an_option(control_matching):
    def contexts(**options):
        data = dataset(control_matching=control_matching, **options)
        return {(g.dataset, g.context, g.batch) for g in data.groups if g.perturbation == "control"}

    trained = {("a", "T", None), ("a", "B", None), ("c", "T", None)}
    heldout = {("a", "NK", None)}
    if control_matching == "batch":
        trained = {("a", "T", "b0"), ("a", "T", "b1"), ("a", "B", "b1"), ("c", "T", "b1")}
        heldout = {("a", "NK", "b0")}
    assert contexts() == trained | heldout
    assert contexts(heldout_controls=False) == trained
    assert contexts(control_sentences=False) == set()


def test_control_sentences_map_controls_to_controls_of_their_context():
    data = dataset()
    obs = data.cells.obs
    for i, (targets, controls) in enumerate(sentences(data)):
        group = data.groups[data.rows(i)[0]]
        if group.perturbation == "control":
            assert (obs.iloc[targets]["split"] == "control").all()
            assert set(obs.iloc[targets]["context"]) == set(obs.iloc[controls]["context"]) == {group.context}
            assert (data[i]["perturbation_ids"] == -1).all()


def test_no_held_out_cell_is_trained_on():
    data = dataset()
    for epoch in range(3):
        data.set_epoch(epoch)
        used = {row for sentence in sentences(data) for part in sentence for row in part}
        assert not used & set(np.flatnonzero(data.cells.obs["split"] == "test"))
    without = dataset(heldout_controls=False)
    used = {row for sentence in sentences(without) for part in sentence for row in part}
    assert "NK" not in set(without.cells.obs.iloc[sorted(used)]["context"])


# What is refused


def test_groups_without_controls_are_named():
    one = cells(leave_out=[("c", "T", "control", "b1")])
    with pytest.raises(
        ValueError, match=r"1 group .* without control cells of their dataset and context: \['c / T / Q'\]"
    ):
        SentenceDataset(one, processor(), "train", 4)
    one = cells(leave_out=[("a", "T", "control", "b1")])
    SentenceDataset(one, processor(), "train", 4)


def test_without_controls_of_its_batch_a_cell_gets_those_of_its_context(caplog):
    one = cells(leave_out=[("a", "T", "control", "b1")])
    data = SentenceDataset(one, processor(), "train", 4, control_matching="batch", control_sentences=False)
    assert data.num_without_batch_controls == 6
    assert "train: 6 perturbed cells have no controls of their batch" in caplog.text
    obs, fallen_back = one.obs, 0
    for targets, controls in sentences(data):
        label = obs.iloc[targets[0]]
        where = ["dataset", "context"]
        assert (obs.iloc[controls][where].to_numpy() == label[where].to_numpy()).all()
        own = label["batch"] == "b0" or label[where].tolist() != ["a", "T"]
        assert set(obs.iloc[controls]["batch"]) == {label["batch"] if own else "b0"}
        fallen_back += 0 if own else len(targets)
    assert fallen_back == 6
    caplog.clear()
    assert dataset(control_matching="batch").num_without_batch_controls == 0 and not caplog.text


@pytest.mark.parametrize("sentences_per_group", ["proportional", "equal", "capped"])
def test_weights_of_groups(sentences_per_group):
    cap = 2 if sentences_per_group == "capped" else None
    data = dataset(set_size=3, sentences_per_group=sentences_per_group, sentence_cap=cap)
    sizes = np.array([len(group.rows) for group in data.groups])
    natural = -(-sizes // 3)
    seen = [set() for _ in sizes]
    for epoch in range(12):
        data.set_epoch(epoch)
        drawn = [data.rows(i) for i in range(len(data))]
        found = np.bincount([index for index, _, _ in drawn], minlength=len(sizes))
        if sentences_per_group == "proportional":
            assert found.tolist() == natural.tolist()
        elif sentences_per_group == "equal":
            assert found.tolist() == [-(-natural.sum() // len(sizes))] * len(sizes)
        else:
            assert found.tolist() == np.minimum(natural, 2).tolist()
        for index, targets, _ in drawn:
            assert len(set(targets)) == len(targets) <= 3 and set(targets) <= set(data.groups[index].rows)
            seen[index].update(targets)
        if sentences_per_group != "equal":
            targets = np.concatenate([targets for _, targets, _ in drawn])
            assert len(set(targets)) == len(targets)  # no cell twice in an epoch
    assert [len(rows) for rows in seen] == sizes.tolist()  # over the epochs, every cell


def test_weights_are_for_training_alone():
    data = dataset("test", sentences_per_group="capped", sentence_cap=1, set_size=2)
    assert sum(len(data.rows(i)[1]) for i in range(len(data))) == sum(TEST.values())
    for options in ({"sentence_cap": 2}, {"sentences_per_group": "capped"}):
        with pytest.raises(ValueError, match="sentence_cap, a whole number from 1, belongs to sentences_per_group"):
            dataset(**options)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_batch_read_at_once_is_the_collated_sentences(size):
    data = SentenceDataset(cells(with_genes=True), processor(), "train", 4)
    indices = list(range(5, 5 + size))
    at_once, one_by_one = data.__getitems__(indices), SentenceCollator()([data[i] for i in indices])
    assert list(at_once) == list(one_by_one)
    for key, value in one_by_one.items():
        assert at_once[key].dtype == value.dtype and torch.equal(at_once[key], value), key
    assert SentenceCollator()(at_once) == dict(at_once)


def test_splits_without_cells():
    with pytest.raises(ValueError, match="split 'val' has no cells"):
        dataset("val")


def test_options_are_checked():
    with pytest.raises(ValueError, match="control_matching='batches'; did you mean 'batch'"):
        dataset(control_matching="batches")
    with pytest.raises(ValueError, match="small_groups='padd'; did you mean 'pad'"):
        dataset(small_groups="padd")


def test_perturbations_that_the_processor_does_not_know():
    narrow = StateProcessor(Vocabulary(["g0", "g1"], ["P"], ["T"], ["b0", "b1"]), batch_key="batch")
    with pytest.raises(KeyError, match="perturbation 'Q' is unknown to this model"):
        SentenceDataset(cells(), narrow, "train", 4)


# Collating


def test_short_sentences_are_padded_with_a_mask():
    data = SentenceDataset(cells(with_genes=True), processor(), "test", 5, shuffle=False)
    chosen = [data[i] for i in range(len(data))]
    batch = SentenceCollator()(chosen)
    sizes = [len(s["labels"]) for s in chosen]
    assert len(set(sizes)) > 1
    assert batch["cell_mask"].dtype == torch.bool and batch["cell_mask"].sum(dim=1).tolist() == sizes
    for key in ("control_cells", "labels", "gene_labels", "batch_ids"):
        assert batch[key].shape[:2] == (len(chosen), max(sizes))
        assert (batch[key][~batch["cell_mask"]] == 0).all()
        for row, sentence in zip(batch[key], chosen):
            np.testing.assert_array_equal(row[: len(sentence[key])], sentence[key])
    np.testing.assert_array_equal(batch["perturbation_ids"], np.stack([s["perturbation_ids"] for s in chosen]))
    np.testing.assert_array_equal(batch["context_ids"], [s["context_ids"] for s in chosen])


def test_sentences_of_one_size_need_no_mask():
    data = dataset(set_size=4)
    whole = [data[i] for i in range(len(data)) if len(data.rows(i)[1]) == 4]
    batch = SentenceCollator()(whole)
    assert "cell_mask" not in batch
    assert batch["control_cells"].dtype == torch.float32 and batch["perturbation_ids"].dtype == torch.int64
