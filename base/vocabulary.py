"""From names to numbers: the vocabularies of a model, and perturbations as ids or as feature vectors."""

import difflib
import json
import os
import re
from dataclasses import asdict, dataclass, field

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .bounded_text import parse_json
from .checkpoint_files import read_json
from .files import whole_file
from .finite import are_finite
from .messages import closest, some


VOCABULARY_FILE = "vocabulary.json"
PERTURBATION_FEATURES_FILE = "perturbation_features.safetensors"
# The layout of that file: a matrix, and the names of its rows as a JSON list in the metadata.
FEATURES_TENSOR, NAMES_METADATA = "features", "names"


LONGEST_NAME = 100_000
# A NUL ends a name in some places and not in others; half of a surrogate pair can be written to no file.
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")


def _is_name(value: str) -> bool:
    return len(value) <= LONGEST_NAME and not value.isspace() and value != "" and not _UNWRITABLE.search(value)


@dataclass
class Vocabulary:
    """
    The names behind a model's numbers, in order. Saved as `vocabulary.json` beside the weights.

    Args:
        genes (`list[str]`): features of a cell in the model's order; for an embedding, the genes of the gene decoder.
        perturbations (`list[str]`): single perturbations seen in training. The control is no perturbation and is not
            among them, except in converted checkpoints that gave it a row of its own.
        contexts (`list[str]`): cell types or lines seen in training.
        batches (`list[str]`): experimental batches seen in training.
    """

    genes: list[str] = field(default_factory=list)
    perturbations: list[str] = field(default_factory=list)
    contexts: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name, values in asdict(self).items():
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise ValueError(f"vocabulary {name!r}: expected a list of names, found {type(values).__name__}")
            wrong = next((value for value in values if not _is_name(value)), None)
            if wrong is not None:
                raise ValueError(
                    f"vocabulary {name!r} holds {wrong[:60]!r}; expected names that are not blank, of at most {LONGEST_NAME} "
                    "characters that can be written"
                )
            duplicates = pd.Index(values)[pd.Index(values).duplicated()].unique().tolist()
            if duplicates:
                raise ValueError(f"vocabulary {name!r} has duplicates: {duplicates[:10]}; every name must be unique")

    def merged(self, other: "Vocabulary") -> "Vocabulary":
        """
        These names, then the perturbations, contexts and batches that only the other vocabulary has: every id keeps its
        meaning. The genes are those of the other vocabulary, if it names any.
        """
        merged = {kind: list(dict.fromkeys(known + getattr(other, kind))) for kind, known in asdict(self).items()}
        return Vocabulary(**{**merged, "genes": list(other.genes or self.genes)})

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "Vocabulary":
        """
        Raises:
            ValueError: the file is no whole JSON file, or does not hold four lists of unique names.
        """
        content = read_json(path)
        if set(content) != set(cls.__dataclass_fields__):
            raise ValueError(
                f"{path}: expected the lists {sorted(cls.__dataclass_fields__)}, found {some(content)}; copy the checkpoint "
                "again"
            )
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike):
        """Write the file, whole or not at all."""
        with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, ensure_ascii=False, indent=0)


class PerturbationFeatures:
    r"""
    A vector for each perturbation (a protein embedding, a chemical fingerprint, ..), by name. The vectors never change.

    Saved as `perturbation_features.safetensors`: the tensor `features` (N, P), and a JSON list of the N names in the
    metadata, under `names`.

    Args:
        names (sequence of `str`): unique names of the perturbations.
        vectors (array of shape `(len(names), P)`): finite numbers, one row for each name; kept as float32.

    Raises:
        ValueError: a name is blank or stands twice, or the vectors are not one row of finite numbers for each name.
    """

    def __init__(self, names, vectors):
        names, vectors = list(names), np.asarray(vectors)
        if vectors.dtype.kind not in "biuf":
            raise ValueError(f"perturbation features: expected numbers, found values of type {vectors.dtype}")
        if vectors.ndim != 2 or len(vectors) != len(names) or vectors.size == 0:
            raise ValueError(
                f"perturbation features: expected one vector for each of {len(names)} names, found an array of shape "
                f"{vectors.shape}"
            )
        unnamed = [name for name in names if not isinstance(name, str) or not _is_name(name)]
        if unnamed:
            raise ValueError(
                f"perturbation features: expected a name for each vector, found {str(unnamed[0])[:60]!r} ({len(unnamed)} such "
                f"names); expected names that are not blank, of at most {LONGEST_NAME} characters that can be written"
            )
        duplicates = pd.Index(names)[pd.Index(names).duplicated()].unique()
        if len(duplicates):
            raise ValueError(f"perturbation features: names stand twice: {some(duplicates)}; keep one vector of each")
        with np.errstate(over="ignore"):
            vectors = np.array(vectors, dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            value = vectors[bad[0]][~np.isfinite(vectors[bad[0]])][0]
            raise ValueError(
                f"perturbation features: expected finite numbers (float32), found {value} in the vector of "
                f"{names[bad[0]]!r} ({len(bad)} such vectors); mend or leave out those rows"
            )
        vectors.flags.writeable = False
        self.names, self.vectors = names, vectors
        self.index = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.names)

    def __deepcopy__(self, memo) -> "PerturbationFeatures":
        return self

    @property
    def dim(self) -> int:
        """P, the width of a vector."""
        return self.vectors.shape[1]

    def check_control(self, control: str):
        """ValueError if the control has a vector other than zeros."""
        if control in self.index and self.vectors[self.index[control]].any():
            raise ValueError(
                f"perturbation features: the control {control!r} is no perturbation: expected zeros or no vector, found "
                "another one; leave it out"
            )

    def check_covers(self, perturbations, where: str):
        """ValueError if single perturbations have no vector; it lists them, and the nearest names that have one."""
        wanted = sorted(set(perturbations))
        missing = [name for name in wanted if name not in self.index]
        if not missing:
            return
        # The gene symbols of two species often differ only in case.
        folded = {name.casefold(): name for name in self.names}
        matches = {name: difflib.get_close_matches(name.casefold(), folded, n=1) for name in missing[:10]}
        near = [f"{folded[found[0]]!r} for {name!r}" for name, found in matches.items() if found]
        raise ValueError(
            f"{len(missing)} of {len(wanted)} perturbations {where} have no vector in the perturbation features "
            f"({len(self)} names): {some(missing)}; "
            + (f"nearest: {', '.join(near)}" if near else f"its names look like {some(self.names, 3)}")
            + "; add their vectors, or leave out the cells"
        )

    def encode(self, parts: list[list[str]], doses: "list[list[float]] | None" = None) -> np.ndarray:
        """
        The sum of the vectors of the perturbations that are applied together, each times its dose (1 by default), for
        each item of `parts`: `(len(parts), P)` float32. An item without perturbations, the control, gives zeros.

        Raises:
            KeyError: a perturbation has no vector; the message names the nearest ones.
            ValueError: a sum is infinite in float32; the message names the perturbations.
        """
        encoded = np.zeros((len(parts), self.dim), dtype=np.float32)
        for number, (row, together) in enumerate(zip(encoded, parts)):
            for position, name in enumerate(together):
                if name not in self.index:
                    raise KeyError(
                        f"perturbation {name!r} has no vector among this model's {len(self)} perturbation features (add "
                        f"one with --perturbation-features); {closest(name, self.names)}"
                    )
                with np.errstate(over="ignore"):
                    row += self.vectors[self.index[name]] * np.float32(1 if doses is None else doses[number][position])
            if not are_finite(row):
                times = "" if doses is None else f" times {doses[number]}"
                raise ValueError(
                    f"perturbation features: the vectors of {together}{times} sum to a number that is infinite in float32; scale "
                    "the vectors, or give smaller doses"
                )
        return encoded

    def extended(self, other: "PerturbationFeatures") -> "PerturbationFeatures":
        """
        These vectors and further ones.

        Raises:
            ValueError: the widths differ, or a name has another vector there.
        """
        if other.dim != self.dim:
            raise ValueError(
                f"perturbation features: expected vectors of {self.dim} numbers, as in training, found {other.dim}"
            )
        both = [name for name in other.names if name in self.index]
        changed = [
            name
            for name in both
            if not np.array_equal(self.vectors[self.index[name]], other.vectors[other.index[name]])
        ]
        if changed:
            raise ValueError(
                f"perturbation features: {len(changed)} names have another vector in this model: {some(changed)}; give "
                "new vectors new names, or leave them out"
            )
        new = [i for i, name in enumerate(other.names) if name not in self.index]
        return PerturbationFeatures(
            self.names + [other.names[i] for i in new], np.concatenate([self.vectors, other.vectors[new]])
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "PerturbationFeatures":
        try:
            with safe_open(path, framework="pt") as file:
                metadata, keys = file.metadata() or {}, list(file.keys())
                vectors = as_array(file.get_tensor(FEATURES_TENSOR)) if FEATURES_TENSOR in keys else None
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
        if NAMES_METADATA not in metadata or vectors is None:
            raise ValueError(
                f"{path}: expected the tensor {FEATURES_TENSOR!r} and {NAMES_METADATA!r} in the metadata, found "
                f"{some(keys)} and {some(metadata)}"
            )
        try:
            return cls(names_of(metadata), vectors)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; copy it again") from error

    def save(self, path: str | os.PathLike):
        """Write the file, whole or not at all."""
        names = json.dumps(self.names, ensure_ascii=False)
        with whole_file(path) as partial:
            save_file({FEATURES_TENSOR: self.vectors}, partial, metadata={NAMES_METADATA: names})


def names_of(metadata: dict[str, str]) -> list:
    """What the metadata of a file hold as the names of its vectors. ValueError if it is no list."""
    try:
        names = parse_json(metadata[NAMES_METADATA])
    except ValueError as error:
        raise ValueError(f"{NAMES_METADATA!r} is not whole JSON ({error})") from error
    if not isinstance(names, list):
        raise ValueError(f"{NAMES_METADATA!r}: expected a list of names, found {type(names).__name__}")
    return names


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; floating-point numbers become float32, as numpy has no bfloat16."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def control_rows(
    labels: pd.DataFrame, control: str, perturbation_key: str | None, context: "str | list[str] | None"
) -> dict[str, np.ndarray]:
    """
    The row numbers of the control cells of each context, or of the contexts that are named.

    Args:
        labels (`pandas.DataFrame`): as [`read_labels`] gives them.
        control (`str`): the label of control cells.
        perturbation_key (`str`): the column of obs, named in errors.
        context (`str` or `list[str]`, *optional*): the contexts; all by default.

    Raises:
        KeyError: a context is not in the data.
        ValueError: a context has no control cells, or there is no context.
    """
    present = pd.unique(labels["context"].dropna())
    wanted = list(present) if context is None else [context] if isinstance(context, str) else list(context)
    if not wanted:
        raise ValueError(
            "the data hold no cells, so no control cells"
            if context is None
            else "context: found an empty list, expected names of contexts; leave it out for all"
        )
    unknown = [name for name in wanted if name not in present]
    if unknown:
        raise KeyError(f"context {unknown[0]!r} is not in the data; {closest(unknown[0], present)}")
    is_control = (labels["perturbation"] == control).to_numpy()
    groups = {}
    for name in wanted:
        rows = np.flatnonzero(is_control & (labels["context"] == name).to_numpy())
        if len(rows) == 0:
            raise ValueError(
                f"context {name!r} has no control cells (obs[{perturbation_key!r}] == {control!r}); add "
                "some, or leave the context out"
            )
        groups[name] = rows
    return groups


def encode_ids(parts: list[list[str]], known: dict[str, int]) -> np.ndarray:
    """
    Ids of the perturbations applied together, `(len(parts), K)` int64, padded with -1; all -1 is the control.

    Raises:
        KeyError: a perturbation is not in the vocabulary; the message names the nearest ones.
    """
    encoded = []
    for together in parts:
        unknown = [name for name in together if name not in known]
        if unknown:
            raise KeyError(
                f"perturbation {unknown[0]!r} is unknown to this model ({len(known)} are known); "
                + closest(unknown[0], known)
            )
        encoded.append([known[name] for name in together])
    width = max([1, *map(len, encoded)])
    return np.array([ids + [-1] * (width - len(ids)) for ids in encoded], dtype=np.int64).reshape(-1, width)


__all__ = ["PerturbationFeatures", "Vocabulary"]
