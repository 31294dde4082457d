"""Numbers that stand for cells: hashes of their barcodes, the same wherever the cells lie."""

import numpy as np
import pandas as pd


def cell_ids(barcodes) -> np.ndarray:
    """
    A number for each barcode, uint64: its hash by pandas, the same on every machine. The lowest bit says whether the barcode
    is a number itself: files often number their cells from 0, so that such a barcode does not tell which cell it is.
    """
    names = pd.Index(barcodes).astype(str)
    hashes = pd.util.hash_array(names.to_numpy(dtype=object), categorize=False)
    numbers = np.asarray(names.str.fullmatch(r"[\d.\-_]+"), dtype=np.uint64)
    return (hashes & ~np.uint64(1)) | numbers


def is_number(ids: np.ndarray) -> np.ndarray:
    """Whether each barcode is a number."""
    return (ids & np.uint64(1)).astype(bool)


def name_id(name: str) -> int:
    """The hash of a name, even, so that it changes no mark of a number."""
    return int(pd.util.hash_array(np.array([name], dtype=object), categorize=False)[0]) & ~1


def mixed(ids: np.ndarray, *seeds: int) -> np.ndarray:
    """Other numbers for these, uint64, that no longer show their order: the finaliser of SplitMix64 (Steele et al. 2014)."""
    mixed = np.asarray(ids, dtype=np.uint64).copy()
    for seed in (0, *seeds):
        mixed += np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def order_of(ids: np.ndarray | None, number: int, seed: int) -> np.ndarray:
    """
    A random order of cells that depends on their ids and the seed alone, not on where they stand; without ids, one that
    depends on the seed.
    """
    if ids is None:
        return np.random.default_rng(seed).permutation(number)
    return np.argsort(mixed(ids, seed), kind="stable")


__all__ = ["cell_ids", "is_number", "mixed", "name_id", "order_of"]
