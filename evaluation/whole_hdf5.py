"""An HDF5 file that appears whole or not at all, and a disk that is full at any byte of it."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from pertstate.base.files import saying_disk_errors, whole_file


@contextmanager
def whole_hdf5(output: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """An HDF5 file as of [`whole_file`], and a function that raises the disk's error where a write has failed."""
    with whole_file(output) as partial, open(partial, "w+b", buffering=0) as raw:
        disk = _Disk(raw, output)
        try:
            with h5py.File(disk, "w") as file:
                yield file, disk.check
        finally:
            disk.check()


class _Disk:
    """
    The file object that h5py writes to. HDF5 cannot close a file whose writes fail, and what it reads back of them would be
    memory that nobody has filled, which ends the process. So the error of the disk is kept here, and `check` raises it;
    what is written from then on is kept in memory, where HDF5 finds it again.
    """

    def __init__(self, raw: io.FileIO, output: Path):
        self._raw, self._output = raw, output
        self._error: BaseException | None = None
        self._place = 0
        self._kept: list[tuple[int, bytes]] = []  # where, and what, in the order in which it came

    def check(self):
        if self._error is not None:
            with saying_disk_errors(self._output):
                raise self._error

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self._error is None:
                done += self._raw.write(view[done:])
        except BaseException as error:  # noqa: BLE001 - a signal's, too
            self._error = error
        if self._error is not None:
            self._kept.append((self._place, view.tobytes()))
        self._place += len(view)
        return len(view)

    def truncate(self, size: int) -> int:
        try:
            self._raw.truncate(size)
        except BaseException as error:  # noqa: BLE001 - a signal's, too
            self._error = self._error or error
        return size

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def readinto(self, data) -> int:
        view = memoryview(data).cast("B")
        start, stop = self._place, self._place + len(view)
        done = 0
        while done < len(view) and (read := self._raw.readinto(view[done:])):
            done += read
        view[done:] = bytes(len(view) - done)
        for place, kept in self._kept:
            first, last = max(start, place), min(stop, place + len(kept))
            if first < last:
                view[first - start : last - start] = kept[first - place : last - place]
        self._place = stop
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = self._raw.seek(offset, whence)
        if whence == os.SEEK_END:
            self._place = max([self._place, *(place + len(kept) for place, kept in self._kept)])
        return self._place

    def tell(self) -> int:
        return self._place

    def flush(self):
        """Do nothing, as the file is not buffered."""
