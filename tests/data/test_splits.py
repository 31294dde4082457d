"""What is trained on and what is held out: split files, and their assignment to cells."""

import re
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pertstate.data import Splits, load_cells, simulate_screen
from pertstate.data.arguments import DataArguments
from pertstate.data.splits import without_doses
from pertstate.processing import StateProcessor


CONTEXTS = ["type_0", "type_1", "type_2"]
PERTURBATIONS = ["pert_0", "pert_1", "pert_2", "pert_0+pert_1"]


def screen(seed=0) -> ad.AnnData:
    return simulate_screen(
        num_contexts=3, num_perturbations=3, num_genes=40, cells_per_group=6, combinations=[(0, 1)], seed=seed
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one screen in two files, and another one in one file."""
    folder = tmp_path_factory.mktemp("screens")
    (folder / "parts").mkdir()
    one = screen()
    first = (one.obs["cell_type"] == "type_0").to_numpy()
    one[first].write_h5ad(folder / "parts" / "a.h5ad")
    one[~first].write_h5ad(folder / "parts" / "b.h5ad")
    other = screen(seed=1)
    other.obs["cell_type"] = other.obs["cell_type"].cat.rename_categories({"type_2": "CD4.T"})
    other.write_h5ad(folder / "other.h5ad")
    return folder


def toml(tmp_path, text: str):
    path = tmp_path / "splits.toml"
    path.write_text(text, encoding="utf-8")
    return path


# The file


def test_the_published_format(files, tmp_path):
    path = toml(
        tmp_path,
        f"""
        [datasets]
        folder = "{files}/parts"
        glob = "{files}/oth*.h5ad"

        [training]
        folder = "train"
        glob = "train"

        [zeroshot]
        "folder.type_2" = "test"
        "glob.CD4.T" = "val"

        [fewshot."folder.type_0"]
        val = ["pert_1"]
        test = ["pert_0", "pert_0+pert_1"]
        """,
    )
    splits = Splits.from_toml(path)
    assert splits.datasets == {
        "folder": [files / "parts" / "a.h5ad", files / "parts" / "b.h5ad"],
        "glob": [files / "other.h5ad"],
    }
    assert splits.training == {"folder", "glob"}
    assert splits.zeroshot == {("folder", "type_2"): "test", ("glob", "CD4.T"): "val"}
    assert splits.fewshot == {("folder", "type_0"): {"val": ["pert_1"], "test": ["pert_0", "pert_0+pert_1"]}}


def test_the_longest_dataset_name_is_the_dataset(files, tmp_path):
    head = f'[datasets]\nlab = "{files}/other.h5ad"\n"lab.a" = "{files}/parts"\n[training]\nlab = "train"\n'
    splits = Splits.from_toml(toml(tmp_path, head + '[zeroshot]\n"lab.a.x" = "test"\n"lab.b.c" = "val"'))
    assert splits.zeroshot == {("lab.a", "x"): "test", ("lab", "b.c"): "val"}


@pytest.mark.parametrize(
    "body, message",
    [
        ('[zeroshot]\n"one.type_0" = "tset"', "[zeroshot] 'one.type_0' = 'tset': expected 'val' or 'test'"),
        ('[zeroshot]\n"two.type_0" = "test"', "'two.type_0' should be \"dataset.context\", in quotes"),
        ('[zeroshot]\none.type_0 = "test"', "'one' should be \"dataset.context\", in quotes"),
        ('[fewshot.one.type_0]\nval = ["pert_0"]', "'one' should be \"dataset.context\", in quotes"),
        ('[fewshot."one.type_0"]\ndev = ["pert_0"]', "has 'dev': expected 'val' and 'test'"),
        ('[fewshot."one.type_0"]\nval = "pert_0"', "val = 'pert_0': expected a list of perturbation names"),
        ('[fewshot]\n"one.type_0" = "test"', 'expected a section [fewshot."dataset.context"]'),
        (
            '[fewshot."one.type_0"]\nval = ["pert_0", "pert_1"]\ntest = ["pert_1"]',
            "['pert_1'] are in val and test; a pair has one split",
        ),
        (
            '[zeroshot]\n"one.type_0" = "test"\n[fewshot."one.type_0"]\nval = ["pert_0"]',
            "'one.type_0' stands in [zeroshot] and [fewshot]",
        ),
        ('[zero_shot]\n"one.type_0" = "test"', "unknown section [zero_shot]; did you mean 'zeroshot'"),
        ('[zeroshot]\n"one.type_0" = "val"\n"one.type_0" = "test"', "is not valid TOML"),
    ],
)
def test_files_that_contradict_themselves(files, tmp_path, body, message):
    path = toml(tmp_path, f'[datasets]\none = "{files}/parts"\n[training]\none = "train"\n{body}')
    with pytest.raises(ValueError, match=re.escape(message)):
        Splits.from_toml(path)


@pytest.mark.parametrize(
    "text, error, message",
    [
        ('[training]\none = "train"', ValueError, "no [datasets] section"),
        ('[datasets]\none = "{files}/gone.h5ad"', FileNotFoundError, "gone.h5ad: no such file"),
        ('[datasets]\none = "{files}/parts"', ValueError, "[training] names no dataset; expected some of ['one']"),
        ('[datasets]\none = "{files}/parts"\n[training]\non = "train"', ValueError, "[training] names dataset 'on'"),
        ('[datasets]\none = "{files}/parts"\n[training]\none = "test"', ValueError, "one = 'test': expected 'train'"),
        ('training = ["one"]\n[datasets]\none = "{files}/parts"', ValueError, "[training] should hold `name = value`"),
        (
            '[datasets]\none = "{files}/parts"\ntwo = "{files}/*/a.h5ad"\n[training]\none = "train"',
            ValueError,
            "is in 'one' and in 'two'; name each file once",
        ),
        ("[datasets", ValueError, "is not valid TOML"),
    ],
)
def test_files_that_are_not_right(files, tmp_path, text, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Splits.from_toml(toml(tmp_path, text.replace("{files}", str(files))))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.toml: no such TOML file"):
        Splits.from_toml(tmp_path / "gone.toml")


# Assignment


def splits_of(files, **held) -> Splits:
    return Splits({"one": [files / "parts" / "a.h5ad", files / "parts" / "b.h5ad"]}, {"one"}, **held)


def test_every_cell_gets_the_split_of_its_pair(files):
    splits = splits_of(
        files,
        zeroshot={("one", "type_2"): "test"},
        fewshot={("one", "type_1"): {"val": ["pert_1"], "test": ["pert_0+pert_1"]}},
    )
    cells, processor = load_cells(splits, batch_key="batch")
    obs = cells.obs
    expected = [
        "control"
        if p == "control"
        else "test"
        if c == "type_2" or (c, p) == ("type_1", "pert_0+pert_1")
        else "val"
        if (c, p) == ("type_1", "pert_1")
        else "train"
        for c, p in zip(obs["context"], obs["perturbation"])
    ]
    assert obs["split"].tolist() == expected
    whole = screen()
    first = np.argsort(whole.obs["cell_type"] != "type_0", kind="stable")  # as the two files have them
    labels = whole.obs.iloc[first].astype(str)
    order = first[np.lexsort([labels["batch"], labels["perturbation"], labels["cell_type"]])]  # stable, batch last
    for name, key in (("context", "cell_type"), ("perturbation", "perturbation"), ("batch", "batch")):
        assert obs[name].tolist() == whole.obs[key].iloc[order].tolist()
    np.testing.assert_array_equal(cells.features, processor.features(whole[order].copy()))
    assert (obs["dataset"] == "one").all()
    pairs = obs[obs["split"] != "control"].groupby(["dataset", "context", "perturbation"], observed=True)["split"]
    assert (pairs.nunique() == 1).all()


def test_the_processor_knows_training_contexts_alone(files):
    _, processor = load_cells(splits_of(files, zeroshot={("one", "type_2"): "test"}))
    assert processor.vocabulary.contexts == ["type_0", "type_1"]
    assert processor.vocabulary.perturbations == ["pert_0", "pert_1", "pert_2"]


@pytest.mark.parametrize(
    "held, message",
    [
        ({"zeroshot": {("one", "type_5"): "test"}}, "[zeroshot] names context 'type_5' of 'one', which is not there"),
        ({"fewshot": {("one", "type_0"): {"test": ["control"]}}}, "[fewshot] holds out 'control'"),
        ({"zeroshot": {("one", c): "test" for c in CONTEXTS}}, "hold out fewer contexts or perturbations"),
        ({"zeroshot": {("two", "type_0"): "test"}}, "[zeroshot] names dataset 'two'"),
    ],
)
def test_what_is_named_must_exist(files, held, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_cells(splits_of(files, **held))


def test_a_perturbation_without_training_cells_cannot_be_held_out(files):
    held = {("one", c): {"test": ["pert_2"]} for c in CONTEXTS}
    with pytest.raises(ValueError, match=r"1 perturbation held out for test without a training cell .*\['pert_2'\]"):
        load_cells(splits_of(files, fewshot=held))
    # The double may be held out, because both singles are trained on.
    held = {("one", c): {"val": ["pert_0+pert_1"]} for c in CONTEXTS}
    cells, _ = load_cells(splits_of(files, fewshot=held))
    assert set(cells.obs.loc[cells.obs["split"] == "val", "perturbation"]) == {"pert_0+pert_1"}
    # The singles may be held out, if the double is trained on.
    held = {("one", c): {"test": ["pert_0"]} for c in CONTEXTS}
    load_cells(splits_of(files, fewshot=held))


def test_several_datasets(files):
    splits = Splits(
        {"one": [files / "parts" / "a.h5ad"], "other": [files / "other.h5ad"]},
        {"one"},
        {("other", "CD4.T"): "test"},
    )
    cells, processor = load_cells(splits)
    obs = cells.obs
    assert set(obs["dataset"]) == {"one", "other"}
    perturbed = obs[obs["split"] != "control"]
    found = perturbed.groupby(["dataset", "context"], observed=True)["split"].unique().map(list).to_dict()
    assert found == {
        ("one", "type_0"): ["train"],
        ("other", "type_0"): ["unused"],
        ("other", "type_1"): ["unused"],
        ("other", "CD4.T"): ["test"],
    }
    assert processor.vocabulary.contexts == ["type_0"]


def test_the_same_context_in_two_datasets_is_two(files):
    splits = Splits(
        {"one": [files / "parts" / "a.h5ad"], "other": [files / "other.h5ad"]},
        {"one", "other"},
        {("other", "type_0"): "test"},
    )
    obs = load_cells(splits)[0].obs
    here = (obs["context"] == "type_0") & (obs["perturbation"] == "pert_0")
    assert set(obs.loc[here & (obs["dataset"] == "one"), "split"]) == {"train"}
    assert set(obs.loc[here & (obs["dataset"] == "other"), "split"]) == {"test"}


def test_contexts_can_be_chosen(files):
    cells, processor = load_cells(splits_of(files), contexts=["type_0", "type_2"])
    assert set(cells.obs["context"]) == {"type_0", "type_2"} == set(processor.vocabulary.contexts)
    with pytest.raises(ValueError, match="contexts names 'type_7', which is not in the data; did you mean"):
        load_cells(splits_of(files), contexts=["type_0", "type_7"])


def test_an_existing_processor_keeps_its_genes_and_learns_names(files):
    _, processor = load_cells(splits_of(files, zeroshot={("one", "type_1"): "val"}), genes=["gene_3", "gene_1"])
    known = processor.vocabulary
    cells, wider = load_cells(splits_of(files, zeroshot={("one", "type_2"): "val"}), processor=processor)
    assert cells.features.shape[1] == 2 and wider.vocabulary.genes == ["gene_3", "gene_1"]
    # New names are those of training cells only, and they come after the old ones.
    assert "type_1" not in known.contexts
    assert wider.vocabulary.contexts == [*known.contexts, "type_1"]
    assert wider.vocabulary.perturbations[: len(known.perturbations)] == known.perturbations


def test_highly_variable_genes_come_from_training_cells_alone(tmp_path):
    def genes(adata, **options):
        adata.write_h5ad(tmp_path / "screen.h5ad")
        splits = Splits(
            {"one": [tmp_path / "screen.h5ad"]},
            {"one"},
            zeroshot={("one", "type_2"): "test"},
            fewshot={("one", "type_1"): {"val": ["pert_1"], "test": ["pert_0"]}},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_cells(splits, genes=10, **options)[1].vocabulary.genes

    plain, wild = screen(), screen()
    obs = wild.obs
    held = (obs["cell_type"] == "type_2") | (
        (obs["cell_type"] == "type_1") & obs["perturbation"].isin(["pert_0", "pert_1"])
    )
    # Held-out cells, the controls of the held-out context among them: some genes switched off, others at random.
    counts = wild.X.toarray()
    noise = np.random.default_rng(0).poisson(50, (held.sum(), counts.shape[1])) * (np.arange(counts.shape[1]) % 3 == 0)
    counts[held.to_numpy()] = noise
    wild.X = type(wild.X)(counts)

    assert genes(wild) == genes(plain)
    assert len(genes(plain)) == 10
    assert genes(wild, hvg_on_all=True) != genes(plain, hvg_on_all=True)


def test_normalisation_uses_nothing_of_other_cells(files):
    with_held, _ = load_cells(splits_of(files, zeroshot={("one", "type_2"): "test"}))
    without, _ = load_cells(splits_of(files), contexts=["type_0", "type_1"])
    kept = (with_held.obs["context"] != "type_2").to_numpy()
    np.testing.assert_array_equal(with_held.features[kept], without.features)


def test_expression_beside_an_embedding_is_loaded(tmp_path):
    adata = screen()
    adata.obsm["X_emb"] = np.random.default_rng(0).normal(size=(adata.n_obs, 4)).astype(np.float32)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    splits = Splits({"one": [tmp_path / "screen.h5ad"]}, {"one"})
    cells, processor = load_cells(splits, input="obsm/X_emb", gene_input="X")
    labels = adata.obs.astype(str)
    order = np.lexsort([labels["perturbation"], labels["cell_type"]])
    np.testing.assert_array_equal(cells.features, adata.obsm["X_emb"][order])
    np.testing.assert_array_equal(cells.genes, StateProcessor.fit(adata).features(adata)[order])
    assert load_cells(splits, input="obsm/X_emb")[0].genes is None


# The simple fields of a run


def test_held_out_contexts_and_perturbations(files):
    data = DataArguments(
        datasets={"one": f"{files}/parts", "other": f"{files}/other.h5ad"},
        test_contexts="type_1",
        val_contexts=["CD4.T"],
        test_perturbations=["pert_0+pert_1"],
    )
    splits = data.resolve_splits()
    assert splits.training == {"one", "other"}
    assert splits.zeroshot == {("one", "type_1"): "test", ("other", "type_1"): "test", ("other", "CD4.T"): "val"}
    held = {"test": ["pert_0+pert_1"], "val": []}
    assert splits.fewshot == {("one", "type_0"): held, ("one", "type_2"): held, ("other", "type_0"): held}
    splits.assign({(d, c): PERTURBATIONS for d in ("one", "other") for c in [*CONTEXTS, "CD4.T"]})


def test_nothing_held_out(files):
    data = DataArguments(datasets=f"{files}/other.h5ad")
    splits = data.resolve_splits()
    assert splits == Splits({"other": [files / "other.h5ad"]}, {"other"})
    assert set(load_cells(splits)[0].obs["split"]) == {"train", "control"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"test_contexts": ["type_8"]}, "data: held-out context 'type_8' is not in the data; did you mean 'type_"),
        ({"val_perturbations": ["pert9"]}, "data: held-out perturbation 'pert9' is not in the data; did you mean"),
        ({"test_contexts": ["type_1"], "contexts": ["type_0"]}, "held-out context 'type_1' is not in the data"),
        (
            {"test_contexts": ["type_1"], "val_contexts": ["type_1"]},
            "data: ['type_1'] are in val_contexts and test_contexts; a pair has one split",
        ),
        ({"test_perturbations": ["pert_1"], "val_perturbations": ["pert_1"]}, "are in val_perturbations and test_"),
        ({"splits": "a.toml"}, "set one of `splits` (a TOML file) and `datasets` (files), found both"),
        ({"datasets": None}, "found neither"),
        ({"datasets": None, "splits": "a.toml", "test_contexts": ["x"]}, "with a `splits` file, say there"),
        ({"hvg_on_all": "maybe"}, "data.hvg_on_all: expected bool, found 'maybe'"),
        ({"test_contexts": False}, "data.test_contexts: expected list, found False; put a name that looks like"),
        ({"test_contexts": [["type_0"]]}, "data.test_contexts: expected list"),
        ({"control": None}, "data.control: expected str | list | dict, found None"),
        ({"genes": 2.5}, "data.genes: expected int | list | 'auto' | None, found 2.5"),
        ({"genes": True}, "data.genes: expected int | list | 'auto' | None, found True"),
    ],
)
def test_data_sections_that_cannot_be(files, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(**{"datasets": f"{files}/parts", **options}).resolve_splits()


def test_names_that_are_numbers(files):
    data = DataArguments(datasets="x", control=0, test_perturbations=[1, "2"], contexts=7, genes=[3, "g"])
    assert (data.control, data.test_perturbations, data.contexts, data.genes) == ("0", ["1", "2"], ["7"], ["3", "g"])
    assert DataArguments(datasets="x", genes=5).genes == 5


@pytest.mark.parametrize("twin", ["pert_1+pert_0", "pert_0+pert_1+control", "control+pert_1 + pert_0"])
def test_one_perturbation_under_two_names_is_one_group(tmp_path, twin):
    adata = simulate_screen(num_contexts=1, num_perturbations=2, num_genes=20, cells_per_group=6, combinations=[(0, 1)])
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str)
    adata.copy().write_h5ad(tmp_path / "one.h5ad")
    adata.obs.iloc[-3:, adata.obs.columns.get_loc("perturbation")] = twin
    adata.write_h5ad(tmp_path / "two.h5ad")
    held = {"fewshot": {("screen", "type_0"): {"test": [twin]}}}
    (one, of_one), (two, of_two) = (
        load_cells(Splits({"screen": [tmp_path / f"{name}.h5ad"]}, {"screen"}, **held)) for name in ("one", "two")
    )
    pd.testing.assert_frame_equal(one.groups, two.groups)
    assert two.groups.set_index("perturbation").loc["pert_0+pert_1", "split"] == "test"
    assert np.array_equal(one.features, two.features) and of_one.vocabulary == of_two.vocabulary


@pytest.mark.parametrize(
    "name, bare",
    [
        ("A@0.1", "A"),
        ("C@1+D@10", "C+D"),
        ("A@1e-05|B@2.5e+16", "A|B"),
        ("drug@home", "drug@home"),
        ("A@1b", "A@1b"),
        ("A", "A"),
    ],
)
def test_a_name_without_its_doses(name, bare):
    assert without_doses(name) == bare


def test_a_name_stands_for_all_its_doses_before_they_are_known():
    splits = Splits({"s": []}, {"s"}, perturbations={"C+D": "test", "A@1": "val"}, dosed=True)
    assert splits.split_of("s", "k562", "C@0.1+D@1") == "test"
    assert splits.split_of("s", "k562", "A@1") == "val" and splits.split_of("s", "k562", "A@10") == "train"
    assert splits.assign({("s", "k562"): ["A@1", "C@2+D@2", "C@1"]})["s", "k562", "C@1"] == "train"
    plain = Splits({"s": []}, {"s"}, perturbations={"A": "test"})
    assert plain.split_of("s", "k562", "A@1") == "train"
