"""Serving the page of a model."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pertstate.app.answers import check_model
from pertstate.app.cells import Reading, look_at
from pertstate.base.console import say
from pertstate.hub.trained import load


HOST = "127.0.0.1"
# The largest file that somebody may upload, in MB.
MOST_UPLOADED = 500
# The name of the folder that gradio keeps uploads and downloads in.
_CACHE = "GRADIO_TEMP_DIR"


def check_gradio():
    """ImportError that says what to install, if gradio or plotly is missing."""
    try:
        import gradio  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the app needs gradio and plotly: pip install 'pertstate[app]' ({error})") from error


@contextmanager
def served(
    name: str,
    adata: str | os.PathLike | None = None,
    revision: str | None = None,
    host: str = HOST,
    port: int | None = None,
    most_uploaded: int = MOST_UPLOADED,
    device: str | None = None,
) -> Iterator[str]:
    """
    The address at which the page of a model is served in this block. What people upload and what is predicted lies in a
    folder that is gone afterwards.

    Args: see [`serve`].
    """
    if most_uploaded < 1:
        raise ValueError(f"most_uploaded must be at least 1 MB, found {most_uploaded}")
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"port {port}: expected 1 to 65535")
    # Gradio reads this when it is imported: nothing is told to its makers.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    check_gradio()
    trained = load(name, revision, device)
    check_model(trained)
    cells = None if adata is None else Path(os.path.realpath(adata))
    if cells is not None:
        look_at(trained, cells, Reading())
    from pertstate.app.page import CSS, page, theme, without_downloads

    before = os.environ.get(_CACHE)
    with TemporaryDirectory(prefix="pertstate-app-") as folder, without_downloads():
        os.environ[_CACHE] = str(Path(folder) / "cache")
        blocks = page(trained, cells, Path(folder), most_uploaded)
        try:
            yield _launch(blocks, host, port, most_uploaded, theme(), CSS)
        finally:
            blocks.close(verbose=False)
            if before is None:
                del os.environ[_CACHE]
            else:
                os.environ[_CACHE] = before
            shutil.rmtree(folder, ignore_errors=True)


def _launch(blocks, host: str, port: int | None, most_uploaded: int, theme, css: str) -> str:
    """Start the server of a page, and return its address."""
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=most_uploaded << 20,
            # Nothing but what this app makes is served.
            allowed_paths=[],
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            footer_links=[],
            theme=theme,
            css=css,
        )
    except OSError as error:
        where = "7860 to 7959 are" if port is None else f"{port} is"
        raise OSError(
            f"{host}: port {where} in use, or this machine has no such address; name another (--port)"
        ) from error
    return url


def serve(
    name: str,
    adata: str | os.PathLike | None = None,
    revision: str | None = None,
    host: str = HOST,
    port: int | None = None,
    most_uploaded: int = MOST_UPLOADED,
    device: str | None = None,
):
    """
    Serve the page of a model, until a signal ends the process.

    Args:
        name (`str`): folder or Hub repository of a checkpoint or an adapter.
        adata (*optional*): an `.h5ad` with control cells that everybody may use.
        revision (`str`, *optional*): commit, tag or branch of a Hub repository.
        host (`str`): the address to listen at; the default is reached from this machine alone.
        port (`int`, *optional*): by default the first free one from 7860 on.
        most_uploaded (`int`): the largest file that somebody may upload, in MB.
        device (`str`, *optional*): by default the accelerator, where there is one.

    Raises:
        ImportError: gradio is not installed.
        FileNotFoundError, KeyError, ValueError: there is no such model or file; the file does not suit the model.
        OSError: the port is in use.
    """
    with served(name, adata, revision, host, port, most_uploaded, device) as url:
        say(f"{name} answers at {url} (Ctrl+C ends it)")
        while True:
            time.sleep(3600)
