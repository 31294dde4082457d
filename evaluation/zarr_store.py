"""A zarr store whose writes end with the block that makes them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore


class _EndingStore(LocalStore):
    """
    Chunks are written by several threads. Where one of them fails, zarr raises at once, and the others go on: they make
    files, and folders anew, while the caller removes what was written.
    """

    def __init__(self, root: Path):
        super().__init__(root)
        self._change = threading.Condition()
        self._running, self._ended = 0, False

    async def set(self, key: str, value: Buffer) -> None:
        with self._running_write():
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with self._running_write():
            await super().set_if_not_exists(key, value)

    @contextmanager
    def _running_write(self) -> Iterator[None]:
        with self._change:
            if self._ended:
                raise ValueError(f"{self.root} is no longer written")
            self._running += 1
        try:
            yield
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()

    def end(self):
        """Let no write begin, and wait for those that run."""
        with self._change:
            self._ended = True
            self._change.wait_for(lambda: self._running == 0)


@contextmanager
def ending_with_its_block(folder: Path) -> Iterator[LocalStore]:
    """A store in a folder. No file is written to it once the block has ended, with an error or without."""
    store = _EndingStore(folder)
    try:
        yield store
    finally:
        store.end()
