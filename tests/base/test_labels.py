"""Labels, parsed once and canonically."""

import numpy as np
import pandas as pd
import pytest

from pertstate.base.labels import (
    LabelReader,
    LabelSettings,
    alike,
    control_settings,
    looks_like_control,
    suggested_controls,
)


def reader(control="control", **settings) -> LabelReader:
    return LabelReader(LabelSettings(**control_settings(control), **settings))


@pytest.mark.parametrize(
    "label, name",
    [
        ("A", "A"),
        (" A ", "A"),
        ("A+ctrl", "A"),
        ("ctrl+A", "A"),
        ("ctrl", "ctrl"),
        ("ctrl+ctrl", "ctrl"),
        ("B+A", "A+B"),
        ("A + B", "A+B"),
        ("C+A+B", "A+B+C"),
        ("A+A", "A+A"),
        ("(+)-JQ1", "(+)-JQ1"),
        ("(+)-JQ1+A", "(+)-JQ1+A"),
        ("CD4+", "CD4+"),
        ("+", "+"),
        ("A++B", "A++B"),
        ("H2O[1+2]", "H2O[1+2]"),
        ("naïve/β|γ", "naïve/β|γ"),
    ],
)
def test_canonical_names(label, name):
    assert reader("ctrl").canonical(label) == name
    assert reader("ctrl").canonical(name) == name  # a canonical name is its own


def test_any_separator_or_none():
    assert reader(combination_separator="_").canonical("B_A") == "A_B"
    assert reader(combination_separator=" & ").canonical("B & A") == "A & B"
    assert reader(combination_separator=None).canonical("B+A") == "B+A"


def test_controls_by_name_pattern_list_and_dataset():
    several = reader(["non-targeting*", "DMSO"])
    assert {several.canonical(label) for label in ("non-targeting_0042", "DMSO", "non-targeting+DMSO")} == {
        "non-targeting"
    }
    assert several.canonical("A+DMSO") == "A"
    each = reader({"spring": "NT*", "autumn": ["DMSO"]})
    assert each.canonical("NT-1", "spring") == each.canonical("DMSO", "autumn") == "NT"
    assert each.canonical("DMSO", "spring") == "DMSO"
    with pytest.raises(ValueError, match="perturbation 'NT' is called 'NT', as the controls are"):
        each.canonical("NT", "autumn")


@pytest.mark.parametrize("control", [[], {}, {"a": []}, [1], {"a": [None]}])
def test_controls_that_say_nothing_are_refused(control):
    with pytest.raises(ValueError, match="expected a name, a pattern such as 'non-targeting\\*', or a list of them"):
        control_settings(control)


def test_guides_become_genes_before_and_after_the_separator():
    table = {"*_g1": "*", "*_g2": "*", "sgSTAT1.7": "STAT1", "*_nt": "control"}
    mapped = reader(perturbation_map=table)
    assert mapped.canonical("STAT1_g2") == mapped.canonical("sgSTAT1.7") == "STAT1"
    assert mapped.canonical("STAT1_g1+IRF1_g2") == "IRF1+STAT1"
    assert mapped.canonical("x_nt") == "control" and mapped.canonical("IRF1_g1+x_nt") == "IRF1"
    whole = reader(perturbation_map={"pair_*+other": "*"})
    assert whole.canonical("pair_7+other") == "7"
    assert mapped.canonical("_g1") == "_g1"  # the star stands for something


def table(**columns) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    return frame.set_axis([f"c{i}" for i in range(len(frame))])


def test_labels_may_be_numbers_truth_values_and_anything_printable():
    obs = table(perturbation=[1, 2, 1], cell_type=[True, False, True], plate=[0.5, 1.0, 0.5])
    found = reader("1", batch_key="plate").read(obs)
    assert found["perturbation"].tolist() == ["1", "2", "1"]
    assert found["context"].tolist() == ["True", "False", "True"] and found["batch"].tolist() == ["0.5", "1", "0.5"]


def test_a_label_is_the_same_however_it_is_stored():
    """Whole numbers become fractions beside a cell without one; texts have spaces around them."""
    of_batches = reader(batch_key="plate")
    obs = table(perturbation=["A ", " control"], cell_type=["K562", "K562 "], plate=[7, 8])
    plain = of_batches.read(obs)
    assert plain.to_dict("list") == {
        "perturbation": ["A", "control"],
        "context": ["K562", "K562"],
        "batch": ["7", "8"],
    }
    for kind in ("float64", "float32", "Int64", "category"):
        assert of_batches.read(obs.assign(plate=obs["plate"].astype(kind))).equals(plain)
    assert of_batches.read(obs.assign(plate=pd.Categorical([7.0, 8.0]))).equals(plain)


@pytest.mark.parametrize("kind", ["float32", "category of float32", "category", str])
def test_a_dose_is_the_same_in_single_precision(kind):
    obs = table(perturbation=["A", "A", "control"], cell_type=["x"] * 3, dose=[0.1, 0.3, np.nan])
    single = obs["dose"].astype("float32" if "32" in str(kind) else "float64")
    obs["dose"] = single.astype("category") if "category" in str(kind) else single.astype(kind)
    assert reader(dose_key="dose").read(obs)["perturbation"].tolist() == ["A@0.1", "A@0.3", "control"]


def test_a_dose_with_its_unit_is_an_error_that_says_so():
    obs = table(perturbation=["A", "control"], cell_type=["x"] * 2, dose=["10 nM", ""])
    with pytest.raises(ValueError, match=r"holds '10 nM' for 'A'; expected a number above 0, without its unit"):
        reader(dose_key="dose").read(obs)
    dosed = reader(dose_key="dose")
    assert dosed.canonical("A", dose=1.0) == "A@1"
    with pytest.raises(ValueError, match="holds True for 'A'"):
        dosed.canonical("A", dose=True)


def test_only_a_star_stands_for_other_text():
    """A bracket or a question mark is part of a name: the T of TP53 is none of the letters of a set."""
    several = reader(["[NT]*", "NT?*"])
    assert [label for label in ("[NT]_1", "NT?_1", "TP53", "NT_1") if several.is_control(label)] == ["[NT]_1", "NT?_1"]
    assert reader("*a*\n").is_control("xay\n")
    of = {"a*a": ("aa", "aba"), "*": ("",), "a*b*c": ("abc", "axbxc", "abbcc"), "*b": ("b", "ab")}
    for pattern, labels in of.items():
        assert all(reader(pattern).is_control(label) for label in labels)
    for pattern, label in (("a*a", "a"), ("a*b*c", "acb"), ("a*b*c", "abd"), ("*b", "ba"), ("a*bc*c", "abc")):
        assert not reader(pattern).is_control(label)
    assert not reader("*a" * 40 + "*b").is_control("a" * 5000)


@pytest.mark.parametrize("missing", [None, np.nan, "nan", "NA", "None", "", "  ", "unassigned", "<NA>"])
def test_cells_without_a_label_are_an_error_or_left_out(missing):
    obs = table(perturbation=["A", missing, "control"], cell_type=["k562"] * 3)
    with pytest.raises(
        ValueError, match=r"obs\['perturbation'\] .* in 1 cell, first in 'c1'; label them, or set unlabelled: drop"
    ):
        reader().read(obs)
    found = reader(unlabelled="drop").read(obs)
    assert found["perturbation"].tolist() == ["A", None, "control"]
    assert found["context"].tolist() == ["k562", None, "k562"]


def test_a_word_for_missing_may_be_the_control():
    obs = table(perturbation=["None", "A"], cell_type=["k562"] * 2)
    assert reader("None").read(obs)["perturbation"].tolist() == ["None", "A"]


def test_contexts_of_several_columns_and_of_none():
    obs = table(perturbation=["A", "B"], line=["K562", "RPE1"], donor=[1, 2])
    assert reader(context_key=["line", "donor"]).read(obs)["context"].tolist() == ["K562|1", "RPE1|2"]
    assert reader(context_key=None, context="K562").read(obs)["context"].tolist() == ["K562"] * 2
    for settings in ({"context_key": None}, {"context": "K562"}):
        with pytest.raises(ValueError, match="set one of context_key"):
            reader(**settings)


def test_cells_are_chosen_by_other_columns():
    obs = table(perturbation=list("ABCD"), cell_type=["k"] * 4, qc=["ok", "fail", "ok", None], day=[1, 1, 2, 2])
    assert reader(exclude={"qc": ["fail", None]}).read(obs)["perturbation"].tolist() == ["A", None, "C", None]
    assert reader(include={"day": ["2"]}).read(obs)["perturbation"].tolist() == [None, None, "C", "D"]
    assert reader(include={"day": [2]}, exclude={"qc": ["ok"]}).read(obs)["perturbation"].tolist() == [None] * 3 + ["D"]
    with pytest.raises(KeyError, match="obs has no column 'days' .*did you mean 'day'.*with include or exclude"):
        reader(include={"days": [1]}).read(obs)
    named = r"'line' \(context\), found \['perturbation', 'cell_type', 'qc', 'day'\]; name the column with context_key, or the one"
    with pytest.raises(KeyError, match=named):
        reader(context_key="line").read(obs)


def test_a_label_is_parsed_once():
    """It is parsed once, however many cells have the label."""
    parsed = []

    class Counting(LabelReader):
        def _parse(self, label, dataset, dose):
            parsed.append((label, dose))
            return super()._parse(label, dataset, dose)

    r = np.random.default_rng(0)
    names = np.array(["control", *(f"g{i}+g{i + 1}" for i in range(50))], dtype=object)[r.integers(0, 51, 100_000)]
    obs = pd.DataFrame({"perturbation": names, "cell_type": "k", "dose": r.choice([0.1, 1.0], 100_000)})
    counting = Counting(LabelSettings(dose_key="dose"))
    for start in range(0, len(obs), 20_000):
        counting.read(obs.iloc[start : start + 20_000])
    assert len(parsed) == len(set(parsed)) == 51 * 2


def test_what_looks_like_a_control():
    for label in (
        "non-targeting",
        "NT",
        "ntc_3",
        "DMSO",
        "DMSO_TF",
        "ctrl",
        "Vehicle",
        "neg_ctrl",
        "safe-targeting",
        "PBS",
    ):
        assert looks_like_control(label), label
    for label in ("NTRK1", "CTRL1A", "DMSOX", "PBSA", "A"):
        assert not looks_like_control(label), label
    assert suggested_controls(["A", "NT"]) == "NT" and suggested_controls(["A"]) is None
    assert suggested_controls(["A", "NT", "ctrl"]) == ["NT", "ctrl"]
    assert suggested_controls([f"non-targeting_{i}" for i in range(9)]) == "non-targeting*"


def test_a_suggested_pattern_fits_controls_alone():
    controls = [f"NT-{i}" for i in range(5)]
    assert suggested_controls([*controls, "A"]) == "NT*"
    assert suggested_controls([*controls, "NTRK1"]) == controls  # "NT*" would make a gene a control
    assert suggested_controls(["control ", "A"]) == "control"


def test_values_of_filters_that_no_cell_has_are_said():
    obs = table(perturbation=["A", "control"], cell_type=["x"] * 2, qc=["fail", "ok"], plate=[1.0, 2.0])
    chosen = reader(exclude={"qc": ["Fail", "ok"], "plate": [1, "3"]})
    assert chosen.read(obs)["perturbation"].tolist() == [None, None]
    assert chosen.unmet() == [
        "exclude: no cell has 'Fail' in obs['qc']; did you mean 'fail'?",
        "exclude: no cell has '3' in obs['plate']; expected one of '1.0', '2.0'",
    ]
    chosen.read(obs.assign(qc="Fail", plate=3))  # a further file has them
    assert chosen.unmet() == []


def test_names_that_are_written_almost_alike():
    assert alike(["K562", "k562", "RPE1", "nai\u0308ve B", "na\u00efve B", "naive B"]) == [
        ["K562", "k562"],
        ["nai\u0308ve B", "na\u00efve B"],
    ]
