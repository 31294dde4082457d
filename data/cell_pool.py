"""Cells that are kept in memory: rows, a pool that rows enter and leave, and random samples of bounded size."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from pertstate.base.messages import counted


@dataclass
class CellRows:
    """
    Some cells.

    Args:
        features (CSR or `np.ndarray` of shape `(cells, feature_dim)`): float32, in the model's units.
        genes (CSR of shape `(cells, genes)`, *optional*): target of the gene decoder, log1p expression.
        batches (`np.ndarray` of shape `(cells,)`, *optional*): batch of each cell, int64 places in a list of names.
        totals (`np.ndarray` of shape `(cells,)`, *optional*): of expression as it stands in the data, each cell's sum over
            all its genes, float64.
    """

    features: "sp.csr_matrix | np.ndarray"
    genes: sp.csr_matrix | None = None
    batches: np.ndarray | None = None
    totals: np.ndarray | None = None

    def __len__(self) -> int:
        return self.features.shape[0]

    def take(self, rows: np.ndarray) -> "CellRows":
        """Some of them, as a copy."""
        return CellRows(*(None if part is None else part[rows] for part in self._parts()))

    def _parts(self) -> tuple:
        return self.features, self.genes, self.batches, self.totals

    @classmethod
    def join(cls, parts: "list[CellRows]") -> "CellRows":
        """Several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        joined: list = []
        for blocks in zip(*(part._parts() for part in parts)):
            if blocks[0] is None:
                joined.append(None)
            else:
                joined.append(sp.vstack(blocks, format="csr") if sp.issparse(blocks[0]) else np.concatenate(blocks))
        return cls(*joined)

    def dense(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and genes of some of them, `(cells, feature_dim)` and `(cells, genes)` float32."""
        return _dense([(self.features, rows, slice(None))], len(rows)), (
            None if self.genes is None else _dense([(self.genes, rows, slice(None))], len(rows))
        )

    def to_arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Plain arrays that hold the same, for [`CellRows.from_arrays`]."""
        arrays = {}
        for name, part in (("features", self.features), ("genes", self.genes)):
            if isinstance(part, np.ndarray):
                arrays[f"{prefix}.{name}"] = part
            elif part is not None:
                arrays[f"{prefix}.{name}.data"] = part.data
                arrays[f"{prefix}.{name}.indices"] = part.indices.astype(np.int32)
                arrays[f"{prefix}.{name}.indptr"] = part.indptr.astype(np.int64)
                arrays[f"{prefix}.{name}.shape"] = np.array(part.shape, dtype=np.int64)
        if self.batches is not None:
            arrays[f"{prefix}.batches"] = self.batches
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], prefix: str) -> "CellRows":
        """What [`CellRows.to_arrays`] wrote."""
        parts = {}
        for name in ("features", "genes"):
            key = f"{prefix}.{name}"
            if f"{key}.data" in arrays:
                data, indices, indptr = (arrays[f"{key}.{part}"] for part in ("data", "indices", "indptr"))
                parts[name] = sp.csr_matrix((data, indices, indptr), shape=tuple(arrays[f"{key}.shape"].tolist()))
            else:
                parts[name] = arrays.get(key)
        return cls(parts["features"], parts["genes"], arrays.get(f"{prefix}.batches"))


def _dense(parts: list[tuple], count: int) -> np.ndarray:
    """Rows of several matrices, put in their places. Not with scipy's indexing, which is slow for many small parts."""
    out = np.zeros((count, parts[0][0].shape[1]), dtype=np.float32)
    places_of = np.arange(count)
    for matrix, rows, places in parts:
        if sp.issparse(matrix):
            starts = matrix.indptr[rows]
            lengths = matrix.indptr[rows + 1] - starts
            before = np.cumsum(lengths) - lengths
            entries = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
            out[np.repeat(places_of[places], lengths), matrix.indices[entries]] = matrix.data[entries]
        else:
            out[places] = matrix[rows]
    return out


class CellPool:
    """
    Cells that come in blocks and leave in any order. A cell is known by its slot; when the cell has left, another one may
    get the slot. Memory holds at most about twice the cells that are kept.
    """

    _slack, _most_chunks = 4096, 32

    def __init__(self) -> None:
        self._chunks: list[CellRows] = []
        self._starts = np.zeros(0, dtype=np.int64)  # first row of each chunk
        self._row = np.zeros(0, dtype=np.int64)  # row of each slot, -1 where it is free
        self._free: list[int] = []
        self.held = 0  # rows in memory

    def __len__(self) -> int:
        return len(self._row) - len(self._free)

    def add(self, cells: CellRows) -> np.ndarray:
        """Keep some cells; their slots."""
        count = len(cells)
        if count == 0:
            return np.zeros(0, dtype=np.int64)
        if len(self._chunks) >= self._most_chunks or self.held > 2 * len(self) + self._slack:
            self._pack()
        rows = self.held + np.arange(count)
        self._chunks.append(cells)
        self._starts = np.append(self._starts, self.held)
        self.held += count
        reused = min(count, len(self._free))
        slots = np.concatenate(
            [
                np.array(self._free[len(self._free) - reused :], dtype=np.int64),
                len(self._row) + np.arange(count - reused),
            ]
        )
        del self._free[len(self._free) - reused :]
        self._row = np.concatenate([self._row, np.empty(count - reused, dtype=np.int64)])
        self._row[slots] = rows
        return slots

    def remove(self, slots: np.ndarray):
        """Let some cells go."""
        self._row[slots] = -1
        self._free.extend(np.asarray(slots).tolist())

    def take(self, slots: np.ndarray) -> CellRows:
        """Some cells, which stay."""
        found = self._find(slots)
        if len(found) == 1:
            return found[0][0].take(found[0][1])
        order = np.concatenate([places for *_, places in found])
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return CellRows.join([chunk.take(rows) for chunk, rows, _ in found]).take(back)

    def dense(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and genes of some cells, as [`CellRows.dense`]."""
        found, count = self._find(slots), len(slots)
        features = _dense([(chunk.features, rows, places) for chunk, rows, places in found], count)
        if found[0][0].genes is None:
            return features, None
        return features, _dense([(chunk.genes, rows, places) for chunk, rows, places in found], count)

    def _find(self, slots: np.ndarray) -> list[tuple[CellRows, np.ndarray, np.ndarray]]:
        """Chunks, the rows of them that are asked for, and their places among `slots`."""
        rows = self._row[slots]
        chunk = np.searchsorted(self._starts, rows, side="right") - 1
        if (chunk == chunk[0]).all():
            return [(self._chunks[chunk[0]], rows - self._starts[chunk[0]], np.arange(len(rows)))]
        order = np.argsort(chunk, kind="stable")
        numbers, firsts = np.unique(chunk[order], return_index=True)
        return [
            (self._chunks[number], rows[places] - self._starts[number], places)
            for number, places in zip(numbers, np.split(order, firsts[1:]))
        ]

    def _pack(self):
        slots = np.flatnonzero(self._row >= 0)
        self._chunks = [self.take(slots)] if len(slots) else []
        self._starts = np.zeros(len(self._chunks), dtype=np.int64)
        self._row[slots] = np.arange(len(slots))
        self.held = len(slots)


class Reservoirs:
    """
    Uniform random samples of a stream of cells, of bounded size (algorithm R).

    A cell belongs to an owner and to a part of that owner. The samples of an owner's parts have one size, and together at
    most `capacity` cells. When a new part turns up, the samples of the others are thinned at random, and stay uniform.

    Args:
        capacity (`int`): cells that are kept for an owner.
        generator (`np.random.Generator`): draws the samples.
    """

    def __init__(self, capacity: int, generator: np.random.Generator):
        if capacity < 1:
            raise ValueError(f"expected room for at least 1 cell, found {capacity}")
        self.capacity, self.pool, self._generator = capacity, CellPool(), generator
        self._slots: dict[Hashable, dict[Hashable, np.ndarray]] = {}
        self._seen: dict[tuple[Hashable, Hashable], int] = {}

    def offer(self, groups: "list[tuple[Hashable, Hashable, np.ndarray]]", read: Callable[[np.ndarray], CellRows]):
        """
        Offer cells to the samples.

        Args:
            groups (list of (owner, part, rows)): each pair of owner and part once.
            read (`Callable`): gives the cells of some rows; it is called with the rows that are kept.

        Raises:
            ValueError: an owner has more parts than its capacity.
        """
        for owner, part, _ in groups:
            parts = self._slots.setdefault(owner, {})
            if part not in parts:
                self._make_room(owner, parts)
                parts[part] = np.zeros(0, dtype=np.int64)
                self._seen[owner, part] = 0
        chosen = []
        for owner, part, rows in groups:
            size, seen = self.capacity // len(self._slots[owner]), self._seen[owner, part]
            # Cell number n takes place n, or once all are taken a random one of n + 1, if it exists.
            numbers = seen + np.arange(len(rows))
            places = np.where(numbers < size, numbers, self._generator.integers(0, numbers + 1))
            self._seen[owner, part] += len(rows)
            for place, row in {p: r for p, r in zip(places.tolist(), rows.tolist()) if p < size}.items():
                chosen.append((owner, part, place, row))
        if not chosen:
            return
        slots = self.pool.add(read(np.array([row for *_, row in chosen])))
        for (owner, part, place, _), slot in zip(chosen, slots):
            kept = self._slots[owner][part]
            if place < len(kept):
                self.pool.remove(kept[place : place + 1])
                kept[place] = slot
            else:
                self._slots[owner][part] = np.append(kept, slot)

    def _make_room(self, owner: Hashable, parts: dict[Hashable, np.ndarray]):
        size = self.capacity // (len(parts) + 1)
        if size == 0:
            raise ValueError(
                f"{owner} has more than {counted(self.capacity, 'batch')}, for which a reservoir of {counted(self.capacity, 'cell')} has no "
                "room; raise reservoir_cells, or use control_matching='context'"
            )
        for part, kept in parts.items():
            if len(kept) > size:
                stay = np.sort(self._generator.choice(len(kept), size, replace=False))
                self.pool.remove(np.delete(kept, stay))
                parts[part] = kept[stay]

    def owners(self) -> list[Hashable]:
        """All owners of cells."""
        return list(self._slots)

    def parts(self, owner: Hashable) -> dict[Hashable, np.ndarray]:
        """Slots in `pool` of the sample of each part of an owner."""
        return self._slots.get(owner, {})
