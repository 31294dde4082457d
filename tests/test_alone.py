import pytest
from alone import blocked_modules, needed_distributions


def test_what_a_user_of_a_checkpoint_has():
    needed = needed_distributions()
    assert {"transformers", "torch", "safetensors", "numpy", "anndata", "huggingface-hub", "scipy", "h5py"} <= needed
    assert needed.isdisjoint({"pertstate", "accelerate", "peft", "datasets", "pyarrow", "scanpy", "geomloss", "dask"})


def test_nothing_else_can_be_imported(alone):
    script = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    print(name)
import transformers, torch, safetensors, numpy, anndata, scipy, pandas
"""
    blocked = blocked_modules()
    assert {"pertstate", "pertstate.cli", "accelerate", "peft", "scanpy", "pyarrow", "sklearn", "pytest"} <= set(
        blocked
    )
    assert alone.run(script, *blocked) == ""


def test_scripts_do_not_see_one_another(alone):
    assert alone.run("import sys; sys.modules['left_behind'] = sys; print(sys.argv[1:])", "a", 1) == "['a', '1']\n"
    assert alone.run("import sys; print('left_behind' in sys.modules)") == "False\n"


def test_a_failing_script_is_told(alone):
    with pytest.raises(RuntimeError, match="(?s)ended with 1.*ZeroDivisionError: division by zero"):
        alone.run("1 / 0")
    with pytest.raises(RuntimeError, match="No module named 'pertstate.processing'"):
        alone.run("import pertstate.processing")
