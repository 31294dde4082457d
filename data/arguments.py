"""What a run says of its data: the sections `data`, `stream` and `prepare`."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anndata as ad
import pandas as pd

from pertstate.base.bounded_text import read_text
from pertstate.base.constants import Split
from pertstate.base.gene_names import MAX_MISSING_GENES
from pertstate.base.labels import control_settings
from pertstate.base.messages import closest
from pertstate.base.processor_files import DEFAULTS, READING
from pertstate.base.vocabulary import PerturbationFeatures
from pertstate.data.coexpression import COEXPRESSION
from pertstate.data.options import as_declared
from pertstate.data.perturbation_features import read_perturbation_features
from pertstate.data.reading import expand_paths
from pertstate.data.source import FileSource
from pertstate.data.splits import Splits, meant
from pertstate.processing import StateProcessor


if TYPE_CHECKING:
    from pertstate.data.manifest import Manifest


AUTO = "auto"
# Of more genes than that, so many highly variable ones are chosen where a run leaves it open.
MOST_GENES, AUTO_GENES = 5_000, 2_000


@dataclass
class DataArguments:
    """
    The `data` section.

    Args:
        store (`str`, *optional*): cell store, made by `pertstate prepare` of these data: a folder, or the name of a data set
            on the Hub. It is read instead of the files, which need not be there then.
        splits (`str`, *optional*): TOML file with the tables datasets, training, zeroshot and fewshot. The next five fields
            do the same for simple cases.
        datasets (`dict[str, str]` or `str`, *optional*): the file, folder or glob of each dataset by its name, or one file,
            folder or glob.
        test_contexts, val_contexts (`list[str]`): contexts held out whole, in every dataset that has them.
        test_perturbations, val_perturbations (`list[str]`): perturbations held out in every remaining context.
        validation (`str`): which training groups are held out to choose the best step, where nothing above holds any out.

            - `"none"`: none
            - `"auto"`: groups that are as new to the remaining ones as the test groups are, see [`with_validation`]
        contexts (`list[str]`, *optional*): use only these contexts of the files.
        control (`str`, `list[str]` or `dict`): the label of control cells, or a list of labels; a label may be a pattern such
            as `non-targeting*`. A dictionary gives each dataset its own.
        perturbation_key, context_key, context, batch_key, perturbation_map, unlabelled, exclude, include, dose_key,
            combination_separator: see [`LabelSettings`].
        dose_encoding: see [`StateProcessor`].
        genes (`int`, `list[str]`, `"auto"` or None): the model's genes: this many highly variable ones, the ones listed, or
            all; `"auto"`: the 2,000 most variable of more than 5,000.
        input, normalize, gene_input, target_sum: see [`StateProcessor.fit`].
        gene_key (`str`, *optional*): column of var with the names of genes, instead of the index of var.
        ignore_gene_versions (`bool`): leave out the versions of Ensembl ids (`ENSG00000000003.15`).
        duplicate_genes (`str`): genes that stand twice are an `"error"`, or the `"first"` column of each is read, or their `"sum"`
            (of log1p values: before the logarithm).
        max_missing_genes (`float`): the largest share of a file's genes that other files may lack.
        convert_scale (`bool`): convert log1p values of files whose cells sum to another total than those of the first one.
        perturbation_features (`str`, *optional*): file with a vector for each perturbation, used instead of ids so that
            unseen perturbations can be predicted, see [`read_perturbation_features`]; or `"coexpression"`: vectors of the
            perturbed genes from the control cells of the run, see [`coexpression_features`].
        genes_file (`str`, *optional*): file with the names of the genes, one on a line, instead of `genes`.
        hvg_on_all (`bool`): choose highly variable genes on all cells, held-out ones too (only to repeat published figures).
        control_matching, small_groups, control_sentences, heldout_controls, controls_only, sentences_per_group,
            sentence_cap: see [`SentenceDataset`].

    Raises:
        ValueError: a value does not fit the type of its field, or fields contradict one another.
    """

    store: str | None = None
    splits: str | None = None
    datasets: dict[str, str] | str | None = None
    test_contexts: list[str] = field(default_factory=list)
    val_contexts: list[str] = field(default_factory=list)
    test_perturbations: list[str] = field(default_factory=list)
    val_perturbations: list[str] = field(default_factory=list)
    validation: Literal["none", "auto"] = "none"
    contexts: list[str] | None = None
    perturbation_key: str = "perturbation"
    control: str | list[str] | dict[str, Any] = "control"
    context_key: str | list[str] | None = "cell_type"
    context: str | None = None
    batch_key: str | list[str] | None = None
    perturbation_map: dict[str, str] | None = None
    unlabelled: Literal["error", "drop"] = "error"
    exclude: dict[str, Any] | None = None
    include: dict[str, Any] | None = None
    dose_key: str | None = None
    dose_encoding: Literal["log", "linear"] = "log"
    input: str = "X"
    genes: int | list[str] | Literal["auto"] | None = None
    normalize: Literal["auto", "counts_to_log1p", "none"] = "auto"
    combination_separator: str | None = "+"
    gene_input: str | None = None
    gene_key: str | None = None
    ignore_gene_versions: bool = False
    duplicate_genes: Literal["error", "first", "sum"] = "error"
    max_missing_genes: float = MAX_MISSING_GENES
    convert_scale: bool = False
    target_sum: float | Literal["median"] | None = None
    perturbation_features: str | None = None
    genes_file: str | None = None
    hvg_on_all: bool = False
    control_matching: Literal["context", "batch"] = "context"
    small_groups: Literal["pad", "repeat"] = "pad"
    control_sentences: bool = True
    heldout_controls: bool = True
    controls_only: bool = False
    sentences_per_group: Literal["proportional", "equal", "capped"] = "proportional"
    sentence_cap: int | None = None

    def __post_init__(self):
        simple = ("test_contexts", "val_contexts", "test_perturbations", "val_perturbations")
        _check_types(self, "data")
        if self.splits is not None and self.datasets is not None:
            raise ValueError("data: set one of `splits` (a TOML file) and `datasets` (files), found both")
        if self.splits is not None and any(getattr(self, name) for name in simple):
            raise ValueError(f"data: with a `splits` file, say there what is held out, not in {list(simple)}")
        if self.genes is not None and self.genes_file is not None:
            raise ValueError("data: set one of `genes` and `genes_file`, found both")
        if self.controls_only and not (self.control_sentences and self.heldout_controls):
            raise ValueError(
                "data: controls_only=true trains on the control cells of all contexts, so control_sentences and "
                "heldout_controls must be true; say with contexts: which to use"
            )
        for kind in ("contexts", "perturbations"):
            both = set(getattr(self, f"test_{kind}")) & set(getattr(self, f"val_{kind}"))
            if both:
                raise ValueError(f"data: {sorted(both)} are in val_{kind} and test_{kind}; a pair has one split")

    @property
    def reading(self) -> dict[str, Any]:
        """The settings of a processor that say how labels and values are found in files."""
        own = {name: getattr(self, name) for name in READING if name not in _FOUND}
        own |= control_settings(self.control)
        for name in ("exclude", "include"):
            own[name] = own[name] and {key: of if isinstance(of, list) else [of] for key, of in own[name].items()}
        return own | ({} if self.context is None else {"context_key": None})

    def reader(self) -> StateProcessor:
        """A processor that reads files as the section says, and knows nothing else yet but perturbation features."""
        return StateProcessor(**self.reading, dose_encoding=self.dose_encoding, perturbation_features=self.features())

    def features(self) -> PerturbationFeatures | None:
        """The vectors of the perturbations, where the section names a file of them."""
        return (
            None
            if self.perturbation_features in (None, COEXPRESSION)
            else read_perturbation_features(self.perturbation_features)
        )

    @property
    def by_vector(self) -> bool:
        """Whether a new model of the run reads vectors of perturbations, and no ids."""
        return self.perturbation_features is not None

    def file_source(self, reader: StateProcessor | None = None) -> FileSource:
        """
        The files' cells.

        Args:
            reader ([`StateProcessor`], *optional*): reads them, instead of that of the section.
        """
        if self.splits is None and self.datasets is None:
            raise ValueError(
                "data: set one of `splits` (a TOML file) and `datasets` (files), or a `store`; found neither"
            )
        datasets = self.files() if self.splits is None else Splits.from_toml(self.splits).datasets
        return FileSource(
            datasets,
            self.reader() if reader is None else reader,
            self.contexts,
            self.convert_scale,
            self.max_missing_genes,
        )

    def fit_options(self) -> dict[str, Any]:
        """Arguments of [`load`] for a processor that is fitted."""
        names = ("normalize", "target_sum", "hvg_on_all")
        own = {name: getattr(self, name) for name in names}
        return own | {"genes": self.chosen_genes(), "coexpression": self.perturbation_features == COEXPRESSION}

    def sentence_options(self) -> dict:
        """Arguments of [`SentenceDataset`]."""
        names = ("control_matching", "small_groups", "control_sentences", "heldout_controls", "controls_only")
        return {name: getattr(self, name) for name in (*names, "sentences_per_group", "sentence_cap")}

    def chosen_genes(self) -> int | list[str] | None:
        """The number of genes, or their names; None for all genes."""
        if isinstance(self.genes, str):
            raise ValueError(
                "data.genes=auto is decided from the genes of files or of a store, for a new model; give a number, or leave it out"
            )
        return self.genes if self.genes_file is None else read_names(Path(self.genes_file))

    def decide_genes(self, available: int) -> str | None:
        """Decide `genes: auto` for data of so many genes. Returns the decision as a sentence, or None if it was not asked for."""
        if self.genes != AUTO:
            return None
        self.genes = AUTO_GENES if available > MOST_GENES else None
        chosen = f"the {AUTO_GENES:,} most variable of {available:,}" if self.genes else f"all {available:,}"
        return f"auto: genes {chosen}"

    def check_store(self, manifest: "Manifest", given: Collection[str]):
        """
        Args:
            manifest ([`Manifest`]): of the store that is read instead of files.
            given: names of the fields that the run sets.

        Raises:
            ValueError: the run sets a field that says how files are read, and the store was prepared with another value.
        """
        own = self.reading
        for name, prepared in ({name: DEFAULTS.get(name) for name in READING} | manifest.reading).items():
            if name in given and own[name] != prepared:
                raise ValueError(
                    f"data.{name}={own[name]!r}, but the store was prepared with {prepared!r}; leave it out, or "
                    "prepare the store anew"
                )

    def files(self) -> dict[str, list[Path | ad.AnnData]]:
        """The files of each dataset that `datasets` names, or the objects that [`fit`] was given; none where it is not set."""
        if self.datasets is None:
            return {}
        named = self.datasets if isinstance(self.datasets, dict) else {Path(self.datasets).stem: self.datasets}
        return {
            name: [cells] if isinstance(cells, ad.AnnData) else [*expand_paths(cells)] for name, cells in named.items()
        }

    def resolve_splits(self, groups: pd.DataFrame | None = None, reader: StateProcessor | None = None) -> Splits:
        """
        The [`Splits`] that the section describes.

        Args:
            groups (`pandas.DataFrame`, *optional*): the groups of the source whose cells are split; by default those of the
                files, whose labels are read for it.
            reader ([`StateProcessor`], *optional*): reads the labels, instead of that of the section.
        """
        stored = self.store is not None
        groups = self.file_source().groups if groups is None else groups
        names = sorted(groups["dataset"].unique())
        reader = self.reader() if reader is None else reader
        if self.splits is not None:
            return Splits.from_toml(self.splits, names if stored else None).canonical(reader.canonical, groups)
        if not stored:
            datasets = self.files()
        elif isinstance(self.datasets, dict) and sorted(self.datasets) != names:
            raise ValueError(f"data: datasets names {sorted(self.datasets)}, the store was made of {names}")
        else:
            datasets = dict.fromkeys(names, [])
        held = {Split.TEST: self.test_perturbations, Split.VAL: self.val_perturbations}
        contexts = {**dict.fromkeys(self.val_contexts, Split.VAL), **dict.fromkeys(self.test_contexts, Split.TEST)}
        if not contexts and not any(held.values()):
            return Splits(datasets, set(datasets))
        used = groups if self.contexts is None else groups[groups["context"].isin(self.contexts)]
        by_context = used.groupby(["dataset", "context"])["perturbation"]
        present = {pair: list(names) for pair, names in by_context}
        for context in contexts:
            if context not in {c for _, c in present}:
                raise ValueError(
                    f"data: held-out context {context!r} is not in the data; {closest(context, sorted({c for _, c in present}))}"
                )
        everything = sorted({p for names in present.values() for p in names})
        held = {split: meant(names, reader.canonical, everything) for split, names in held.items()}
        for name in (n for names in held.values() for n in names):
            if name not in everything:
                raise ValueError(
                    f"data: held-out perturbation {name!r} is not in the data; {closest(name, everything)}"
                )
        zeroshot, fewshot = {}, {}
        for (dataset, context), names in present.items():
            if context in contexts:
                zeroshot[dataset, context] = contexts[context]
                continue
            here = {split: [n for n in wanted if n in names] for split, wanted in held.items()}
            if any(here.values()):
                fewshot[dataset, context] = here
        return Splits(datasets, set(datasets), zeroshot, fewshot)

    def splits_of_stream(self, datasets: list[str], reader: StateProcessor) -> Splits:
        """
        The [`Splits`] that the section describes, of the datasets of a stream, whose labels nobody knows yet.

        Args:
            reader ([`StateProcessor`]): how the stream's labels are read.
        """
        dosed = reader.dose_key is not None
        if self.splits is not None:
            splits = Splits.from_toml(self.splits, datasets)
            fewshot = {
                pair: {split: [reader.canonical(name) for name in names] for split, names in held.items()}
                for pair, held in splits.fewshot.items()
            }
            return dataclasses.replace(splits, fewshot=fewshot, dosed=dosed)
        contexts = {**dict.fromkeys(self.val_contexts, Split.VAL), **dict.fromkeys(self.test_contexts, Split.TEST)}
        named = ((Split.VAL, self.val_perturbations), (Split.TEST, self.test_perturbations))
        names = {reader.canonical(name): split for split, listed in named for name in listed}
        return Splits(dict.fromkeys(datasets, []), set(datasets), contexts=contexts, perturbations=names, dosed=dosed)


# Settings of a reader that other fields, or the data, say.
_FOUND = ("control_labels", "batch_datasets", "dataset")


@dataclass
class StreamArguments:
    """
    The `stream` section: cells that are read while they are trained on, with nothing on disk. The `data` section says
    the rest (`control`, `contexts`, `genes`, what is held out), but no files.

    Args:
        path (`str`, *optional*): what is streamed: parquet (a file, folder or glob), a cell store, or a data set on the Hub.
        configuration (`str`, *optional*): configuration of a data set on the Hub.
        split (`str`): split of a data set on the Hub.
        revision (`str`, *optional*): commit, tag or branch of a data set on the Hub.
        columns (`dict`, *optional*): which column holds what, see [`StreamColumns`]. Not needed for a cell store.
        gene_names (`str`, *optional*): file that gives each gene id its name: `.csv` or `.parquet` with two columns, or
            `.json`. Not needed for a cell store.
        gene_id_column (`str`): column of the gene ids in `gene_names`.
        gene_name_column (`str`): column of the names in `gene_names`.
        reservoir_cells, fill_cells, eval_cells, baseline_cells: see [`survey_stream`].
        buffer_cells, shuffle_sentences: see [`SentenceStream`].
        block_size (`int`): cells that are read at once.
    """

    path: str | None = None
    configuration: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[str, Any] | None = None
    gene_names: str | None = None
    gene_id_column: str = "id"
    gene_name_column: str = "name"
    reservoir_cells: int = 2048
    fill_cells: int | None = None
    eval_cells: int = 256
    baseline_cells: int = 256
    buffer_cells: int = 65_536
    shuffle_sentences: int = 64
    block_size: int = 1024

    def __post_init__(self):
        _check_types(self, "stream")
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if self.path is None and changed:
            raise ValueError(f"stream: {changed} are set, but no path: name what is streamed")

    def survey_options(self) -> dict:
        """Arguments of [`survey_stream`]."""
        return {name: getattr(self, name) for name in ("reservoir_cells", "fill_cells", "eval_cells", "baseline_cells")}


@dataclass
class PrepareArguments:
    r"""
    The `prepare` section: how `pertstate prepare` lays a store out. Training does not read it.

    Args:
        layout (`str`): how expression is stored.

            - `"auto"`: sparse
            - `"sparse"`: gene ids and values of what is not zero
            - `"dense"`: a value for every gene
        dtype (`str`): type of the values.

            - `"auto"`: counts as the smallest whole numbers that hold them all, anything else as float32
            - `"float32"`, `"float16"`: of log1p expression and embeddings (float16 keeps three digits)
        obs_columns (`list[str]`, *optional*): columns of `obs` to keep beside the labels; by default those that every
            file has.
        knockdown_filter (`bool`): leave out knock-downs that did not work, perturbations and single cells. It judges by the
            expression of the perturbed gene (normalised, not logarithmic), in each context by itself; of a combination,
            each gene must pass. A perturbation that is no gene of the data, or whose gene the controls do not express,
            cannot be judged: it stays, and is listed.
        knockdown_residual (`float`): keep a perturbation if its gene's mean expression is at most this part of that in the
            controls.
        knockdown_cell_residual (`float`): keep those of its cells in which the expression is at most this part.
        knockdown_min_cells (`int`): keep it only if so many of its cells are left.
        shard_megabytes (`int`): approximate size of each file of the store. Making the store needs several times this memory.
    """

    layout: Literal["auto", "sparse", "dense"] = "auto"
    dtype: Literal["auto", "float32", "float16"] = "auto"
    obs_columns: list[str] | None = None
    knockdown_filter: bool = False
    knockdown_residual: float = 0.3
    knockdown_cell_residual: float = 0.5
    knockdown_min_cells: int = 30
    shard_megabytes: int = 128

    def __post_init__(self):
        _check_types(self, "prepare")
        for name in ("knockdown_residual", "knockdown_cell_residual", "knockdown_min_cells", "shard_megabytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"prepare.{name}: expected a number above 0, found {getattr(self, name)!r}")


def read_names(path: Path) -> list[str]:
    """The names in a file, one on a line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of gene names (looked from {Path.cwd()})")
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path}: expected gene names, one on a line; found none")
    return names


def _check_types(section, name: str):
    """Convert each field of a section to its declared type."""
    for option in dataclasses.fields(section):
        value = getattr(section, option.name)
        setattr(section, option.name, as_declared(f"{name}.{option.name}", option.type, value))
