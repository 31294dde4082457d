"""Which (dataset, context, perturbation) is for training, for validation and for test."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata as ad
import pandas as pd

from pertstate.base.constants import Split
from pertstate.base.messages import closest, some
from pertstate.base.printable import get_logger
from pertstate.data.bounded_toml import load_toml
from pertstate.data.in_memory import name_of
from pertstate.data.reading import expand_paths


logger = get_logger(__name__)


@dataclass
class Splits:
    """
    What is trained on and what is held out.

    Args:
        datasets (`dict[str, list[Path | AnnData]]`): name of each dataset to its files, or objects in memory.
        training (`set[str]`): the datasets that are trained on, with all (context, perturbation) pairs that are not held
            out.
        zeroshot (`dict[tuple[str, str], str]`): (dataset, context) to `"val"` or `"test"`, for contexts that are held
            out with all their perturbations.
        fewshot (`dict[tuple[str, str], dict[str, list[str]]]`): (dataset, context) to the perturbations held out
            for `"val"` and `"test"`; the other perturbations of the context are trained on.
        contexts (`dict[str, str]`): context to `"val"` or `"test"`, for contexts held out in every dataset.
        perturbations (`dict[str, str]`): perturbation to `"val"` or `"test"`, for perturbations held out in every dataset
            and context, unless the context is held out itself.
        dosed (`bool`): perturbations have doses that are not known yet (those of a stream): a name without a dose stands for
            all its doses.
    """

    datasets: dict[str, list[Path | ad.AnnData]]
    training: set[str]
    zeroshot: dict[tuple[str, str], str] = field(default_factory=dict)
    fewshot: dict[tuple[str, str], dict[str, list[str]]] = field(default_factory=dict)
    contexts: dict[str, str] = field(default_factory=dict)
    perturbations: dict[str, str] = field(default_factory=dict)
    dosed: bool = False

    def __post_init__(self) -> None:
        named: dict[str, set[str]] = {"training": self.training, "zeroshot": {d for d, _ in self.zeroshot}}
        named["fewshot"] = {d for d, _ in self.fewshot}
        for section, names in named.items():
            for name in sorted(names - set(self.datasets)):
                raise ValueError(f"[{section}] names dataset {name!r}; {closest(name, self.datasets)}")
        owners: dict[str | int, str] = {}
        for name, paths in self.datasets.items():
            for path in paths:
                other = owners.setdefault(id(path) if isinstance(path, ad.AnnData) else os.path.realpath(path), name)
                if other != name:
                    # Its cells could be held out in one dataset and trained on in the other.
                    raise ValueError(
                        f"[datasets]: {name_of(path)} is in {other!r} and in {name!r}; name each file once"
                    )
        if not self.training:
            raise ValueError(f"[training] names no dataset; expected some of {sorted(self.datasets)}")
        for key, split in self.zeroshot.items():
            if split not in (Split.VAL, Split.TEST):
                raise ValueError(f"[zeroshot] {'.'.join(key)!r} = {split!r}: expected 'val' or 'test'")
            if key in self.fewshot:
                raise ValueError(f"{'.'.join(key)!r} stands in [zeroshot] and [fewshot]: leave it in one of them")
        for key, held in self.fewshot.items():
            for split, listed in held.items():
                if split not in (Split.VAL, Split.TEST):
                    raise ValueError(f"[fewshot.{'.'.join(key)!r}] has {split!r}: expected 'val' and 'test'")
                if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
                    raise ValueError(
                        f"[fewshot.{'.'.join(key)!r}] {split} = {listed!r}: expected a list of perturbation names"
                    )
            both = set(held.get(Split.VAL, [])) & set(held.get(Split.TEST, []))
            if both:
                raise ValueError(
                    f"[fewshot.{'.'.join(key)!r}]: {sorted(both)} are in val and test; a pair has one split"
                )

    @classmethod
    def from_toml(cls, path: str | os.PathLike, stored: list[str] | None = None) -> "Splits":
        """Read the sections `[datasets]`, `[training]`, `[zeroshot]` and `[fewshot."dataset.context"]`.

        Args:
            path: the TOML file. Its datasets are files, folders or globs; relative ones start at the working directory.
            stored (`list[str]`, *optional*): the names of the datasets of a store. The section `[datasets]` may then be
                left out, and its paths are not looked at.

        Raises:
            FileNotFoundError: the file or a dataset is missing.
            ValueError: the file is not TOML, has another section, or contradicts itself.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such TOML file (looked from {Path.cwd()})")
        content = load_toml(path)
        sections = ("datasets", "training", "zeroshot", "fewshot")
        for section, values in content.items():
            if section not in sections:
                raise ValueError(f"{path}: unknown section [{section}]; {closest(section, sections)}")
            if not isinstance(values, dict):
                raise ValueError(f"{path}: [{section}] should hold `name = value` lines, found {values!r}")
        if stored is not None:
            if sorted(content.get("datasets", stored)) != sorted(stored):
                raise ValueError(
                    f"{path}: [datasets] has {sorted(content['datasets'])}, the store was made of {stored}"
                )
            datasets: dict[str, list[Path | ad.AnnData]] = {name: [] for name in stored}
        elif "datasets" not in content:
            raise ValueError(f"{path}: no [datasets] section (name = file, folder or glob)")
        else:
            datasets = {name: [*expand_paths(pattern)] for name, pattern in content["datasets"].items()}
        for name, value in content.get("training", {}).items():
            if value != Split.TRAIN:
                raise ValueError(f"{path}: [training] {name} = {value!r}: expected 'train'")

        def pair(key: str) -> tuple[str, str]:
            # Names may hold dots: the dataset is the longest known name that ends before one.
            known = [name for name in datasets if key.startswith(name + ".")]
            if not known:
                raise ValueError(
                    f'{path}: {key!r} should be "dataset.context", in quotes; the dataset: '
                    + closest(key.split(".")[0], datasets)
                )
            name = max(known, key=len)
            return name, key[len(name) + 1 :]

        for key, held in content.get("fewshot", {}).items():
            if not isinstance(held, dict):
                raise ValueError(f'{path}: [fewshot] {key} = {held!r}: expected a section [fewshot."dataset.context"]')
        return cls(
            datasets=datasets,
            training=set(content.get("training", {})),
            zeroshot={pair(key): split for key, split in content.get("zeroshot", {}).items()},
            fewshot={pair(key): held for key, held in content.get("fewshot", {}).items()},
        )

    def canonical(self, name_of: Callable[[str], str], groups: pd.DataFrame) -> "Splits":
        """
        The same with canonical names of perturbations; a name without a dose stands for all its doses.

        Args:
            name_of (`Callable`): gives the canonical name of a name.
            groups (`pandas.DataFrame`): columns `dataset`, `context` and `perturbation`, of the cells.
        """
        there = {pair: list(of) for pair, of in groups.groupby(["dataset", "context"])["perturbation"]}
        fewshot = {
            pair: {split: meant(names, name_of, there.get(pair, [])) for split, names in held.items()}
            for pair, held in self.fewshot.items()
        }
        for pair, held in fewshot.items():
            absent = [name for names in held.values() for name in names if name not in there.get(pair, [name])]
            if absent:
                logger.warning(
                    f"[fewshot] names {len(absent)} perturbations that {'.'.join(pair)} does not have, so nothing is held out for "
                    f"them: {some(absent)}"
                )
                fewshot[pair] = {split: [name for name in names if name not in absent] for split, names in held.items()}
        return replace(self, fewshot=fewshot)

    def assign(self, present: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str, str], str | None]:
        """
        The split of every (dataset, context, perturbation); None for what is neither trained on nor held out.

        Args:
            present (`dict[tuple[str, str], list[str]]`): the perturbations, without the control, of each
                (dataset, context) in the data.

        Raises:
            ValueError: a context or perturbation that the splits name is not in the data.
        """
        for section, keys in (("zeroshot", self.zeroshot), ("fewshot", self.fewshot)):
            for dataset, context in keys:
                if (dataset, context) not in present:
                    contexts = sorted(c for d, c in present if d == dataset)
                    raise ValueError(
                        f"[{section}] names context {context!r} of {dataset!r}, which is not there; "
                        + closest(context, contexts)
                    )
        for (dataset, context), held in self.fewshot.items():
            for name in (p for perturbations in held.values() for p in perturbations):
                if name not in self._names(present[dataset, context]):
                    raise ValueError(
                        f"[fewshot] holds out {name!r} in {dataset}.{context}, which does not have it; "
                        + closest(name, present[dataset, context])
                    )
        for kind, held_out, there in (
            ("context", self.contexts, {context for _, context in present}),
            ("perturbation", self.perturbations, self._names([name for of in present.values() for name in of])),
        ):
            for name in held_out:
                if name not in there:
                    raise ValueError(f"held-out {kind} {name!r} is not in the data; {closest(name, sorted(there))}")
        assigned: dict[tuple[str, str, str], str | None] = {}
        for (dataset, context), perturbations in present.items():
            for name in perturbations:
                assigned[dataset, context, name] = self.split_of(dataset, context, name)
        return assigned

    def split_of(self, dataset: str, context: str, perturbation: str) -> str | None:
        """The split of one (dataset, context, perturbation), as in [`Splits.assign`]. It need not be in the data."""
        whole = self.split_of_context(dataset, context)
        if whole is not None:
            return whole
        # Its own name goes before that of all its doses.
        for name in dict.fromkeys((perturbation, without_doses(perturbation) if self.dosed else perturbation)):
            for split, names in self.fewshot.get((dataset, context), {}).items():
                if name in names:
                    return split
            if name in self.perturbations:
                return self.perturbations[name]
        return Split.TRAIN if dataset in self.training else None

    def _names(self, perturbations: list[str]) -> set[str]:
        """All that a name of the splits may be, where these perturbations are there."""
        return {*perturbations, *(map(without_doses, perturbations) if self.dosed else ())}

    def split_of_context(self, dataset: str, context: str) -> str | None:
        """The split that a context is held out for as a whole, or None."""
        return self.zeroshot.get((dataset, context), self.contexts.get(context))


def meant(names: list[str], name_of: Callable[[str], str], present: list[str]) -> list[str]:
    """The perturbations that some names stand for: each itself, or all its doses among those that are present."""
    found: list[str] = []
    for name in map(name_of, names):
        doses = [one for one in present if without_doses(one) == name]
        found += [name] if name in present or not doses else sorted(set(doses))
    return found


def without_doses(name: str) -> str:
    """The canonical name of a perturbation without its doses: `A+B` of `A@0.1+B@10`."""
    return re.sub(r"@\d+(\.\d+)?(e[+-]?\d+)?(?![\w.])", "", name)
