"""One clear error for whatever the Hub or the network refuses."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


_NO_RIGHTS = (PermissionError, "this token may not do that; log in with another (hf auth login)")
_CONFLICT = (OSError, "the repository changed at the same time; look at what came in and try again")
_OF_STATUS = {
    401: _NO_RIGHTS,
    403: _NO_RIGHTS,
    409: _CONFLICT,
    412: _CONFLICT,
    429: (OSError, "too many requests; wait and try again"),
}


@contextmanager
def on_the_hub(name: str, what: str) -> Iterator[None]:
    """
    Turns what the Hub refuses in the block into one clear error. No message holds a token.

    Args:
        name (`str`): of the repository, with its revision if it has one.
        what (`str`): what may be missing there, in the words of the error: "model or revision".

    Raises:
        FileNotFoundError: the Hub has no such thing; or the Hub is not asked, and the cache has none.
        PermissionError: the token may not read (or write) it.
        OSError: the Hub cannot be reached, is switched off (`HF_HUB_OFFLINE`), or has another problem.
    """
    try:
        yield
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _explained(name, what, error) from error
    except RuntimeError as error:
        # When the upload of a large file fails, the client raises an error of its own, whose cause says why.
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise _explained(name, what, error.__cause__) from error


def _explained(name: str, what: str, error: Exception) -> OSError:
    if isinstance(error, OfflineModeIsEnabled):
        return OSError(f"{name}: HF_HUB_OFFLINE keeps this process away from the Hub; unset it and try again")
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{name}: this {what} is not in the cache, and {constants.ENDPOINT} was not asked or cannot be reached; unset "
            "HF_HUB_OFFLINE, check the network and try again"
        )
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
        said = error.server_message if isinstance(error, HfHubHTTPError) else None
        return FileNotFoundError(
            f"{name}: the Hub has no such {what}, or it is private and you are not logged in (hf auth login): {said or error}"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        kind, why = _OF_STATUS.get(status, (OSError, "try again later"))
        return kind(f"{name}: the Hub answers {status}, {why}: {error.server_message or ''}")
    return OSError(
        f"{name}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error}); check the network and try again"
    )
