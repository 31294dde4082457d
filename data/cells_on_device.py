"""Cells of a run on the device that trains: as sparse or narrow arrays, made dense and normalised there."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from accelerate.utils import get_max_memory

from pertstate.base.cell_sentences import SentenceLayout
from pertstate.base.constants import Split
from pertstate.base.messages import counted
from pertstate.data.cells import Cells


if TYPE_CHECKING:
    from pertstate.data.store import StoredRows

# Of the free memory of a device, the share that cells may take: where they are kept as far as they fit, and where all are asked for.
SHARE, LARGEST_SHARE = 0.5, 0.9
# Cells that are read at once while they are put on a device.
_BLOCK = 4096
# The dtypes of values: of whole numbers from the narrowest, and of others.
_WHOLE = tuple(np.dtype(name) for name in ("uint8", "int16", "int32"))
_HALF, _SINGLE = np.dtype(np.float16), np.dtype(np.float32)


class CellRows:
    """
    Features of cells where they are read, as they are stored.

    Args:
        matrix (`np.ndarray`, CSR or [`StoredRows`], of shape `(cells, features)`): in memory they are in the model's units.
    """

    def __init__(self, matrix: "np.ndarray | sp.csr_matrix | StoredRows"):
        self.matrix, self.width = matrix, matrix.shape[1]

    def parts(self, rows: np.ndarray) -> Iterator[tuple]:
        """
        Some cells in parts.

        Returns:
            Iterator of `(np.ndarray or slice, np.ndarray or CSR, np.ndarray or None)`: the places of a part among `rows`, its
            values, and what counts of each cell are multiplied by before log1p; None for values that are ready.
        """
        if isinstance(self.matrix, np.ndarray) or sp.issparse(self.matrix):
            yield slice(None), self.matrix[rows], None
        else:
            yield from self.matrix.parts(rows)

    def blocks(self, rows: np.ndarray) -> Iterator[tuple]:
        """The parts of many cells, in their order; the places of a part are beside one another."""
        falls = np.flatnonzero(np.diff(rows) < 0) + 1
        for first, stop in zip([0, *falls], [*falls, len(rows)]):
            for start in range(first, stop, _BLOCK):
                block = np.arange(start, min(start + _BLOCK, stop))
                for places, part, scale in self.parts(rows[block]):
                    yield block[places], part, scale


class Sender:
    """Sends arrays to a device; to a GPU from pinned memory, on a stream of its own, so that neither the host nor a kernel waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        if self._stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self._stream):
            sent = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        reading = torch.cuda.current_stream(self.device)
        reading.wait_stream(self._stream)
        for tensor in sent:
            tensor.record_stream(reading)
        return sent


class _Places:
    """Where each of some rows stands among them."""

    def __init__(self, rows: np.ndarray):
        self._place = np.full(int(rows.max(initial=-1)) + 1, -1, dtype=np.int64)
        self._place[rows] = np.arange(len(rows))

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The places of some rows; -1 for one that is not among them."""
        found = np.full(len(rows), -1, dtype=np.int64)
        known = rows < len(self._place)
        found[known] = self._place[rows[known]]
        return found


class RowsOnDevice:
    """
    Features `(cells, features)` of which some cells are on a device; those of the others are sent when they are asked for.

    Args:
        source ([`CellRows`]): the features.
        rows (`np.ndarray`): the cells of the run, those first that are to be on the device first.
        device (`torch.device`): where.
        budget (`int`): bytes that they may take there.

    Attributes:
        kept (`int`), nbytes (`int`): cells on the device, and the bytes that they take there.
        needed (`int`): the bytes that all cells of the run would take.
        layout (`str`): in words, how they lie there.
    """

    def __init__(self, source: CellRows, rows: np.ndarray, device: torch.device, budget: int):
        self.width, self._send = source.width, Sender(device)
        stored, self._dtype, self._is_scaled = _looked_at(source, rows)
        self._ids = np.dtype(np.int16 if self.width <= 1 << 15 else np.int32)
        of_value = self._dtype.itemsize + self._ids.itemsize
        self.sparse = int(stored.sum()) * of_value < len(rows) * self.width * self._dtype.itemsize
        sizes = stored * of_value if self.sparse else np.full(len(rows), self.width * self._dtype.itemsize)
        sizes = np.cumsum(sizes + (8 if self.sparse else 0) + (4 if self._is_scaled else 0))
        self.needed = int(sizes[-1])
        self.kept = int(np.searchsorted(sizes, budget, side="right"))
        self.nbytes = int(sizes[self.kept - 1]) if self.kept else 0
        self.layout = f"{'sparse' if self.sparse else 'dense'} {self._dtype}"
        self._own = _Places(rows[: self.kept])
        self._put(source, rows[: self.kept], stored[: self.kept])
        self._rest = self._source_of_rest(source, rows[self.kept :])

    def _put(self, source: CellRows, rows: np.ndarray, stored: np.ndarray):
        """Put cells on the device, block by block."""
        device, dtype = self._send.device, getattr(torch, str(self._dtype))
        self._starts = np.concatenate(([0], np.cumsum(stored)))
        size = (int(self._starts[-1]),) if self.sparse else (len(rows), self.width)
        self._values = torch.empty(size, dtype=dtype, device=device)
        self._columns = torch.empty(size, dtype=getattr(torch, str(self._ids)), device=device) if self.sparse else None
        scales = np.ones(len(rows), dtype=np.float32)
        for places, part, scale in source.blocks(rows):
            first, last = places[0], places[-1] + 1
            if scale is not None:
                scales[places] = scale
            if self._columns is None:
                dense = part.toarray() if sp.issparse(part) else part
                self._values[first:last] = torch.from_numpy(np.ascontiguousarray(dense, dtype=self._dtype)).to(device)
                continue
            part = _as_csr(part)
            entries = slice(int(self._starts[first]), int(self._starts[last]))
            self._values[entries] = torch.from_numpy(part.data.astype(self._dtype)).to(device)
            self._columns[entries] = torch.from_numpy(part.indices.astype(self._ids)).to(device)
        self._scales = torch.from_numpy(scales).to(device) if self._is_scaled else None
        self._starts_there = torch.from_numpy(self._starts).to(device)

    def _source_of_rest(self, source: CellRows, rows: np.ndarray) -> Callable[[np.ndarray], Iterator[tuple]]:
        """What gives the parts of cells that are not on the device. Of an array in memory, a sparse copy is made once."""
        if not isinstance(source.matrix, np.ndarray) or not self.sparse or not len(rows):
            return source.parts
        copy = sp.vstack([_as_csr(part) for _, part, _ in source.blocks(rows)], format="csr")
        if self._dtype != _HALF:  # which scipy does not have
            copy = copy.astype(self._dtype)
        places, held = _Places(rows), CellRows(copy)

        def parts(asked: np.ndarray) -> Iterator[tuple]:
            own = places.of(asked)
            return held.parts(own) if (own >= 0).all() else source.parts(asked)

        return parts

    def read(self, layout: SentenceLayout, rows: list[np.ndarray]) -> torch.Tensor:
        """
        Features of the cells of sentences `(B, S, width)` float32 on the device, with zeros where padded.

        Args:
            layout ([`SentenceLayout`]): of the sentences.
            rows (`list[np.ndarray]`): the cells of each sentence.
        """
        asked, places = np.concatenate(rows), np.flatnonzero(layout.mask)
        out = torch.zeros(layout.mask.size, self.width, device=self._send.device)
        own = self._own.of(asked)
        here = own >= 0
        if here.any():
            self._take(out, places[here], own[here])
        if not here.all():
            places, asked = places[~here], asked[~here]
            for of_part, part, scale in self._rest(asked):
                self._receive(out, places[of_part], part, scale)
        return out.view(*layout.shape, self.width)

    def _take(self, out: torch.Tensor, places: np.ndarray, own: np.ndarray):
        """Cells that are on the device, into their places."""
        where, which = self._send(places, own)
        scale = None if self._scales is None else self._scales[which]
        if self._columns is None:
            out.index_copy_(0, where, _normalized(self._values[which], None if scale is None else scale[:, None]))
            return
        lengths = self._starts[own + 1] - self._starts[own]
        total = int(lengths.sum())
        starts = self._starts_there[which]
        sizes = self._starts_there[which + 1] - starts
        cell = torch.repeat_interleave(sizes, output_size=total)
        entries = (starts - sizes.cumsum(0) + sizes)[cell] + torch.arange(total, device=cell.device)
        _spread(out, where, cell, self._columns[entries], self._values[entries], scale)

    def _receive(self, out: torch.Tensor, places: np.ndarray, part, scale: np.ndarray | None):
        """Cells that are sent as gene ids and values, or as narrow rows, into their places."""
        factor = None if scale is None else self._send(scale)[0]
        if not self.sparse:
            dense = part.toarray() if sp.issparse(part) else part
            where, values = self._send(places, dense.astype(self._narrow(dense), copy=False))
            out.index_copy_(0, where, _normalized(values, None if factor is None else factor[:, None]))
            return
        part = _as_csr(part)
        sent = (places, np.diff(part.indptr), part.indices.astype(self._ids), part.data.astype(self._narrow(part.data)))
        where, sizes, columns, values = self._send(*sent)
        _spread(out, where, torch.repeat_interleave(sizes, output_size=part.nnz), columns, values, factor)

    def _narrow(self, values: np.ndarray) -> np.dtype:
        """The dtype of the run's cells, or a wider one for cells that are not of the run."""
        return self._dtype if self._dtype == _SINGLE else _joined(self._dtype, _narrowest(values))


class CellsOnDevice:
    """
    The cells of a run on a device, whole or as many as fit, controls first.

    Args:
        cells ([`Cells`]): the cells.
        device (`torch.device`): where.
        whole (`bool`): keep all, or raise.

    Raises:
        ValueError: with `whole`, they do not fit.
    """

    def __init__(self, cells: Cells, device: torch.device, whole: bool):
        self.device, self.free = device, free_memory(device)
        groups = cells.groups
        spans = [groups.loc[groups["split"] == split] for split in (Split.CONTROL, Split.TRAIN, Split.VAL, Split.TEST)]
        rows = [np.arange(a, b) for of in spans for a, b in of[["start", "stop"]].to_numpy()]
        self.rows = np.concatenate(rows)
        budget = int(self.free * (LARGEST_SHARE if whole else SHARE))
        self.genes = None
        if cells.genes is not None:
            self.genes = RowsOnDevice(CellRows(cells.genes), self.rows, device, budget)
            budget -= self.genes.nbytes
        self.features = RowsOnDevice(CellRows(cells.features), self.rows, device, budget)
        parts = [part for part in (self.features, self.genes) if part is not None]
        self.kept, self.nbytes = min(part.kept for part in parts), sum(part.nbytes for part in parts)
        if whole and self.kept < len(self.rows):
            needed = sum(part.needed for part in parts)
            raise ValueError(
                f"cells_on_device=true: the {counted(len(self.rows), 'cell')} of the run take {in_words(needed)} on {device}, "
                f"expected at most {LARGEST_SHARE:.0%} of its {in_words(self.free)} of free memory; use auto, which keeps as many "
                "as fit"
            )

    def __str__(self) -> str:
        rest = len(self.rows) - self.kept
        sent = f"; {counted(rest, 'cell')} are sent to it batch by batch" if rest else ""
        return (
            f"{self.kept:,} of {counted(len(self.rows), 'cell')} stay on {self.device} ({self.features.layout}), in "
            f"{in_words(self.nbytes)} of {in_words(self.free)} free{sent}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes of memory of a device that are free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else get_max_memory()["cpu"]


def in_words(nbytes: int) -> str:
    """Bytes as MiB, or as GiB where they are many."""
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:,.1f} GiB"


def _looked_at(source: CellRows, rows: np.ndarray) -> tuple[np.ndarray, np.dtype, bool]:
    """How many values of each cell are not 0, the narrowest dtype that holds all exactly, and whether they are counts to scale."""
    stored, dtype, is_scaled = np.zeros(len(rows), dtype=np.int64), _WHOLE[0], False
    for places, part, scale in source.blocks(rows):
        stored[places] = part.getnnz(axis=1) if sp.issparse(part) else np.count_nonzero(part, axis=1)
        dtype = _joined(dtype, _narrowest(part.data if sp.issparse(part) else part))
        is_scaled = is_scaled or scale is not None
    return stored, dtype, is_scaled


def _narrowest(values: np.ndarray) -> np.dtype:
    """The narrowest dtype that holds each of some values exactly, to float32."""
    if values.size == 0:
        return _WHOLE[0]
    if values.dtype.kind in "bui" or np.array_equal(values, np.rint(values)):
        low, high = int(values.min()), int(values.max())
        for dtype in _WHOLE:
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return dtype
    with np.errstate(over="ignore"):
        half = values.astype(_HALF)
    return _HALF if np.array_equal(half.astype(values.dtype), values) else _SINGLE


def _joined(one: np.dtype, other: np.dtype) -> np.dtype:
    """The narrowest dtype that holds the values of both exactly, to float32."""
    if one in _WHOLE and other in _WHOLE:
        return max(one, other, key=_WHOLE.index)
    return one if one == other else _HALF if {one, other} == {_WHOLE[0], _HALF} else _SINGLE


def _as_csr(part) -> sp.csr_matrix:
    return part if sp.issparse(part) else sp.csr_matrix(part)


def _normalized(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Values in the model's units; counts as [`~pertstate.base.cell_values.normalize_counts`] makes them."""
    values = values.float()
    return values if scale is None else (values * scale).log1p_()


def _spread(out, where, cell, columns, values, scale):
    """
    Sparse rows into dense ones.

    Args:
        out (`torch.Tensor` of shape `(places, width)`): zeros.
        where (`torch.Tensor` of shape `(cells,)`): the place of each cell.
        cell (`torch.Tensor` of shape `(values,)`): the number of the cell of each value.
        columns, values (`torch.Tensor` of shape `(values,)`), scale (`torch.Tensor` of shape `(cells,)`, *optional*): the values.
    """
    at = (where * out.shape[1])[cell] + columns
    out.view(-1).scatter_(0, at, _normalized(values, None if scale is None else scale[cell]))
