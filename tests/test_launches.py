import os
import signal

import launches


def said(words, **where) -> str:
    done = launches.run(words, **where)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_what_python_runs(tmp_path):
    """Files, code and modules find their words, their folder and themselves as the main module."""
    about = "import sys, os; print([sys.argv, sys.path[0], os.getcwd(), __name__, sys.modules['__main__'].__dict__ is globals()])"
    (tmp_path / "script.py").write_text(about)
    (tmp_path / "here").mkdir()
    here = os.path.realpath(tmp_path / "here")
    (tmp_path / "here" / "module.py").write_text(about)
    assert eval(said(["-c", about, "a", 1], cwd=here)) == [["-c", "a", "1"], "", here, "__main__", True]
    script = str(tmp_path / "script.py")
    assert eval(said([script, "a"], cwd=here)) == [[script, "a"], str(tmp_path), here, "__main__", True]
    module = [[f"{here}/module.py", "a"], here, here, "__main__", True]
    assert eval(said(["-m", "module", "a"], cwd=here)) == module


def test_how_it_ends_is_told():
    def ended(code):
        done = launches.run(["-c", code])
        return done.returncode, done.stdout, done.stderr

    assert ended("import sys; print(1); print(2, file=sys.stderr)") == (0, "1\n", "2\n")
    assert ended("import sys; print(1); sys.exit(3)") == (3, "1\n", "")
    assert ended("import sys; sys.exit('no')") == (1, "", "no\n")
    assert ended("raise SystemExit") == (0, "", "")
    assert ended("import os; os._exit(137)")[0] == 137
    assert ended("import os; os.kill(os.getpid(), 9)")[0] == -signal.SIGKILL
    assert ended("import atexit; atexit.register(print, 'bye'); 1 / 0")[:2] == (1, "bye\n")
    assert ended("1 / 0")[2].endswith("ZeroDivisionError: division by zero\n")


def test_threads_are_waited_for():
    code = "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()"
    assert said(["-c", code]) == "late\n"


def test_long_output_and_input_pass():
    process = launches.start(["-c", "import sys; text = sys.stdin.read(); print(text); print(text, file=sys.stderr)"])
    done = process.communicate("x" * 300_000)
    assert done.stdout == done.stderr == "x" * 300_000 + "\n"


def test_processes_do_not_see_one_another(monkeypatch):
    monkeypatch.setenv("LEFT", "here")
    code = "import os, sys, torch; print(os.environ['LEFT'], 'left' in sys.modules, torch.initial_seed())"
    before = said(["-c", code])
    assert before.startswith("here False ")
    launches.run(
        ["-c", "import os, sys, torch; os.environ['LEFT'] = 'x'; sys.modules['left'] = sys; torch.manual_seed(5)"]
    )
    assert said(["-c", code]) == before


def test_one_thread_and_all_imports_are_there():
    code = "import sys, torch; print(torch.get_num_threads(), {'pertstate.train', 'transformers.trainer'} <= set(sys.modules))"
    assert said(["-c", code]) == "1 True\n"


def test_libraries_read_where_the_hub_is_in_the_process_itself():
    code = "import sys; print('huggingface_hub' in sys.modules, 'torch' in sys.modules)\n"
    code += "from huggingface_hub import constants; import datasets\n"
    code += "print(constants.ENDPOINT, datasets.config.HF_ENDPOINT, constants.HF_HUB_OFFLINE)"
    elsewhere = launches.environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert said(["-c", code], env=elsewhere) == "False True\nhttp://127.0.0.1:9 http://127.0.0.1:9 False\n"
    assert said(["-c", code]).splitlines()[0] == "True True"


def test_a_killed_one_takes_its_children_along():
    code = "import os, time; os.write(1, b'child\\n' if os.fork() == 0 else b'parent\\n'); time.sleep(600)"
    process = launches.start(["-c", code])
    first = {process.stdout.readline(), process.stdout.readline()}
    assert first == {"child\n", "parent\n"}
    # Its streams end when the last process that has them does.
    assert process.kill().returncode == -signal.SIGKILL


def test_several_find_one_another():
    code = "import os, torch, torch.distributed as d; d.init_process_group('gloo'); rank = d.get_rank()\n"
    code += "total = torch.tensor([rank + 1.0]); d.all_reduce(total); print(rank, d.get_world_size(), total.item())"
    done = launches.run_together(["-c", code], 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 3 6.0", "1 3 6.0", "2 3 6.0"]


def test_if_one_of_several_fails_the_others_end():
    done = launches.run_together(
        ["-c", "import os, sys, time; rank = int(os.environ['RANK']); rank or time.sleep(600); sys.exit(7)"]
    )
    assert done.returncode == 7
