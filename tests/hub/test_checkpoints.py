"""What is refused before any Auto class, or peft, sees a checkpoint."""

import json
import math
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from finetuning_runs import make_folder, run
from safetensors.torch import load_file, save_file

from pertstate.cli import main as pertstate
from pertstate.hub.checkpoints import load_adapter, load_whole
from pertstate.processing import StateProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("adapters"))
    run(folder, "adapter", "second", {}, {"pretrained": str(folder / "base")}, lora_rank=2)
    return folder


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(path: Path, **entries):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **entries}))


WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"lora_alpha": math.nan}, "lora_alpha is nan, expected a number above 0"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": "2"}, "lora_alpha is '2'"),
        ({"r": 10**9}, "r is 1000000000, expected a rank from 1 to 4096"),
        ({"r": True}, "r is True"),
        ({"rank_pattern": {".*": 10**9}}, "rank_pattern is .*, expected nothing"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern is .*, expected nothing"),
        ({"target_modules": "(a+)+$"}, "target_modules is .*, expected a list of names of layers"),
        ({"target_modules": ["(x+x+)+y"]}, "target_modules is .*, expected a list"),
        ({"target_modules": []}, "target_modules is .*, expected a list"),
        ({"exclude_modules": "(a+)+$"}, "exclude_modules is .*, expected nothing"),
        ({"layers_pattern": "(a+)+$"}, "layers_pattern is .*, expected nothing"),
        ({"modules_to_save": ["../x"]}, "modules_to_save is .*, expected a list of names"),
        ({"peft_type": "XLORA", "adapters": {"a": "/somewhere"}}, "peft_type is 'XLORA', expected 'LORA'"),
        ({"adapters": {"a": "/somewhere"}}, "adapters is .*, expected nothing"),
        ({"use_dora": True}, "use_dora is True, expected nothing"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is .*, expected nothing"),
        ({"target_modules": ["backbone.layers.7.attention.qkv_proj"]}, "lacks the tensor lora_A of backbone.layers.7"),
        ({"r": 3}, "has shape .*, expected one of rank 3"),
    ],
)
def test_settings_of_an_adapter_are_known_and_bounded(adapter, entries, message):
    changed(adapter / "adapter_config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_adapter(str(adapter))


def without(count: int):
    def change(tensors):
        for name in [name for name in tensors if "lora" in name][:count]:
            del tensors[name]

    return change


def nan(tensors):
    next(iter(tensors.values()))[0] = math.nan


def one_more(tensors):
    tensors["base_model.model.nobody.lora_A.weight"] = torch.zeros(2, 3)


def wide(tensors):
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name] = torch.zeros(7, 2)


def no_row(tensors):
    del tensors["base_model.model.perturbation_encoder.embedding.bias"]


@pytest.mark.parametrize(
    "change, message",
    [
        (without(6), "lacks the tensor lora_"),
        (without(8), "lacks the tensor lora_"),
        (nan, "holds NaN or infinite values"),
        (one_more, "does not fit the base model .* only in one of the two"),
        (wide, "does not fit the base model"),
        (no_row, "does not fit the base model"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "merge"])
def test_weights_of_an_adapter_are_whole_and_finite(folder, adapter, tmp_path, capsys, change, message, command):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load_adapter(str(adapter))
    words = ["merge", str(adapter), str(tmp_path / "out")]
    if command == "predict":
        cells = ["--adata", str(folder / "second.h5ad"), "--output", str(tmp_path / "out"), "--all", "--quiet"]
        words = ["predict", "--model", str(adapter), *cells]
    capsys.readouterr()
    assert pertstate(words) == 1
    assert not (tmp_path / "out").exists() and len(capsys.readouterr().err.strip().splitlines()) == 1


class Mark:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("where", ["a model", "the base of an adapter"])
@pytest.mark.parametrize("family", ["bert", "gpt2", None, 3, "stat", ["state"], {}])
def test_no_pickle_of_another_family_is_read(adapter, tmp_path, where, family):
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": family, "architectures": ["BertModel"]}))
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps(Mark(str(tmp_path / "mark"))))
    name = bert
    if where != "a model":
        changed(adapter / "adapter_config.json", base_model_name_or_path=str(bert))
        name = adapter
    with pytest.raises(ValueError, match="is a checkpoint of model_type=.*, which is no family of pertstate"):
        load_whole(str(name))
    assert pertstate(["info", str(bert)]) == 1
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"num_labels": 10**9}, "num_labels is 1000000000: no model of this package has labels"),
        ({"num_labels": "3"}, "num_labels is '3'"),
        ({"return_dict": False}, "return_dict is 'False': outputs of models of this package have names"),
        ({"dtype": "float40"}, "dtype is 'float40': expected one of"),
        ({"torch_dtype": "load"}, "torch_dtype is 'load': expected one of"),
        ({"dtype": {"": "hub"}}, "dtype is .*: expected one of"),
        (
            {"attn_implementation": "someone/kernel"},
            "attn_implementation is 'someone/kernel': config.json may name no code",
        ),
        ({"_attn_implementation": "someone/kernel@main:f"}, "_attn_implementation is .*: config.json may name no code"),
        ({"attn_implementation": {"": "someone/kernel"}}, "attn_implementation is .*: config.json may name no code"),
    ],
)
def test_a_config_asks_for_nothing_that_is_large_or_of_others(folder, tmp_path, entries, message):
    shutil.copytree(folder / "base", tmp_path / "base")
    changed(tmp_path / "base" / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_whole(str(tmp_path / "base"))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"values": "counts"}, "values='counts' contradicts normalize='counts_to_log1p'"),
        ({"values": "embedding"}, "values='embedding' contradicts input='X'"),
        ({"input": "obsm/X_pca"}, "values='log1p' contradicts input='obsm/X_pca'"),
        ({"gene_input": "X"}, "values='log1p' contradicts gene_input='X'"),
        ({"predicts": "log1p"}, "predicts='log1p' contradicts values='log1p'"),
        ({"context": "k562"}, "context='k562' contradicts context_key='cell_type'"),
        ({"doses": {"A": [1.0]}}, "doses=.* contradicts dose_key=None"),
        ({"dose_span": [1.0, 2.0]}, "dose_span=.* contradicts doses=None"),
        ({"batch_datasets": ["a", "b"], "batch_key": None}, "batch_datasets=.* contradicts batch_key=None"),
        ({"processor_class": "LlavaProcessor"}, "processor_class: expected 'StateProcessor', found 'LlavaProcessor'"),
    ],
)
def test_settings_of_a_processor_agree(folder, tmp_path, entries, message):
    shutil.copytree(folder / "base", tmp_path / "base")
    changed(tmp_path / "base" / "processor_config.json", **entries)
    with pytest.raises(ValueError, match=message):
        load_whole(str(tmp_path / "base"))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "I128", "C64", "F16"])
def test_tensors_of_kinds_that_are_no_torch_type_are_one_error(folder, tmp_path, dtype):
    shutil.copytree(folder / "base", tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    next(entry for name, entry in header.items() if name != "__metadata__")["dtype"] = dtype
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    with pytest.raises(ValueError, match="its weights are not a whole safetensors file"):
        load_whole(str(tmp_path / "base"))


@pytest.mark.parametrize("named", [5, "x", ["a"], {"AutoModel": 0.5}, {"AutoConfig": None}, {"AutoConfig": ["a", "b"]}])
@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_names_of_code_that_no_auto_class_knows(folder, tmp_path, named, file):
    shutil.copytree(folder / "base", tmp_path / "base")
    changed(tmp_path / "base" / file, auto_map=named)
    with pytest.raises(ValueError, match=f"{file}: auto_map: expected classes by name"):
        load_whole(str(tmp_path / "base"))


@pytest.mark.parametrize("named", ["itself", "another"])
def test_an_adapter_on_an_adapter_is_refused(adapter, folder, tmp_path, named, capsys):
    base = adapter if named == "itself" else folder / "adapter"
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(ValueError, match="is an adapter itself; merge it first"):
        load_whole(str(adapter))
    assert pertstate(["merge", str(adapter), str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("base", ["", "a\0b", "a" * 5000, "/tmp/\x1b]52;c;x\x07", "a\nb"])
def test_names_of_base_models_that_nobody_writes(adapter, base):
    changed(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match="base_model_name_or_path is .*, expected a name, or null") as caught:
        load_whole(str(adapter))
    assert len(str(caught.value)) < 500


def test_an_adapter_from_the_hub_opens_no_folder_of_this_machine(adapter, folder, tmp_path):
    """In the cache of the Hub, its folder has the name of a commit."""
    fetched = tmp_path / "models--ada--adapter" / "snapshots" / ("0" * 40)
    shutil.copytree(adapter, fetched)
    with pytest.raises(ValueError, match="from the Hub, and names a folder of this machine as its base model"):
        load_whole(str(fetched))
    load_adapter(str(fetched), base=str(folder / "base"))
    load_whole(str(adapter))  # one in a folder may: training writes it so


def test_very_many_tensors_of_an_adapter_are_looked_at_once(adapter):
    """A time that grows with the tensors times the layers would be minutes."""
    layers = [f"l{i}" for i in range(10_000)]
    one = torch.zeros(2, 1)
    tensors = {f"{layer}.x{i}.lora_A.weight": one for layer in layers for i in range(3)}
    save_file({name: one.clone() for name in tensors}, adapter / WEIGHTS, {"format": "pt"})
    changed(adapter / "adapter_config.json", target_modules=layers)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="lacks the tensor lora_A of l0"):
        load_whole(str(adapter))
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "file, content",
    [
        ("audio_tokenizer_config.json", {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "other"}),
        ("chat_template.json", {}),
    ],
)
def test_a_processor_reads_no_file_that_names_another_model_or_a_template(folder, tmp_path, file, content):
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / file).write_text(json.dumps(content))
    expected = load_whole(str(folder / "base"))[1]
    for processor in (load_whole(str(tmp_path / "base"))[1], StateProcessor.from_pretrained(tmp_path / "base")):
        assert processor.to_dict() == expected.to_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_saved_in_half_precision_predicts_and_trains_on(folder, tmp_path, dtype):
    shutil.copytree(folder / "base", tmp_path / "base")
    model = load_whole(str(folder / "base"))[0].to(dtype)
    model.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_whole(str(tmp_path / "base"))[0]
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float())
    run(folder, str(tmp_path / "further"), "second", {}, {"pretrained": str(tmp_path / "base")})
    assert {weight.dtype for weight in load_file(tmp_path / "further" / "model.safetensors").values()} == {
        torch.float32
    }
