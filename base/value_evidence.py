"""Evidence of what values are: sums of cells under several logarithms, and whether they were whole counts once."""

import numpy as np
import pandas as pd
import scipy.sparse as sp


# log1p of 10,000 counts per cell stays below 9.3, and below 16 for any total in use.
LARGEST_LOG1P = 20.0
_LARGEST_OF_ANY_TOTAL = 16.0
# A million is the largest total in use.
_NO_TOTAL = 1e7
# Cells of each block that are looked at closely, those of all blocks, and about how many of their values are kept.
CELLS_OF_BLOCK = 128
CELLS_OF_ALL = 1024
# The depth of cells is measured on blocks until so many cells were seen.
CELLS_OF_DEPTHS = 2000
VALUES_OF_ALL = 1 << 20

# Sums of cells are one total if two things hold: they spread by at most this part of their median, and the sums under the
# alternative (with or without a logarithm) spread ten times as far. The second number is the rounding of single precision.
_SAME_SUM, _ROUNDING = 0.01, 1e-5
# Values near each other, as ratios, are whole multiples of a cell's smallest value by so much.
_WHOLE = 0.02
_LARGEST_MULTIPLE = 10
# Shares of values that are whole multiples.
_WERE_COUNTS, _ARE_COUNTS_TIMES = 0.5, 0.8
# A scale of a mixture has this share of the cells, and all its scales together that one; at most so many scales are told.
_SHARE_OF_SCALE, _SHARE_OF_SCALES, _MOST_SCALES = 0.05, 0.95, 5
_CELLS_OF_SCALE = 5
# Fewer rounded values of a cell may be whole by chance.
_GENES_OF_COUNTS = 4
# Totals of two scales differ by more than this part.
_OTHER_SUM = 0.05
# See Evidence.are_fractional_counts.
_WHOLE_SHARE = 0.05
_ORDERS = 3.0
_STEADY = 0.2
_SPREAD, _GENES_SPREAD = 0.8, 0.3
_WITH_DEPTH, _SLOPE = 0.8, 0.9
_FEWEST_CELLS, _FEWEST_VALUES = 20, 20


def inverse_log1p(values: np.ndarray, base: float | None = None) -> np.ndarray:
    """The x of `values = log(1 + x) / log(base)`, float64; the base None is e."""
    values = values.astype(np.float64)
    return np.expm1(values if base is None else values * np.log(base))


def stored(matrix) -> np.ndarray:
    """The stored values of a sparse matrix, all of a dense one."""
    return matrix.data if sp.issparse(matrix) else np.asarray(matrix)


def row_sums(matrix, values: np.ndarray | None = None) -> np.ndarray:
    """Sums of the rows, float64; with other values in the places of the stored ones."""
    if values is not None:
        matrix = sp.csr_matrix((values, matrix.indices, matrix.indptr), matrix.shape) if sp.issparse(matrix) else values
    return np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()


def rows_of(matrix, number: int):
    """At most so many rows of a matrix, CSR or dense, evenly spaced."""
    return matrix[np.unique(np.linspace(0, matrix.shape[0] - 1, min(number, matrix.shape[0])).astype(np.int64))]


class Evidence:
    """
    What a few numbers of some cells say. Thresholds were set on Kang 2018, Papalexi 2021 and Norman 2019 (all genes; 2,000,
    200, 50 and 15 of the most variable or of any; as they are and thinned to 1 count in 50) and on simulated cells of 30 to
    30,000 counts, each as whole counts, as seven kinds of fractional ones (subtracted or scaled ambient RNA, by gene or cell;
    shared out between genes; means of neighbours, equal or weighted), and as log1p of all these.

    **One sum.** Cells of values normalised to a total sum to it, under the logarithm that was taken. At least three cells;
    identical cells, which have one sum under any logarithm, say nothing.

    **Whole multiples.** What log1p was taken of is, in a cell, a whole multiple of its smallest value if it was counts. Of
    values up to ten times the smallest, 51 to 100% are, of 15 to all genes; under another logarithm, or of values that never
    were counts, 0 to 21%. Half is asked for.

    **Fractional counts** are told by [`are_fractional_counts`].

    **Mixtures** of cells that were scaled to different totals, or not at all, are told by [`mixture`].

    Args:
        log_base (`float`, *optional*): the base that the data name.
    """

    def __init__(self, log_base: float | None = None):
        self.log_base = log_base
        self.bases = list(dict.fromkeys([log_base, None, 2.0, 10.0]))
        self.smallest, self.largest = 0.0, 0.0
        # Of the cells that are looked at closely and have values that are not whole.
        self.largest_fractional = 0.0
        self.all_whole = True
        self.whole_cells = 0
        self.cells = 0
        self._room = VALUES_OF_ALL
        self._linear: list[np.ndarray] = []
        self._whole: list[np.ndarray] = []
        self._depths: dict[str, list[np.ndarray]] = {"counts": [], "genes": []}
        self._cells_of_depths = 0
        self._values: list[np.ndarray] = []
        self._genes: list[np.ndarray] = []
        self._whole_values = np.zeros(2)
        self._known: dict = {}

    def add(self, matrix) -> None:
        """Look at some cells, `(cells, genes)` sparse or dense."""
        if sp.issparse(matrix):
            matrix = matrix.tocsr()
            if not matrix.has_canonical_format:  # an entry may be stored in several parts
                matrix = matrix.copy()
                matrix.sum_duplicates()
        values = stored(matrix)
        if not values.size:
            return
        if values.dtype.kind == "b":
            matrix, values = matrix.astype(np.uint8), values.view(np.uint8)
        # NaN, once met, stays in both.
        self.smallest = float(np.minimum(self.smallest, values.min()))
        self.largest = float(np.maximum(self.largest, values.max()))
        self.all_whole = self.all_whole and _are_whole(values)
        if self.smallest == 0 and self._cells_of_depths < CELLS_OF_DEPTHS:
            self._add_depths(matrix)
        room = min(CELLS_OF_BLOCK, CELLS_OF_ALL - self.cells)
        if self.smallest == 0 and room > 0 and self._room > 0:
            before = self.cells
            self._look_closely(rows_of(matrix, room))
            if self.cells == before and self.largest > 0:
                # All of those chosen are empty.
                self._look_closely(rows_of(matrix[np.flatnonzero(row_sums(matrix))], room))

    def _add_depths(self, matrix) -> None:
        """Counts and genes of the cells that have any."""
        counts = row_sums(matrix)
        genes = np.diff(matrix.indptr) if sp.issparse(matrix) else np.count_nonzero(matrix, axis=1)
        if sp.issparse(matrix) and not matrix.data.all():
            before = np.concatenate([[0], np.cumsum(matrix.data != 0)])
            genes = np.diff(before[matrix.indptr])
        self._depths["counts"].append(counts[genes > 0])
        self._depths["genes"].append(genes[genes > 0])
        self._cells_of_depths += int(np.count_nonzero(genes))

    def _look_closely(self, matrix) -> None:
        if sp.issparse(matrix):
            values, genes = matrix.data, np.diff(matrix.indptr)
            positive = values > 0
            if not positive.all():
                before = np.concatenate([[0], np.cumsum(positive)])
                genes, values = np.diff(before[matrix.indptr]), values[positive]
        else:
            positive = matrix > 0
            values, genes = matrix[positive], positive.sum(axis=1)
        genes = genes[genes > 0]
        if not len(genes):
            return
        starts = _starts(genes)
        whole = values == np.rint(values)
        whole_cells = np.logical_and.reduceat(whole, starts)
        self.cells += len(genes)
        self.whole_cells += int(whole_cells.sum())
        self._whole_values += whole.sum(), len(whole)
        self._whole.append(whole_cells & (genes >= _GENES_OF_COUNTS))
        self._linear.append(np.add.reduceat(values, starts, dtype=np.float64))
        if whole_cells.all():
            return
        if whole_cells.any():
            values, genes = values[np.repeat(~whole_cells, genes)], genes[~whole_cells]
        self.largest_fractional = max(self.largest_fractional, float(values.max()))
        self._room -= len(values)
        self._values.append(values)
        self._genes.append(genes)
        self._known = {}

    def _once(self, key, make):
        """What `make` gives, made once for the cells added so far."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _genes_of_fractional(self) -> np.ndarray:
        return self._once("genes", lambda: np.concatenate(self._genes) if self._genes else np.empty(0, np.int64))

    def _fractional(self, name: "str | float | None" = "linear") -> np.ndarray:
        """Positive values of the cells whose values are not all whole, as they are or after a logarithm is undone."""

        def make():
            values = np.concatenate(self._values) if self._values else np.empty(0)
            return values.astype(np.float64) if name == "linear" else inverse_log1p(values, name)

        return self._once(("values", name), make)

    def _sums(self, name: "str | float | None") -> np.ndarray:
        """Sums of cells: of all as they are, or of those that are not whole after a logarithm is undone."""
        if name == "linear":
            return np.concatenate(self._linear) if self.cells else np.empty(0)
        starts = _starts(self._genes_of_fractional())
        values = self._fractional(name)
        return self._once(("sums", name), lambda: np.add.reduceat(values, starts) if len(starts) else values)

    def _spread_of_sums(self, name: "str | float | None") -> float:
        return self._once(("spread", name), lambda: _spread(self._sums(name)))

    def _smallest_values(self) -> np.ndarray:
        """The smallest value of each cell."""
        return self._once(
            "units", lambda: np.minimum.reduceat(self._fractional(), _starts(self._genes_of_fractional()))
        )

    def _quartiles(self) -> np.ndarray:
        """The lower quartile of the values of each cell."""
        genes = self._genes_of_fractional()
        # A number for each cell, larger than any value, keeps the cells apart.
        apart = np.repeat(np.arange(len(genes)) * (self.largest_fractional + 1), genes)
        return (np.sort(self._fractional() + apart) - apart)[_starts(genes) + (genes - 1) // 4]

    def _multiples(self, name: "str | float | None") -> float:
        """The share of values that are whole multiples of a cell's smallest one."""

        def make():
            genes = self._genes_of_fractional()[:CELLS_OF_BLOCK]
            if not len(genes):
                return 0.0
            values, starts = self._fractional(name)[: genes.sum()], _starts(genes)
            return _whole_share(values / np.repeat(np.minimum.reduceat(values, starts), genes))

        return self._once(("multiples", name), make)

    def median(self, name: str) -> float | None:
        """Median over cells that have any: of their `"counts"`, or of their expressed `"genes"`."""
        return float(np.median(np.concatenate(self._depths[name]))) if self._cells_of_depths else None

    def range_of_sums(self, name: "str | float | None", low: float = 5, high: float = 95) -> tuple[float, float]:
        """Two percentiles of the sums of cells: `"linear"`, as they are, or after the logarithm to a base is undone."""
        below, above = np.percentile(self._sums(name), [low, high])
        return float(below), float(above)

    def one_sum(self, name: "str | float | None") -> float | None:
        """The total that all cells sum to, as they are (`"linear"`) or after a logarithm is undone; None if there is none."""
        spread = self._spread_of_sums(name)
        if spread > _SAME_SUM:
            return None
        # Cells that are alike have one sum under any logarithm, and without one.
        if name != "linear" or self.largest_fractional <= LARGEST_LOG1P:
            other = self._spread_of_sums(None if name == "linear" else "linear")
            if other < 10 * max(spread, _ROUNDING):
                return None
        total = float(f"{np.median(self._sums(name)):.6g}")
        # Under a base that is too large, a cell's largest value is nearly all of its sum, and may be rounded.
        return total if name == "linear" or total <= _NO_TOTAL else None

    def mixture(self) -> "list[tuple[str | float | None, float | None, int]]":
        """
        The scales of a mixture: the name (`"linear"` or the base of a logarithm), the total, and the number of cells of each;
        `"counts"` without a total for cells of whole counts. Empty where the cells are no mixture, or none of them is log1p.

        Each scale is one sum, as of [`one_sum`], of at least five cells and 5% of those that are not whole. Together they have
        95% of these. Their totals lie apart: sums that spread evenly make scales side by side. Cells of whole counts
        are also told beside log1p values that have no total.
        """
        starts = _starts(self._genes_of_fractional())
        number = len(starts)
        whole = self._sums("linear")[np.concatenate([*self._whole, []]).astype(bool)]
        bases = self.bases if self.largest_fractional <= LARGEST_LOG1P else []
        alike = any(self.one_sum(name) is not None for name in ("linear", *bases))
        if not number or (alike and len(whole) < _CELLS_OF_SCALE):
            return []
        with np.errstate(over="ignore"):  # of values without a logarithm
            sums: dict[str | float | None, np.ndarray] = {name: self._sums(name) for name in self.bases}
        sums["linear"] = np.add.reduceat(self._fractional(), starts)
        totals: list[tuple[str | float | None, float, int]] = []
        left = np.arange(number)
        for _ in range(_MOST_SCALES):
            scales = [(name, _one_sum_among(sums, name, left)) for name in sums]
            name, cells = max(scales, key=lambda scale: len(scale[1]))
            if len(cells) < max(_CELLS_OF_SCALE, _SHARE_OF_SCALE * number):
                break
            totals.append((name, float(f"{np.median(sums[name][cells]):.6g}"), len(cells)))
            left = np.setdiff1d(left, cells)
        found: list[tuple[str | float | None, float | None, int]] = [*totals]
        if not totals or len(left) > (1 - _SHARE_OF_SCALES) * number:
            base, *_ = self.logarithm()
            totals, found = [], [(base, None, number)] if self.are_log1p_of_counts(base) else []
        for i, (name, total, _) in enumerate(totals):
            if any(name == of and abs(total / other - 1) < _OTHER_SUM for of, other, _ in totals[:i]):
                return []
        # Values that were scaled to a total without a logarithm may be whole.
        linear = [total for name, total, _ in totals if name == "linear"]
        whole = whole[[all(abs(of / total - 1) > _OTHER_SUM for total in linear) for of in whole]]
        if len(whole) >= _CELLS_OF_SCALE:
            found.append(("counts", None, len(whole)))
        # Without a logarithm among them, all cells can be scaled to one total.
        return found if len(found) > 1 and {name for name, *_ in found} - {"counts", "linear"} else []

    def logarithm(self) -> tuple[float | None, float | None, bool]:
        """The base, the total, and whether both are certain. Certain without a total: counts that were not scaled."""
        if self.largest_fractional > LARGEST_LOG1P:
            return self.log_base, None, False
        for base in self.bases:
            total = self.one_sum(base)
            if total is not None:
                return base, total, True
        # Decimals of rounded values look like multiples to the base 10: 10^0.3 is nearly 2.
        possible = [
            b
            for b in self.bases
            if b in (self.log_base, None) or self.largest_fractional * np.log(b) < _LARGEST_OF_ANY_TOTAL
        ]
        base = max(possible, key=self._multiples)  # the stated one, then e, of equals
        if not self.are_log1p_of_counts(base):
            return self.log_base, None, False
        return base, None, bool(_whole_share(self._fractional(base)) > 0.9)

    def are_log1p_of_counts(self, base: float | None) -> bool:
        """Whether values are log1p, to a base, of whole counts times a number of the cell."""
        return self.largest_fractional <= LARGEST_LOG1P and self._multiples(base) >= _WERE_COUNTS

    def are_scaled_counts(self) -> bool:
        """
        Whether values are whole counts times a number of the cell that makes deep and shallow cells alike: normalised. It is
        larger than 1, or smaller where more genes are expressed; a number that corrects counts is neither.
        """
        if self._multiples("linear") < _ARE_COUNTS_TIMES:
            return False
        units = self._smallest_values()
        if _spread(units) < _SAME_SUM:
            return False
        return bool(np.median(units) > 1) or _correlation(units, self._genes_of_fractional()) < -0.3

    def are_fractional_counts(self, base: float | None) -> bool:
        """
        Whether values that are small enough for log1p, and are not log1p of whole counts, are fractional counts. Any one of:

        - 5% of values are whole. Values that are log1p never are; counts shared out between genes are to 30% and more.
        - They are whole multiples of a cell's smallest value as they are (80%; log1p values to 6%).
        - Sums of cells after the logarithm is undone are larger than any total in use (the 95th percentile is above 10 million),
          or lie 3 orders of magnitude apart (5th to 95th percentile). Of log1p values
          over part of the genes, 2.2 at most (the most variable genes of three glioma lines and K562 together).
        - A cell's small values (lower quartile, logarithm undone) are the same in all cells although the sums are not: the
          range of the one's logarithms is less than 0.2 of the other's (0.25 at most of corrected counts, mostly below 0.1).
          What one molecule counts after normalising differs with depth: 0.4 at least of log1p values, 0.24 where all cells
          have one depth.
        - Sums grow with the number of genes: a rank correlation of 0.8 (log1p values: 0.68 at most) and in proportion. Means
          of counts over neighbours are told by this alone.

        The last two need 20 cells and sums that differ by a factor of 2 at least.
        """
        if (
            self._whole_values[0] > _WHOLE_SHARE * self._whole_values[1]
            or self._multiples("linear") >= _ARE_COUNTS_TIMES
        ):
            return True
        sums, genes = self._sums(base), self._genes_of_fractional()
        if len(sums) < _FEWEST_CELLS:
            return False
        low, high = np.percentile(sums, [5, 95])
        if high > _NO_TOTAL or high > low * 10**_ORDERS:
            return True
        many, quartile = genes >= 4, inverse_log1p(self._quartiles(), base)
        sums, genes, quartile = sums[many], genes[many], quartile[many]
        if len(sums) < _FEWEST_CELLS or _range(sums) < _SPREAD:
            return False
        if _range(quartile) < _STEADY * _range(sums):
            return True
        if _range(genes) < _GENES_SPREAD or _correlation(sums, genes) < _WITH_DEPTH:
            return False
        return bool(np.polyfit(np.log(genes), np.log(sums), 1)[0] > _SLOPE)


def _are_whole(values: np.ndarray) -> bool:
    """Whether all values are whole numbers. Read in pieces: the first piece mostly shows it if they are not."""
    if values.dtype.kind in "iu":
        return True
    values = values.ravel()
    for start in range(0, len(values), 1 << 16):
        part = values[start : start + (1 << 16)]
        if not np.array_equal(part, np.rint(part)):
            return False
    return True


def _starts(genes: np.ndarray) -> np.ndarray:
    """Where each cell's values start, from how many there are."""
    return np.cumsum(genes) - genes


def _whole_share(ratios: np.ndarray) -> float:
    """The share of whole numbers among ratios up to 10 that are not near 1; 0 if there are too few."""
    ratios = ratios[ratios < _LARGEST_MULTIPLE]
    whole = np.abs(ratios - np.rint(ratios)) <= _WHOLE
    right, wrong = np.count_nonzero(whole & (ratios > 1.5)), np.count_nonzero(~whole)
    return right / (right + wrong) if right + wrong >= _FEWEST_VALUES else 0.0


def _spread(values: np.ndarray) -> float:
    """How far values lie apart, as a part of their median; infinite for too few."""
    return float(np.ptp(values) / np.median(values)) if len(values) > 2 else np.inf


def _one_sum_among(sums: dict, name: "str | float | None", cells: np.ndarray) -> np.ndarray:
    """Those of some cells that make the largest scale: one sum under a logarithm, and no single sum under the alternative."""
    others = sums[None if name == "linear" else "linear"]
    ordered = cells[np.argsort(sums[name][cells])]
    ordered = ordered[sums[name][ordered] <= (np.inf if name == "linear" else _NO_TOTAL)]
    among = sums[name][ordered]
    ends = np.searchsorted(among, among * (1 + _SAME_SUM), side="right")
    first = int(np.argmax(ends - np.arange(len(ordered)))) if len(ordered) else 0
    alike = slice(first, ends[first] if len(ordered) else 0)
    other = others[ordered[alike]]
    spread = _spread(other) if np.isfinite(other).all() else np.inf
    return ordered[alike] if spread >= 10 * max(_spread(among[alike]), _ROUNDING) else ordered[:0]


def _range(values: np.ndarray) -> float:
    """How far logarithms of values lie apart, 10th to 90th percentile."""
    low, high = np.percentile(np.log(values), [10, 90])
    return float(high - low)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; 0 where there is none."""
    ranks = [pd.Series(values).rank().to_numpy() for values in (one, other)]
    if min(np.ptp(r) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])
