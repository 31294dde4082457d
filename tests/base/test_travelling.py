"""The code beside a checkpoint: a flat copy of the package's files, which loads, saves and is pushed without the package."""

import ast
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alone import Alone
from make_fixtures import FIXTURES
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from pertstate import StateProcessor
from pertstate.base.travelling import flattened, travelling_files
from pertstate.families import FAMILIES


ROOT = Path(__file__).parents[2]
# What the files of a model, and those of a processor, may import.
OF_MODELS = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
OF_PROCESSORS = OF_MODELS | {"anndata", "pandas", "scipy"}


def predict(model, cells) -> dict[str, torch.Tensor]:
    """What a model returns for the inputs that a fixture keeps."""
    inputs = {name[7:]: value for name, value in load_file(cells).items() if name[:7] == "inputs."}
    if model.is_ceiling:
        inputs["labels"] = inputs["control_cells"]
    with torch.no_grad():
        return {name: value.clone() for name, value in model.eval()(**inputs).items()}


# Scripts of a process without the package begin with this.
PREDICT = f"""
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)

def load(folder):
    found = [kind.from_pretrained(folder, trust_remote_code=True) for kind in (AutoModel, AutoProcessor)]
    assert all(type(one).__module__.startswith("transformers_modules.") for one in found)
    return found

{inspect.getsource(predict)}
"""
AGAIN = (
    PREDICT
    + """
first, second, cells, *size = sys.argv[1:]
model, processor = load(first)
save_file(predict(model, cells), f"{second}.first.safetensors")
model.save_pretrained(second, **({"max_shard_size": size[0]} if size else {}))
processor.save_pretrained(second)
model, processor = load(second)
save_file(predict(model, cells), f"{second}.second.safetensors")
print(processor.control)
"""
)


def modules_of(family: str) -> tuple[str, str]:
    """The modules that a checkpoint of the family is saved from."""
    return FAMILIES[family].model.__module__, StateProcessor.__module__


def copied_files(family: str) -> dict[str, Path]:
    return {name: path for module in modules_of(family) for name, path in travelling_files(module).items()}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The packages that a file needs, and those that it tries to import and does without."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    needed, optional = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {node.module}
        else:
            continue
        names = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
        (optional if id(node) in tried else needed).update(names)
    return needed, optional


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


# The source


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_lines_of_relative_imports_change(family):
    for path in copied_files(family).values():
        source = path.read_text(encoding="utf-8")
        before, after = source.splitlines(), flattened(source).splitlines()
        assert len(before) == len(after)
        for old, new in zip(before, after):
            if old != new:
                assert old.lstrip().startswith(("from ..", "from .base.")), old
                assert new.lstrip().startswith("from .") and old.rpartition(".")[2] == new.rpartition(".")[2]
        # All relative imports are found: one that kept its dots or folders would not load.
        relative = [node for node in ast.walk(ast.parse(flattened(source))) if isinstance(node, ast.ImportFrom)]
        for node in relative:
            assert node.level == 0 or (node.level == 1 and node.module and "." not in node.module), path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_imports_what_a_user_of_a_checkpoint_has(family):
    of_model, of_processor = modules_of(family)
    for name, path in travelling_files(of_model).items():
        assert imports(path)[0] <= OF_MODELS, name
    for name, path in travelling_files(of_processor).items():
        needed, optional = imports(path)
        assert needed <= OF_PROCESSORS and optional <= {"scanpy", "dask"}, name


def test_every_file_that_a_file_names_travels_with_it():
    for family in FAMILIES:
        files = copied_files(family)
        for path in files.values():
            for node in ast.walk(ast.parse(flattened(path.read_text(encoding="utf-8")))):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert f"{node.module}.py" in files


def test_base_names_are_unique_among_all_families():
    """Checkpoints of two families may lie in one folder, and a reader must tell their files apart."""
    paths = {path for family in FAMILIES for path in copied_files(family).values()}
    assert len({path.name for path in paths}) == len(paths)
    assert {path.relative_to(ROOT).parts[0] for path in paths} == {
        "base",
        "configuration_state.py",
        "families",
        "modeling_state.py",
        "processing.py",
    }


def test_a_family_brings_no_files_of_another():
    for name, family in FAMILIES.items():
        of_families = {path for path in copied_files(name).values() if "families" in path.relative_to(ROOT).parts}
        assert {path.parent.name for path in of_families} == (set() if family.at_root else {family.name})


def write_package(folder: Path, files: dict[str, str]) -> str:
    """Write a package with these files and import its module `modeling_toy`. Returns that module's name."""
    name = f"toy_{folder.name}"
    for file, source in {"__init__.py": "", **files}.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    module = f"{name}.modeling_toy"
    spec = importlib.util.spec_from_file_location(module, folder / name / "modeling_toy.py")
    sys.modules[module] = importlib.util.module_from_spec(spec)
    return module


def test_files_are_found_through_folders_and_circles(tmp_path):
    module = write_package(
        tmp_path,
        {
            "modeling_toy.py": "from .parts.layers import Layer\n",
            "parts/layers.py": "from ..names import NAMES\nfrom .more.norms import (\n    Norm,\n)\n",
            "parts/more/norms.py": "from ...names import NAMES\n\n\ndef late():\n    from ..layers import Layer\n",
            "names.py": "import os\n",
            "unused.py": "",
        },
    )
    files = travelling_files(module)
    assert list(files)[0] == "modeling_toy.py" and set(files) == {
        "modeling_toy.py",
        "layers.py",
        "names.py",
        "norms.py",
    }
    assert flattened(files["layers.py"].read_text()) == "from .names import NAMES\nfrom .norms import (\n    Norm,\n)\n"
    assert flattened(files["norms.py"].read_text()).endswith("\n\ndef late():\n    from .layers import Layer\n")


def test_two_files_of_one_name_cannot_travel(tmp_path):
    module = write_package(
        tmp_path,
        {
            "modeling_toy.py": "from .one.layers import A\nfrom .two.layers import B\n",
            "one/layers.py": "",
            "two/layers.py": "",
        },
    )
    with pytest.raises(ValueError, match=r"layers\.py and .*layers\.py travel together and have the same name; rename"):
        travelling_files(module)


# Folders


@pytest.mark.filterwarnings("ignore::pertstate.base.modeling_layers.UnseenWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_package_a_checkpoint_loads_saves_and_loads_again(family, tmp_path, alone: Alone):
    """A second save copies the copy. For it, transformers asks the classes which Auto class they belong to."""
    first, second, cells = tmp_path / "first", tmp_path / "second", FIXTURES / family / "expected.safetensors"
    model, processor = (kind.from_pretrained(FIXTURES / family) for kind in (AutoModel, AutoProcessor))
    model.save_pretrained(first)
    processor.save_pretrained(first)
    code = {path.name: path.read_text(encoding="utf-8") for path in first.glob("*.py")}
    assert code == {name: flattened(path.read_text(encoding="utf-8")) for name, path in copied_files(family).items()}
    assert alone.run(AGAIN, first, second, cells) == f"{processor.control}\n"
    assert contents(second) == contents(first)
    assert_same_bits(load_file(tmp_path / "second.first.safetensors"), predict(model, cells))
    assert_same_bits(
        load_file(tmp_path / "second.second.safetensors"), load_file(tmp_path / "second.first.safetensors")
    )


def test_weights_in_several_files_travel_as_well(tmp_path, alone: Alone):
    first, second, cells = tmp_path / "first", tmp_path / "second", FIXTURES / "state-cpa" / "expected.safetensors"
    model, processor = (kind.from_pretrained(FIXTURES / "state-cpa") for kind in (AutoModel, AutoProcessor))
    model.save_pretrained(first, max_shard_size="5KB")
    processor.save_pretrained(first)
    assert len(list(first.glob("model-*.safetensors"))) > 1 and not (first / "model.safetensors").exists()
    alone.run(AGAIN, first, second, cells, "5KB")
    assert contents(second) == contents(first)
    assert_same_bits(load_file(tmp_path / "second.second.safetensors"), predict(model, cells))


def test_a_config_or_a_processor_by_itself_brings_its_own_code(tmp_path):
    config = FAMILIES["state-cpa"].config
    config(num_perturbations=2).save_pretrained(tmp_path / "config")
    AutoProcessor.from_pretrained(FIXTURES / "state-cpa").save_pretrained(tmp_path / "processor")
    for folder, of in (("config", config), ("processor", StateProcessor)):
        code = {path.name for path in (tmp_path / folder).glob("*.py")}
        assert code == set(travelling_files(of.__module__)), folder
    assert json.loads((tmp_path / "config" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_cpa.CPAConfig"
    }


def test_a_process_that_is_not_the_first_writes_no_code(tmp_path):
    AutoModel.from_pretrained(FIXTURES / "state").save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


# Adapters

ADAPTED = (
    PREDICT
    + """
base, adapter, cells, output = sys.argv[1:]
from peft import PeftModel
model = load(base)[0]
model.load_adapter(adapter)
save_file(predict(model, cells), f"{output}.own")
model = PeftModel.from_pretrained(load(base)[0], adapter)
save_file(predict(model.base_model.model, cells), f"{output}.peft")
merged = model.merge_and_unload()
merged.save_pretrained(f"{output}.merged")
load(base)[1].save_pretrained(f"{output}.merged")
save_file(predict(load(f"{output}.merged")[0], cells), f"{output}.again")
"""
)


@pytest.mark.slow
def test_adapters_load_onto_a_copy(tmp_path):
    """Both `load_adapter` of the model and peft's own class load it, in an environment with peft and without this package."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    cells = FIXTURES / "state" / "expected.safetensors"
    model, processor = (kind.from_pretrained(FIXTURES / "state") for kind in (AutoModel, AutoProcessor))
    model.save_pretrained(base)
    processor.save_pretrained(base)
    plain = predict(model, cells)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=model.lora_targets(), init_lora_weights=False))
    adapted.save_pretrained(adapter)
    expected = predict(adapted.base_model.model, cells)
    assert not torch.equal(expected["predictions"], plain["predictions"])
    (tmp_path / "alone").mkdir()
    with Alone(tmp_path / "alone", "peft") as process:
        process.run(ADAPTED, base, adapter, cells, output)
    for name in ("own", "peft"):
        assert_same_bits(load_file(f"{output}.{name}"), expected)
    again = load_file(f"{output}.again")
    torch.testing.assert_close(again["predictions"], expected["predictions"], atol=1e-5, rtol=1e-5)
    assert {path.name for path in Path(f"{output}.merged").glob("*.py")} == set(copied_files("state"))


# The Hub

PUSHED = """
import sys
import anndata as ad
from pertstate import Splits, StateTrainer, StateTrainingArguments, SentenceDataset
from transformers import AutoModel, AutoProcessor
fixture, folder = sys.argv[1:]
model, processor = (kind.from_pretrained(fixture) for kind in (AutoModel, AutoProcessor))
model.push_to_hub("ada/pushed")
processor.push_to_hub("ada/pushed")
model.config.push_to_hub("ada/config")
for one in (model, processor):
    one.save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id="ada/saved")
args = StateTrainingArguments(f"{folder}/run", use_cpu=True, report_to="none", hub_model_id="ada/trained", disable_tqdm=True)
StateTrainer(model, args, processing_class=processor).push_to_hub()
"""
PUSHED_AGAIN = (
    """
import sys
sys.modules["pertstate"] = None
"""
    + PREDICT
    + """
from transformers import AutoConfig
cells, folder = sys.argv[1:]
found = {}
for name in ("pushed", "saved", "trained"):
    model, processor = load(f"ada/{name}")
    found |= {f"{name}.{key}": value for key, value in predict(model, cells).items()}
model.push_to_hub("ada/pushed_again")
processor.push_to_hub("ada/pushed_again")
AutoConfig.from_pretrained("ada/config", trust_remote_code=True).push_to_hub("ada/config_again")
for one in (model, processor):
    one.save_pretrained(f"{folder}/saved_again", push_to_hub=True, repo_id="ada/saved_again")
for name in ("pushed_again", "saved_again"):
    found |= {f"{name}.{key}": value for key, value in predict(load(f"ada/{name}")[0], cells).items()}
save_file(found, f"{folder}/found.safetensors")
"""
)


def in_a_process(code: str, folder: Path, *arguments, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules"), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_pushes_bring_the_code_and_so_do_pushes_from_a_copy(hub, tmp_path):
    """`push_to_hub` and `save_pretrained(push_to_hub=True)` bring the code, first with the package, then without it."""
    fixture, cells = FIXTURES / "state-cpa", FIXTURES / "state-cpa" / "expected.safetensors"
    in_a_process(PUSHED, tmp_path, fixture, tmp_path)
    in_a_process(PUSHED_AGAIN, tmp_path, cells, tmp_path, HF_HOME=str(tmp_path / "elsewhere"))
    code = {
        name: flattened(path.read_text(encoding="utf-8")).encode() for name, path in copied_files("state-cpa").items()
    }
    for name in ("pushed", "saved", "trained", "pushed_again", "saved_again"):
        files = hub.read(f"ada/{name}")
        assert {file: content for file, content in files.items() if file.endswith(".py")} == code, name
        # The Trainer notes in the config that nothing is cached.
        own = () if name == "trained" else ("config.json",)
        for file in (*own, "processor_config.json", "vocabulary.json", "model.safetensors"):
            assert files[file] == hub.read("ada/pushed")[file], (name, file)
    of_config = hub.read("ada/config")
    assert {file for file in of_config if file.endswith(".py")} == set(
        travelling_files(FAMILIES["state-cpa"].config.__module__)
    )
    of_config_again = hub.read("ada/config_again")
    assert {file: of_config_again[file] for file in of_config if file != "README.md"} == {
        file: content for file, content in of_config.items() if file != "README.md"
    }
    found = load_file(tmp_path / "found.safetensors")
    expected = predict(AutoModel.from_pretrained(fixture), cells)
    for name in ("pushed", "saved", "trained", "pushed_again", "saved_again"):
        assert_same_bits({key: found[f"{name}.{key}"] for key in expected}, expected)
