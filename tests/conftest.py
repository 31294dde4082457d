import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import CHROMIUM


# Without a GPU, its kernels are run by Triton's interpreter. Triton is told so before anything imports it.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch


SHARED = Path(os.environ.get("PERTSTATE_SHARED", Path(__file__).parents[1] / "../shared")).resolve()


@pytest.fixture(autouse=True)
def _one_thread():
    """Set one thread before each test. Tiny tensors only lose time on several, and numba, in scanpy, resets the number."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave out tests whose reference data, browser or package is not there, and say so in one line."""
    absent = [] if SHARED.is_dir() else ["shared"]
    absent += [] if CHROMIUM else ["browser"]
    absent += [] if HAS_CELL_EVAL else ["cell_eval"]
    absent += [] if HAS_OPTUNA else ["optuna"]
    absent += [] if HAS_DASK else ["dask"]
    absent += [] if HAS_ATHERIS else ["guided"]
    left_out = [item for item in items if any(map(item.get_closest_marker, absent))]
    if left_out:
        items[:] = [item for item in items if not any(map(item.get_closest_marker, absent))]
        config.hook.pytest_deselected(items=left_out)
    # The longest test first, so that the other workers need not wait for it at the end.
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


# The kernels for a GPU need the compiler that comes with torch for GPUs: `make test-kernels` installs it.
HAS_TRITON = find_spec("triton") is not None
collect_ignore = [] if HAS_TRITON else ["losses/test_energy_kernels.py", "losses/test_sinkhorn_kernels.py"]
# It brings much along, so it is no part of the environment of developers: `make test-cell-eval` installs it.
HAS_CELL_EVAL = find_spec("cell_eval") is not None
HAS_OPTUNA = find_spec("optuna") is not None
HAS_DASK = find_spec("distributed") is not None
# The page of the app is made with gradio: `make test-app` installs it.
HAS_GRADIO = find_spec("gradio") is not None
collect_ignore += [] if HAS_GRADIO else ["app/test_page.py", "app/test_served_space.py"]
# `make fuzz` installs the fuzzer that is guided by coverage.
HAS_ATHERIS = find_spec("atheris") is not None


def pytest_terminal_summary(terminalreporter, config):
    if not HAS_TRITON:
        terminalreporter.write_line(
            "the tests of the kernels for a GPU were left out: no triton; make test-kernels runs them"
        )
    if not HAS_CELL_EVAL:
        terminalreporter.write_line("the tests of cell-eval were left out: it is absent; make test-cell-eval runs them")
    if not HAS_OPTUNA:
        terminalreporter.write_line(
            "the tests of searches with optuna were left out: it is absent; the extra tune has it"
        )
    if not HAS_DASK:
        terminalreporter.write_line("the tests of a Dask cluster were left out: no distributed; the extra dask has it")
    if not HAS_ATHERIS:
        terminalreporter.write_line("the test of the guided fuzzer was left out: no atheris; make test-fuzzer runs it")
    if not HAS_GRADIO:
        terminalreporter.write_line("the tests of the app's page were left out: no gradio; make test-app runs them")
    # The number of tests is not said: with several workers, the process that reports does not collect the tests.
    if not SHARED.is_dir():
        terminalreporter.write_line(f"the tests that read reference data were left out: no folder {SHARED}")
    if not CHROMIUM:
        terminalreporter.write_line("the tests of pages in a browser were left out: no chromium")


@pytest.fixture
def shared() -> Path:
    """The folder of reference outputs and real data."""
    return SHARED


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """An [`Alone`], which runs scripts as for somebody who installed what a checkpoint needs, but not pertstate."""
    from alone import Alone

    with Alone(tmp_path_factory.mktemp("alone")) as process:
        yield process


@pytest.fixture(scope="module")
def cluster():
    """A Dask cluster of two workers on this machine, whose processes end with the tests of a module."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as started:
        yield started


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """
    A [`HubServer`] of this test with the user "ada". All clients are pointed at it, with an empty cache and her token.

    Processes that the test starts get these settings from their environment. In this process, `huggingface_hub` has them,
    because it reads the values changed here at each call. `transformers` and `datasets` keep what they read when they were
    imported, so code that reaches the Hub through them belongs in a process of its own.
    """
    # Only the tests that ask for a Hub need its web framework.
    import huggingface_hub
    from hub_server import HubServer

    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    home = tmp_path / "hf_home"
    with HubServer(tmp_path / "hub") as server:
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": server.add_user("ada", organizations=("lab",)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        yield server
    assert server.crashes == []
