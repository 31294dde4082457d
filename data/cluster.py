"""Work on a Dask cluster, whose machines see the files under the same names."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from importlib.util import find_spec
from typing import Any

from pertstate.base.processes import LostProcessError


# A cluster that has no worker yet is waited for so many seconds.
_WAIT = 60
# A scheduler answers within so many seconds.
_ANSWER = 15


def on_cluster(address: str, jobs: Sequence[Callable[[], Any]], done: Callable[[int], object]) -> list:
    """
    The results of jobs, in their order. A job whose worker dies is done again by another one, so it must be one that can be done twice.

    Args:
        address (`str`): of the scheduler, such as `tcp://host:8786`, or the path of its scheduler file.
        jobs (`Sequence[Callable]`): what is pickled and called.
        done (`Callable`): is called with the number of each job that has ended.

    Raises:
        ImportError: the package `distributed` is absent.
        OSError: no scheduler answers, or it has no workers.
        LostProcessError: the workers of a job died again and again, or the scheduler did.
        The first error of a job.
    """
    check_distributed()
    from distributed import Client, KilledWorker, as_completed

    try:
        known = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
        client = Client(**known, set_as_default=False, timeout=_ANSWER)
    except (OSError, ValueError) as error:
        raise OSError(
            f"no Dask scheduler answers at {address} ({error}); start one with 'dask scheduler', and its workers with 'dask worker ADDRESS'"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WAIT)
        except TimeoutError as error:
            raise OSError(
                f"the Dask scheduler at {address} has had no workers for {_WAIT} s; start some with 'dask worker {address}'"
            ) from error
        futures = {client.submit(job, pure=False, key=f"pertstate-{i}-{id(jobs)}"): i for i, job in enumerate(jobs)}
        results: list = [None] * len(jobs)
        try:
            for future in as_completed(futures, loop=client.loop):
                results[futures[future]] = future.result()
                done(futures[future])
        except (KilledWorker, CancelledError) as error:
            raise LostProcessError from error
        return results


def check_distributed():
    """ImportError if the package that speaks with a cluster is absent."""
    if find_spec("distributed") is None:
        raise ImportError(
            "a Dask cluster needs the package distributed; install it with: pip install 'pertstate[dask]'"
        )
