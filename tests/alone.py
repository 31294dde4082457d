"""A process that has only what a checkpoint needs to predict. Pertstate and its other dependencies are absent."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


# All that the README asks a user of a checkpoint to install.
NEEDED = ("transformers", "torch", "safetensors", "numpy", "anndata")

# Reads a task from each line and runs it in a fork. So the slow imports are done once, and no task sees what another did.
_SERVER = """
import json, os, sys, traceback
sys.modules.update(dict.fromkeys(json.loads(sys.argv[1])))
import anndata, torch
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin
torch.set_num_threads(1)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(task[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.argv = ["alone", *task["arguments"]]
        code = 1
        try:
            exec(compile(task["script"], "alone", "exec"), {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def needed_distributions(*also: str) -> set[str]:
    """The canonical names of the distributions that are installed with `NEEDED` and with these."""
    found, wanted = set(), [(name, "") for name in (*NEEDED, *also)]
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(canonicalize_name(requirement.name), of) for of in ("", *requirement.extras)]
    return {name for name, _ in found}


def blocked_modules(*also: str) -> list[str]:
    """The modules of all other distributions of this environment, with those of pertstate."""
    needed = needed_distributions(*also)
    owners = importlib.metadata.packages_distributions()
    others = {module for module, of in owners.items() if needed.isdisjoint(map(canonicalize_name, of))}
    return sorted(others | {"pertstate", "pertstate.cli"})


class Alone:
    """
    Runs scripts where [`blocked_modules`] cannot be imported. A context manager.

    Args:
        folder (`Path`): an empty folder, the scripts' working directory and cache.
        also (`str`): further distributions that are there.
    """

    def __init__(self, folder: Path, *also: str):
        self.folder = folder
        self._log = (folder / "server").open("w")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, json.dumps(blocked_modules(*also))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd=folder,
            text=True,
        )

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_):
        # There is nothing to finish, and torch takes seconds to end.
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def run(self, script: str, *arguments) -> str:
        """
        Run a script and return what it printed. It finds the arguments in `sys.argv[1:]`.

        Raises:
            RuntimeError: the script failed. The error holds the end of its output.
        """
        files = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        task = {"script": script, "arguments": [str(argument) for argument in arguments], **files}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline().strip()
        if code != "0":
            said = Path(files["stderr"] if code else self.folder / "server").read_text()
            raise RuntimeError(f"the script ended with {code or 'its server'}:\n{said[-3000:]}")
        return Path(files["stdout"]).read_text()
