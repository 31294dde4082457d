"""Reading `.h5ad` files, with one clear error for a file that is not whole."""

import os
from pathlib import Path

import anndata as ad


def expand_paths(pattern: str | os.PathLike) -> list[Path]:
    """The `.h5ad` files that a file, folder or glob names.

    Raises:
        FileNotFoundError: there is none.
    """
    text = os.path.expandvars(os.path.expanduser(str(pattern)))
    path = Path(text)
    if path.is_dir():
        files = sorted(path.glob("*.h5ad"))
    elif any(character in text for character in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in anchor.glob(str(path.relative_to(anchor))) if p.is_file())
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise FileNotFoundError(f"{text}: no such file, folder of .h5ad files or glob (looked from {Path.cwd()})")
    return files


def read_h5ad(path: str | os.PathLike, backed: bool = False) -> ad.AnnData:
    """An AnnData from a file; `backed` leaves the matrices on disk.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole `.h5ad` file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (looked from {Path.cwd()})")
    try:
        return ad.read_h5ad(path, backed="r" if backed else None)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as .h5ad: {type(error).__name__}: {error}. "
            "Expected a whole AnnData file; copy or write it again"
        ) from error
