"""
Processes for the tests, forked from one that has made all imports. A start takes hundredths of a second instead of ten seconds.

[`run`] and [`start`] take what would follow `python` on a command line. Tests of imports, of the start itself or of the
memory of a process need a real process.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import cache
from pathlib import Path


ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "train.py")

# Libraries read these variables when they are imported. A process that has other values than the test session is forked
# before those imports, and makes them itself.
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
# Made first: none of these modules reads such a variable.
FIRST_IMPORTS = ("torch._dynamo", "torch.distributed.tensor", "anndata", "scipy.stats", "pyarrow.dataset")
FURTHER_IMPORTS = ("accelerate", "datasets", "peft", "transformers.trainer")


def environment(**extra: str) -> dict[str, str]:
    """The environment of this process, but offline and with one thread, so that sums have one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **extra}


def _read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


# The environment of the session, taken before any test changes it.
_ENVIRONMENT = environment()


# For tests


class Launched:
    """
    A process forked for a test, with a small part of `subprocess.Popen`. It ends with the test session at the latest.

    Attributes:
        pid (`int`): its id, and that of its process group.
        stdin, stdout, stderr: its streams, as text.
    """

    def __init__(self, words: list[str], env: dict[str, str] | None = None, cwd: str | Path | None = None):
        self.words, env = [str(word) for word in words], environment() if env is None else env
        (his_in, my_in), (my_out, his_out), (my_err, his_err) = os.pipe(), os.pipe(), os.pipe()
        self.stdin, self.stdout, self.stderr = open(my_in, "w"), open(my_out), open(my_err)
        control, his_control = socket.socketpair()
        his = (his_control.detach(), his_in, his_out, his_err)
        _server().fork(his, imported=_read_at_import(env) == _read_at_import(_ENVIRONMENT))
        for descriptor in his:
            os.close(descriptor)
        self._control = control.makefile("rw")
        print(
            json.dumps({"words": self.words, "env": env, "cwd": str(cwd or os.getcwd())}),
            file=self._control,
            flush=True,
        )
        control.close()
        self.pid = self._answer()

    def _answer(self) -> int:
        line = self._control.readline()
        if not line:
            raise RuntimeError(f"the server of tests/launches.py has ended:\n{_server().said()}")
        return int(line)

    def wait(self) -> int:
        """Wait for the end of the process. Returns its exit code, or `-n` if signal n ended it."""
        code = self._answer()
        self._control.close()
        return code

    def kill(self) -> subprocess.CompletedProcess:
        """Kill it and the processes that it started."""
        os.killpg(self.pid, signal.SIGKILL)
        return self.communicate()

    def communicate(self, text: str = "") -> subprocess.CompletedProcess:
        """Give the process a text to read. Returns all that it prints, and its exit code."""
        with self.stdin, self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            said = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            self.stdin.write(text)
            self.stdin.close()
            return subprocess.CompletedProcess(self.words, self.wait(), *(text.result() for text in said))


def start(words: list, env: dict[str, str] | None = None, cwd: str | Path | None = None) -> Launched:
    """Start `python *words` in `env` (default [`environment`]) and `cwd` (default this process's)."""
    return Launched(words, env, cwd)


def run(words: list, env: dict[str, str] | None = None, cwd: str | Path | None = None) -> subprocess.CompletedProcess:
    """Run `python *words`. Returns what it prints, and its exit code."""
    return start(words, env, cwd).communicate()


def run_together(words: list, count: int = 2, **extra: str) -> subprocess.CompletedProcess:
    """
    Run `count` processes that find one another over gloo, as `accelerate launch --multi_gpu --num_processes COUNT` starts
    them. When one fails, the others are killed. `extra` are further variables of their environment.

    Returns:
        What the processes printed, joined in the order of their ranks, and the first exit code that was not 0.
    """
    from torch.distributed import TCPStore

    # As under torchrun, this process holds the store in which they meet; the system chooses a free port for it.
    store = TCPStore("127.0.0.1", 0, world_size=count, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        **extra,
    }
    ranks = [start(words, environment(RANK=str(i), LOCAL_RANK=str(i), **common)) for i in range(count)]
    first = 0
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(rank.communicate) for rank in ranks]
        for future in as_completed(futures):
            if future.result().returncode and not first:
                first = future.result().returncode
                for rank in ranks:
                    with suppress(ProcessLookupError):  # of those that have ended
                        os.killpg(rank.pid, signal.SIGKILL)
    done = [future.result() for future in futures]
    return subprocess.CompletedProcess(
        words, first, *("".join(getattr(d, s) for d in done) for s in ("stdout", "stderr"))
    )


@cache
def _server() -> "Server":
    return Server()


class Server:
    """Two processes that fork, one after the first imports and one after all of them. They end when this process does."""

    def __init__(self):
        self._log = tempfile.TemporaryFile("w+")
        (self._first, first), (self._all, other) = (socket.socketpair() for _ in range(2))
        numbers = [end.fileno() for end in (first, other)]
        words = [sys.executable, __file__, *map(str, numbers)]
        subprocess.Popen(
            words, pass_fds=numbers, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=_ENVIRONMENT
        )
        first.close()
        other.close()

    def fork(self, descriptors: tuple[int, ...], imported: bool):
        """Ask for a forked process. It reads its task from the first descriptor; the others are its streams."""
        socket.send_fds(self._all if imported else self._first, [b"."], descriptors)

    def said(self) -> str:
        """What the server itself printed: errors of its imports."""
        self._log.seek(0)
        return self._log.read()[-3000:]


# In the server


def _serve(requests: socket.socket):
    """Fork for each request, until the tests' process has ended."""
    gc.collect()
    gc.freeze()  # a collection in a fork then leaves the shared pages alone
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system clears away the processes forked here
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _supervise(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _supervise(control: int, *streams: int):
    """Fork once more for the task, and send its id and its exit code. Kill it when the test that started it has ended."""
    with socket.socket(fileno=control) as control:
        task = json.loads(control.makefile().readline())
        child = os.fork()
        if child == 0:
            control.close()
            os.setpgid(0, 0)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            os._exit(_execute(**task))
        os.setpgid(child, child)  # in both processes: either may run first
        for stream in streams:
            os.close(stream)
        control.sendall(f"{child}\n".encode())
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if select.select([control], [], [], 0.01)[0]:
                os.killpg(child, signal.SIGKILL)
        control.sendall(f"{os.waitstatus_to_exitcode(ended[1])}\n".encode())
    os._exit(0)


def _execute(words: list[str], env: dict[str, str], cwd: str) -> int:
    """Do what `python *words` would do. Returns the exit code."""
    os.environ.clear()
    os.environ.update(env)
    sys.stdout.reconfigure(line_buffering=True)  # a test may wait for a line
    code = 1
    try:
        os.chdir(cwd)
        _python(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - whatever a script raises, as the interpreter does
        traceback.print_exc()
    threading._shutdown()  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _python(words: list[str]):
    """Run a file, `-c CODE` or `-m MODULE`, as the main module."""
    if words[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), vars(main))
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _import(names):
    for name in names:
        importlib.import_module(name)


def main(first: int, other: int):
    """Import, fork, import the rest; then both processes serve."""
    sys.path[0] = ""
    _import(FIRST_IMPORTS)
    assert "huggingface_hub" not in sys.modules, "one of FIRST_IMPORTS reads the environment"
    first, other = socket.socket(fileno=first), socket.socket(fileno=other)
    if os.fork():
        other.close()
        _serve(first)
    first.close()
    import pertstate

    _import(FURTHER_IMPORTS)
    modules = pkgutil.walk_packages(pertstate.__path__, "pertstate.")
    # These are left out: programs, which are not imported, and what needs a compiler for GPUs or gradio, which may not be here.
    left_out = ("__main__", "_kernels", "app.page")
    _import(module.name for module in modules if not module.name.endswith(left_out))
    _serve(other)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
