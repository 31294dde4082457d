"""Training groups that a run holds out for validation by itself."""

import pandas as pd

from pertstate.data.cells import assign_splits
from pertstate.data.splits import Splits
from pertstate.processing import StateProcessor
from pertstate.training.validation import with_validation


READER = StateProcessor()


def groups_of(pairs: dict[str, list[str]], cells: int = 10) -> pd.DataFrame:
    rows = [("screen", context, name) for context, names in pairs.items() for name in ["control", *names]]
    table = pd.DataFrame(rows, columns=["dataset", "context", "perturbation"])
    return table.assign(start=range(0, cells * len(rows), cells), stop=range(cells, cells * len(rows) + 1, cells))


def held(splits: Splits, groups: pd.DataFrame, split: str = "val") -> list[tuple[str, str]]:
    table = assign_splits(groups, splits, "control")
    table = table[table["split"] == split]
    return list(table[["context", "perturbation"]].itertuples(index=False, name=None))


def test_a_context_is_held_out_as_the_test_context_is():
    groups = groups_of({context: ["A", "B"] for context in ("c1", "c2", "c3")})
    splits, words = with_validation(
        Splits({"screen": []}, {"screen"}, zeroshot={("screen", "c3"): "test"}), groups, READER
    )
    assert held(splits, groups) == [("c2", "A"), ("c2", "B")]
    assert held(splits, groups, "test") == [("c3", "A"), ("c3", "B")]
    assert splits.zeroshot == {("screen", "c3"): "test", ("screen", "c2"): "val"}
    assert words == "validation: auto: 2 training groups held out: ['c2 / A', 'c2 / B']"


def test_every_perturbation_stays_in_a_training_group():
    # `B` is in one training context alone, which is the one that is held out.
    groups = groups_of({"c1": ["A"], "c2": ["A", "B"], "c3": ["A"], "c4": ["A"]})
    splits, _ = with_validation(Splits({"screen": []}, {"screen"}, zeroshot={("screen", "c4"): "test"}), groups, READER)
    assert ("c2", "B") in held(splits, groups, "train")
    everything = {name for _, name in held(splits, groups, "train")}
    assert everything == {"A", "B"} and held(splits, groups)


def test_perturbations_are_held_out_as_the_test_perturbations_are():
    names = [f"P{i}" for i in range(10)]
    groups = groups_of({"c1": names, "c2": names})
    test = {("screen", "c1"): {"test": ["P0", "P1"]}}
    splits, _ = with_validation(Splits({"screen": []}, {"screen"}, fewshot=test), groups, READER)
    found = held(splits, groups)
    # A fifth of those of which another context keeps one.
    assert len(found) == 4 and not {"P0", "P1"} & {name for _, name in found}
    assert held(splits, groups, "test") == [("c1", "P0"), ("c1", "P1")]
    assert len({name for _, name in held(splits, groups, "train")}) == 10


def test_validation_groups_that_are_named_stay_and_none_are_invented():
    groups = groups_of({"c1": ["A"], "c2": ["A"]})
    named = Splits({"screen": []}, {"screen"}, zeroshot={("screen", "c2"): "val"})
    assert with_validation(named, groups, READER) == (
        named,
        "validation: auto: the groups of split 'val' are there already",
    )
    alone = groups_of({"c1": ["A", "B"], "c2": ["A", "B"]})
    of_test = Splits({"screen": []}, {"screen"}, zeroshot={("screen", "c2"): "test"})
    splits, words = with_validation(of_test, alone, READER)
    assert splits == of_test
    assert words == (
        "validation: auto: no training groups can be held out as the test groups are; the last step is kept"
    )
