"""The Auto classes of transformers load our checkpoints, in whatever order the packages are imported."""

import json
import shutil
import subprocess
import sys

import pytest
from make_fixtures import FIXTURES

from pertstate.families import FAMILIES


# Each case runs in a fork of one process, which has imported slow modules that do not matter here.
SERVER = """
import gc, json, os, sys, traceback

def run(name, code):
    reader, writer = os.pipe()
    if os.fork() == 0:
        found = {}
        try:
            exec(compile(code, name, "exec"), {"found": found, "folders": folders, "some": some})
            answer = {"found": found}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answers[name] = json.load(file)
    os.wait()

answers, folders, some = {}, *map(json.loads, sys.argv[2:])
for name, code in json.loads(sys.argv[1])["bare"].items():
    run(name, code)
import anndata, huggingface_hub.hf_api, jinja2, pandas, PIL.Image, safetensors.torch, scipy.stats, torch
import accelerate, regex, tokenizers, torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp
import torch.distributed.elastic.agent.server.api, torch.distributed.tensor, torch.export
assert not {"pertstate", "transformers"} & set(sys.modules)
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a collection in a fork then leaves the shared pages alone
for name, code in json.loads(sys.argv[1])["ready"].items():
    run(name, code)
print(json.dumps(answers))
"""
HEAVY = ("torch", "transformers", "numpy", "pandas", "anndata", "scipy", "safetensors", "datasets", "huggingface_hub")
BARE = {
    "package": f"""
import sys
import pertstate
found["loaded"] = [name for name in {HEAVY} if name in sys.modules]
found["public"] = dir(pertstate)
""",
    "command": f"""
import sys
from pertstate.cli import main
try:
    main(["--help"])
except SystemExit as error:
    found["code"] = error.code
found["loaded"] = [name for name in {HEAVY} if name in sys.modules]
""",
}
# One family at the package's root, one in a folder, and one that is fitted. The first order is tried with all families.
SOME = ("state", "state-cpa", "state-linear")
LOAD = """
for folder in some:
    model = AutoModel.from_pretrained(folder)
    found[folder] = [type(model).__module__, type(model).__name__]
"""
ORDERS = {
    "package first": "import pertstate\nfrom transformers import AutoModel\n" + LOAD.replace("some", "folders"),
    "transformers first": "from transformers import AutoModel\nimport pertstate\n" + LOAD,
    "transformers, the package, then the Auto class": """
import transformers
import pertstate
from transformers import AutoModel
"""
    + LOAD,
    "a base class first": """
from transformers import PreTrainedModel
import pertstate
from transformers import AutoModel
"""
    + LOAD,
    "the package twice": """
import sys
import pertstate
for name in [name for name in sys.modules if name.partition(".")[0] == "pertstate"]:
    del sys.modules[name]
import pertstate
from transformers import AutoModel
"""
    + LOAD,
    "a model first": """
from pertstate import StateForPerturbation
from transformers import AutoModel
"""
    + LOAD,
}
OTHERS = {
    "a config alone": """
import pertstate
from transformers import AutoConfig
for folder in folders:
    config = AutoConfig.from_pretrained(folder)
    found[folder] = [type(config).__module__, type(config).__name__]
""",
    "a processor alone": """
import pertstate
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained("PROCESSOR")
found["processor"] = [type(processor).__module__, type(processor).__name__]
""",
    "a config of another library": """
import pertstate
from transformers import AutoModel, BertConfig
found["bert"] = type(AutoModel.from_config(BertConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8,
))).__name__
""",
    "a look at where a module is": """
import importlib.util
import pertstate
import transformers
# Others may look for a module without importing it.
for name in ("configuration_auto", "modeling_auto", "processing_auto"):
    spec = importlib.util.find_spec("transformers.models.auto." + name)
    found[name] = spec.loader.get_source(spec.name) is not None
from transformers import AutoModel
for folder in some:
    found[folder] = type(AutoModel.from_pretrained(folder)).__name__
""",
    "a model of a config": """
import pertstate
from transformers import AutoModel
config = pertstate.CPAConfig.from_preset("tiny", input_dim=5, num_perturbations=2)
found["model"] = type(AutoModel.from_config(config)).__name__
found["mapping"] = [config in AutoModel._model_mapping for config in (pertstate.CPAConfig, pertstate.StateConfig)]
""",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    processor = tmp_path_factory.mktemp("processor")
    for name in ("processor_config.json", "vocabulary.json"):
        shutil.copy(FIXTURES / "state" / name, processor)
    ready = {name: code.replace("PROCESSOR", str(processor)) for name, code in (ORDERS | OTHERS).items()}
    folders = [[str(FIXTURES / family) for family in families] for families in (FAMILIES, SOME)]
    command = [sys.executable, "-c", SERVER, json.dumps({"bare": BARE, "ready": ready}), *map(json.dumps, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=processor)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def answer(answers: dict, name: str) -> dict:
    assert "error" not in answers[name], answers[name]["error"]
    return answers[name]["found"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_checkpoint_loads_without_remote_code(answers, order):
    families = FAMILIES if order == "package first" else SOME
    expected = {str(FIXTURES / name): FAMILIES[name].model for name in families}
    assert answer(answers, order) == {folder: [model.__module__, model.__name__] for folder, model in expected.items()}


def test_a_config_loads_by_itself(answers):
    expected = {str(FIXTURES / name): family.config for name, family in FAMILIES.items()}
    assert answer(answers, "a config alone") == {
        folder: [config.__module__, config.__name__] for folder, config in expected.items()
    }


def test_a_processor_loads_from_a_folder_without_a_model(answers):
    assert answer(answers, "a processor alone") == {"processor": ["pertstate.processing", "StateProcessor"]}


def test_a_model_is_made_of_a_config(answers):
    assert answer(answers, "a model of a config") == {"model": "CPAForPerturbation", "mapping": [True, True]}


def test_looking_for_a_module_does_not_use_up_the_telling(answers):
    models = {str(FIXTURES / name): FAMILIES[name].model.__name__ for name in SOME}
    modules = dict.fromkeys(("configuration_auto", "modeling_auto", "processing_auto"), True)
    assert answer(answers, "a look at where a module is") == modules | models


def test_models_of_others_are_left_as_they_are(answers):
    assert answer(answers, "a config of another library") == {"bert": "BertModel"}


def test_the_package_loads_nothing_heavy(answers):
    found = answer(answers, "package")
    assert found["loaded"] == []
    assert {"StateForPerturbation", "CPAConfig", "predict", "evaluate", "__version__"} <= set(found["public"])


def test_the_help_of_the_command_loads_nothing_heavy(answers):
    assert answer(answers, "command") == {"code": 0, "loaded": []}
