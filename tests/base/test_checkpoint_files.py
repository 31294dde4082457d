"""A checkpoint that is damaged, foreign or hostile is refused: one clear error, nothing allocated, nothing run."""

import json
import pickle
import resource
import shutil
from dataclasses import fields
from pathlib import Path

import anndata as ad
import numpy as np
import peft
import pytest
import torch
from make_fixtures import FIXTURES, of_real_cells, predict, read_cells
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, PreTrainedConfig

import pertstate.cli
from pertstate import StateForPerturbation, StateProcessor
from pertstate.base.checkpoint_files import check_finite_weights
from pertstate.configuration_state import StateConfig
from pertstate.data.manifest import _is_shard
from pertstate.families import FAMILIES
from pertstate.processing import Vocabulary


# Options that say how a model is trained or run; nothing is as large as they are.
NOT_SIZES = {
    "adversary_ramp_steps",
    "adversary_warmup_steps",
    "genes_per_chunk",
    "genes_per_step",
    "kl_warmup_steps",
    "set_size",
    "tokens_per_pass",
}


def copied(name: str, folder: Path) -> Path:
    """A checkpoint that may be broken."""
    return Path(shutil.copytree(FIXTURES / name, folder / name))


def edit(path: Path, **changes):
    """Change entries of a JSON file. The value `...` removes an entry."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(folder: Path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "perturbation_encoder.embedding.weight"


def _set(value):
    def change(tensors):
        tensors[KEY][1, 3] = value

    return change


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), rf"1 tensors are missing from .*model.safetensors.*'{KEY}'.*expected the \d+ tensors"),
        (lambda t: t.update(extra=torch.ones(2)), "1 tensors are unknown to this model, but stand in .*'extra'"),
        (
            lambda t: t.update({KEY: t[KEY][:1].clone()}),
            rf"model.safetensors: tensor '{KEY}' has another shape than config.json asks for: expected \(2, 16\), found "
            r"\(1, 16\) \(1 such tensors of \d+\)",
        ),
        (lambda t: t.update({KEY: t[KEY].int()}), rf"tensor '{KEY}': expected values of kind float, found int"),
        (
            _set(float("nan")),
            rf"state: expected finite weights, found 1 of 32 values of tensor '{KEY}' NaN or infinite",
        ),
        (_set(float("inf")), rf"found 1 of 32 values of tensor '{KEY}' NaN or infinite"),
        (_set(float("-inf")), rf"found 1 of 32 values of tensor '{KEY}' NaN or infinite"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(tmp_path, change, message):
    folder = copied("state", tmp_path)
    edit_weights(folder, change)
    for kind in (AutoModel, StateForPerturbation):
        with pytest.raises(ValueError, match=message):
            kind.from_pretrained(folder)


def test_a_fitted_family_is_checked_as_well(tmp_path):
    folder = copied("state-additive", tmp_path)
    edit_weights(folder, lambda tensors: tensors.update(seen=tensors["seen"].float()))
    with pytest.raises(ValueError, match="tensor 'seen': expected values of kind bool, found float"):
        AutoModel.from_pretrained(folder)
    edit_weights(folder, lambda tensors: tensors.pop("seen"))
    with pytest.raises(ValueError, match="1 tensors are missing from .*'seen'"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = copied("state", tmp_path) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="model.safetensors: its weights are not a whole safetensors file .*copy the"):
        AutoModel.from_pretrained(path.parent)


def test_half_precision_weights_are_finite():
    model = torch.nn.Linear(3, 2)
    for dtype in (torch.float16, torch.bfloat16):
        check_finite_weights(model.to(dtype), "m")
    # The sum of its values would overflow.
    torch.nn.init.constant_(model.to(torch.float16).weight, 60000)
    check_finite_weights(model, "m")
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="m: expected finite weights, found 1 of 6 values of tensor 'weight'"):
        check_finite_weights(model, "m")


def test_loading_draws_no_random_numbers():
    before = torch.get_rng_state()
    AutoModel.from_pretrained(FIXTURES / "state-batches")
    assert torch.equal(torch.get_rng_state(), before)


def test_other_shapes_load_where_the_user_says_so():
    options = {"num_perturbations": 5, "output_loading_info": True}
    with pytest.raises(ValueError, match=rf"tensor '{KEY}' has another shape .* expected \(5, 16\), found \(2, 16\)"):
        AutoModel.from_pretrained(FIXTURES / "state", **options)
    model, report = AutoModel.from_pretrained(FIXTURES / "state", ignore_mismatched_sizes=True, **options)
    assert [key for key, *_ in report["mismatched_keys"]] == [KEY] and not report["missing_keys"]
    assert model.perturbation_encoder.embedding.weight.shape == (5, 16)
    kept = load_file(FIXTURES / "state" / "model.safetensors")["output_head.layers.0.weight"]
    assert torch.equal(model.output_head.layers[0].weight, kept)


def test_tensors_in_memory_are_checked_as_those_of_a_file():
    config = StateConfig.from_pretrained(FIXTURES / "state")
    weights = load_file(FIXTURES / "state" / "model.safetensors")
    model = StateForPerturbation.from_pretrained(None, config=config, state_dict=dict(weights))
    assert torch.equal(model.state_dict()[KEY], weights[KEY])
    weights.pop(KEY)
    with pytest.raises(ValueError, match=r"1 tensors are missing from \['the given state_dict'\]"):
        StateForPerturbation.from_pretrained(None, config=config, state_dict=weights)


# Sizes


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, model_type):
    folder = copied(model_type, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    of_library = {field.name for field in fields(PreTrainedConfig)}
    types = {f.name: str(f.type) for f in fields(FAMILIES[model_type].config) if f.name not in of_library}
    sizes = [name for name, kind in types.items() if "int" in kind and "float" not in kind]
    assert {"input_dim", "output_dim", "num_perturbations", "set_size"} <= set(sizes)
    loaded = set()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in sizes:
        for value in (10**9, 10**12, 10**30, -1):
            edit(folder / "config.json", **{**config, name: [value] if "list" in types[name] else value})
            try:
                AutoModel.from_pretrained(folder)
                # A family has no weights for some names; of those, only the processor can tell.
                AutoProcessor.from_pretrained(folder)
            except ValueError as error:
                assert len(str(error)) < 1500
            else:
                loaded.add((name, value))
    assert {name for name, _ in loaded} <= NOT_SIZES and {value for _, value in loaded} <= {10**9}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 10**9}, r"has another shape than config.json asks for: expected \(2, 1000000000\), found"),
        (
            {"num_hidden_layers": 10**9},
            r"num_hidden_layers asks for 1000000000 layers: expected at most \d+, the number of",
        ),
        ({"set_size": 10**30}, "set_size: expected at most 1073741824, found 10{30}, which is absurd"),
        (
            {"num_attention_heads": 10**9, "head_dim": 10**9},
            "the config asks for tensors that do not fit in any memory .*correct config.json, or copy the checkpoint",
        ),
    ],
)
def test_an_absurd_size_is_named(tmp_path, changes, message):
    folder = copied("state", tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder)


def test_a_long_list_of_layers_is_refused(tmp_path):
    folder = copied("state-embedding", tmp_path)
    edit(folder / "config.json", decoder_hidden_sizes=[8] * 10**5)
    with pytest.raises(ValueError, match="decoder_hidden_sizes asks for 100000 layers: expected at most"):
        AutoModel.from_pretrained(folder)


# Several files


def sharded(folder: Path) -> Path:
    AutoModel.from_pretrained(FIXTURES / "state").save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 1 and not (folder / "model.safetensors").exists()
    for name in ("vocabulary.json", "processor_config.json"):
        shutil.copy(FIXTURES / "state" / name, folder)
    return folder


def test_a_checkpoint_in_several_files_loads(tmp_path):
    folder = sharded(tmp_path)
    found = predict(
        AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder), *read_cells(FIXTURES / "state")
    )
    expected = load_file(FIXTURES / "state" / "expected.safetensors")
    torch.testing.assert_close(of_real_cells(found), of_real_cells(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "place",
    [
        "../model.safetensors",
        "/etc/passwd",
        "..\\x.safetensors",
        "C:x.safetensors",
        "sub/x.safetensors",
        ".x.safetensors",
    ]
    + ["pytorch_model.bin", "x.safetensors\0", "x.safetensors\n", "", 3, None],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, place):
    folder = sharded(tmp_path / "checkpoint")
    shutil.copy(FIXTURES / "state" / "model.safetensors", tmp_path)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**places, KEY: place})
    with pytest.raises(
        ValueError, match=rf"index.json: expected the name of a safetensors file beside it for tensor '{KEY}'"
    ):
        AutoModel.from_pretrained(folder)


def test_an_index_that_is_not_of_its_files_is_refused(tmp_path):
    folder = sharded(tmp_path)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={**places, "other": places[KEY]})
    with pytest.raises(
        ValueError, match=r"expected the tensors that .*index.json lists, found \['other'\] in one of them"
    ):
        AutoModel.from_pretrained(folder)
    edit(index, weight_map={name: file for name, file in places.items() if name != KEY})
    with pytest.raises(ValueError, match=rf"lists, found \['{KEY}'\] in one of them alone"):
        AutoModel.from_pretrained(folder)
    edit(index, weight_map={name: "gone.safetensors" if file == places[KEY] else file for name, file in places.items()})
    with pytest.raises(ValueError, match="names 'gone.safetensors', which is not there"):
        AutoModel.from_pretrained(folder)
    edit(index, weight_map=...)
    with pytest.raises(ValueError, match=r"expected the objects 'weight_map' and 'metadata', found \['metadata'\]"):
        AutoModel.from_pretrained(folder)
    index.write_text("{")
    with pytest.raises(ValueError, match="index.json is not a whole JSON file"):
        AutoModel.from_pretrained(folder)


def test_pieces_of_a_distributed_checkpoint_are_refused(tmp_path):
    folder = copied("state", tmp_path)
    shutil.copy(folder / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"expected model.safetensors or .*found pieces of a distributed checkpoint"):
        AutoModel.from_pretrained(folder)


# Pickles


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(folder: Path, *names: str) -> Path:
    """Write files that, read as pickles, make the file whose path is returned."""
    trace = folder / "it ran"
    for name in names:
        (folder / name).write_bytes(pickle.dumps({KEY: Bomb(trace)}))
    return trace


def test_the_bomb_of_these_tests_goes_off(tmp_path):
    trace = plant(tmp_path, "x.pkl")
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert trace.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "model.pkl", "model.pth"])
@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"variant": "fp16"}])
def test_a_pickle_is_never_read(tmp_path, name, options):
    folder = copied("state", tmp_path)
    (folder / "model.safetensors").unlink()
    trace = plant(folder, name)
    message = rf"expected weights in model\S*.safetensors or .*, found \['{name}'\]; pickles .* are never read"
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match="use_safetensors=False: pickles can run code and are never read"):
        AutoModel.from_pretrained(folder, use_safetensors=False, **options)
    assert not trace.exists()


def test_a_pickle_beside_the_weights_is_left_alone(tmp_path):
    folder = copied("state", tmp_path)
    names = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "vocabulary.pkl")
    trace = plant(folder, *names, "pytorch_model.bin.index.json", ".metadata")
    AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert not trace.exists()


def test_no_weights_at_all(tmp_path):
    folder = copied("state", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected weights in model.safetensors or .*, found neither"):
        AutoModel.from_pretrained(folder)


def test_an_adapter_in_a_pickle_is_never_read(tmp_path):
    base, adapter = FIXTURES / "state", tmp_path / "adapter"
    model = peft.get_peft_model(AutoModel.from_pretrained(base), peft.LoraConfig(target_modules=["qkv_proj"]))
    model.save_pretrained(adapter)
    loaded = AutoModel.from_pretrained(base)
    loaded.load_adapter(str(adapter))
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    # The pickle now lies beside the weights, as it may in a repository.
    embedded = copied("state", tmp_path)
    for path in adapter.iterdir():
        shutil.copy(path, embedded)
    assert any("lora_A" in name for name, _ in AutoModel.from_pretrained(embedded).named_parameters())
    for folder in (adapter, embedded):
        (folder / "adapter_model.safetensors").unlink()
        trace = plant(folder, "adapter_model.bin")
        with pytest.raises(ValueError, match="expected the adapter's weights in adapter_model.safetensors, found none"):
            if folder == adapter:
                AutoModel.from_pretrained(base).load_adapter(str(folder))
            else:
                AutoModel.from_pretrained(folder)
        assert not trace.exists()


# Names and settings


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        (
            "state",
            "config.json",
            {"num_perturbations": 3},
            "num_perturbations in config.json says 3, found 2 perturbations",
        ),
        (
            "state",
            "config.json",
            {"num_contexts": 1},
            "num_contexts in config.json says 1, found 2 contexts in vocabulary",
        ),
        (
            "state",
            "config.json",
            {"num_batches": 9},
            "num_batches in config.json says 9, found 2 batches in vocabulary",
        ),
        (
            "state",
            "config.json",
            {"input_dim": 11},
            r"input_dim in config.json says 11, found 10 features \(feature_dim\)",
        ),
        ("state", "config.json", {"output_dim": 9}, "output_dim in config.json says 9, found 10 features"),
        ("state", "config.json", {"input_dim": ...}, "input_dim in config.json says 2000, found 10 features"),
        ("state", "config.json", {"gene_dim": 4}, "gene_dim in config.json says 4, found 10 genes in vocabulary.json"),
        (
            "state",
            "vocabulary.json",
            {"contexts": ["a"]},
            "num_contexts in config.json says 2, found 1 context in vocabulary.json",
        ),
        (
            "state",
            "vocabulary.json",
            {"genes": ["a"]},
            "feature_dim in processor_config.json says 10, found 1 gene in vocabulary.json",
        ),
        ("state", "vocabulary.json", {"perturbations": []}, "num_perturbations in config.json says 2, found 0"),
        ("state", "processor_config.json", {"feature_dim": 9}, "feature_dim in processor_config.json says 9, found 10"),
        ("state-embedding", "config.json", {"gene_dim": None}, "gene_dim in config.json says None, found 10 genes"),
        (
            "state-embedding",
            "vocabulary.json",
            {"genes": ["a"]},
            "gene_dim in config.json says 10, found 1 gene in vocabulary.json",
        ),
        ("state-embedding", "config.json", {"input_dim": 7}, "input_dim in config.json says 7, found 6 features"),
        (
            "state-features",
            "config.json",
            {"perturbation_dim": 6},
            "perturbation_dim in config.json says 6, found 5 numbers in each perturbation's vector",
        ),
        (
            "state-features",
            "config.json",
            {"perturbation_dim": None, "num_perturbations": 2},
            "perturbation_dim in config.json says None, found 5 numbers",
        ),
        (
            "state-features",
            "processor_config.json",
            {"perturbation_dim": 4},
            "perturbation_dim in processor_config.json says 4, found 5 numbers",
        ),
        (
            "state-features",
            "processor_config.json",
            {"perturbation_dim": ...},
            "perturbation_dim in config.json says 5, found no number in each perturbation's vector",
        ),
        (
            "state-scgpt",
            "config.json",
            {"perturbed_genes": [0, 2]},
            "perturbed_genes in config.json says pert_1, found gene_2 at gene 2 of vocabulary.json",
        ),
    ],
)
def test_names_that_are_not_the_models_are_refused(tmp_path, name, file, changes, message):
    folder = copied(name, tmp_path)
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=f"{folder}: {message}.*the files belong to different checkpoints"):
        AutoProcessor.from_pretrained(folder)


def test_a_processor_may_stand_alone(tmp_path):
    folder = copied("state", tmp_path)
    (folder / "config.json").unlink()
    assert len(StateProcessor.from_pretrained(folder).vocabulary.genes) == 10


@pytest.mark.parametrize("kind", ["genes", "perturbations", "contexts", "batches"])
def test_names_that_stand_twice_are_refused(tmp_path, kind):
    folder = copied("state", tmp_path)
    names = json.loads((folder / "vocabulary.json").read_text())[kind]
    edit(folder / "vocabulary.json", **{kind: [names[0], *names[:-1]]})
    with pytest.raises(ValueError, match=rf"vocabulary.json: vocabulary '{kind}' has duplicates: \['{names[0]}'\]"):
        AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("file", ["vocabulary.json", "processor_config.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe{}", b"not JSON", b"\0" * 64]
)
def test_a_file_that_is_no_json_is_refused(tmp_path, file, content):
    folder = copied("state", tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not a whole JSON file .*copy the checkpoint again"):
        StateProcessor.from_pretrained(folder)
    (folder / file).write_text("[1]")
    with pytest.raises(ValueError, match=f"{file}: expected a JSON object, found list"):
        StateProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set_sise": 3}, "unknown setting 'set_sise'; did you mean 'set_size'"),
        ({"chat_template": "x"}, "unknown setting 'chat_template'"),
        ({"set_size": "4"}, "set_size: expected a number of cells, found '4'"),
        ({"set_size": True}, "set_size: expected a number of cells, found True"),
        ({"set_size": 0}, "set_size: expected a number of cells, found 0"),
        ({"set_size": 10**12}, "set_size: expected a number of cells, found 10{12}"),
        ({"feature_dim": 1.5}, "feature_dim: expected a number of features, found 1.5"),
        ({"feature_dim": None}, "feature_dim: expected a number of features, found None"),
        ({"control": ...}, r"expected the settings .*, but \['control'\] are missing"),
        ({"control": 1}, "control: expected a label, found 1"),
        ({"perturbation_key": ""}, "perturbation_key: expected the name of a column, or null, found ''"),
        ({"batch_key": [3]}, r"batch_key: expected the names of columns, or null, found \[3\]"),
        ({"input": "../x"}, "input: expected 'X', 'raw/X', 'layers/NAME' or 'obsm/NAME', found '../x'"),
        ({"gene_input": "layers/"}, "gene_input: expected 'X', 'layers/NAME' or null, found 'layers/'"),
        ({"values": "tpm"}, "values: expected 'log1p', 'counts' or 'embedding', found 'tpm'"),
        ({"values": ["log1p"]}, r"values: expected .*, found \['log1p'\]"),
        ({"normalize": "auto"}, "normalize: expected 'counts_to_log1p' or 'none', found 'auto'"),
        ({"target_sum": float("nan")}, "target_sum: expected a number above 0, or null, found nan"),
        ({"target_sum": "median"}, "target_sum: expected a number above 0, or null, found 'median'"),
        ({"target_sum": None}, "target_sum: expected a number above 0, found null"),
        ({"combination_separator": ""}, "combination_separator: expected a text, or null, found ''"),
        ({"predicts": "counts"}, "predicts: expected 'log1p' or null, found 'counts'"),
        ({"perturbation_dim": "5"}, "perturbation_dim: expected the width of a vector, found '5'"),
    ],
)
def test_settings_that_no_processor_writes_are_refused(tmp_path, changes, message):
    folder = copied("state", tmp_path)
    edit(folder / "processor_config.json", **changes)
    with pytest.raises(ValueError, match=f"processor_config.json: {message}"):
        AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("names", ["5", "{}", "[1, 2, 3]", "[" * 100_000, '["a", "a", "b"]', '["a", "b"]'])
def test_names_of_vectors_that_are_no_names_are_refused(tmp_path, names):
    folder = copied("state-features", tmp_path)
    path = folder / "perturbation_features.safetensors"
    save_file(load_file(path), path, metadata={"names": names})
    with pytest.raises(ValueError, match="perturbation features: |expected a list of names|'names' is not whole JSON"):
        AutoProcessor.from_pretrained(folder)


# Paths

HOSTILE = [
    "../../up",
    "/etc/passwd",
    "..",
    "a/b",
    "C:\\x",
    "~",
    "$HOME",
    "x\0y",
    "con",
    "-rf",
    "%2e%2e/",
    "a\nb",
    "<b>",
]


def test_names_never_become_paths(tmp_path):
    """A processor and its predictions write the files that they always write, whatever the names."""
    folder = copied("state", tmp_path)
    there = {path.name for path in folder.iterdir()}
    names = json.loads((folder / "vocabulary.json").read_text())
    edit(folder / "vocabulary.json", perturbations=HOSTILE[:2], contexts=[*HOSTILE[2:3], *names["contexts"][:1]])
    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.iterdir() if path.suffix != ".py"} == there
    adata, _ = read_cells(folder)
    adata.obs["cell_type"] = adata.obs["cell_type"].replace({names["contexts"][1]: HOSTILE[2]})
    adata.write_h5ad(tmp_path / "cells.h5ad")
    words = [
        "predict",
        "--model",
        folder,
        "--adata",
        tmp_path / "cells.h5ad",
        "--output",
        tmp_path / "out.h5ad",
        "--all",
    ]
    assert pertstate.cli.main([str(word) for word in [*words, "--quiet"]]) == 0
    assert set(ad.read_h5ad(tmp_path / "out.h5ad").obs["perturbation"]) == set(HOSTILE[:2])
    assert {path.name for path in tmp_path.iterdir()} == {"state", "cells.h5ad", "out.h5ad"}


def test_any_name_survives_saving(tmp_path):
    names = [name for name in HOSTILE if "\0" not in name]
    StateProcessor(vocabulary=Vocabulary(genes=names, perturbations=names)).save_pretrained(tmp_path)
    assert StateProcessor.from_pretrained(tmp_path).vocabulary.genes == names
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py"}


@pytest.mark.parametrize("model_type", ["../../x", "state-linear", "", None, 3])
def test_a_file_does_not_decide_the_type_of_a_model(tmp_path, model_type):
    folder = copied("state", tmp_path)
    edit(folder / "config.json", model_type=model_type)
    with pytest.raises(ValueError, match=r"model_type=.*: expected 'state' for StateConfig; load the checkpoint"):
        StateForPerturbation.from_pretrained(folder)


@pytest.mark.parametrize("field", ["transformers_weights", "quantization_config", "extra_files", "fusion_config"])
def test_a_config_cannot_name_other_files(tmp_path, field):
    folder = copied("state", tmp_path)
    edit(folder / "config.json", **{field: "../x.bin"})
    with pytest.raises(ValueError, match=f"StateConfig has no field '{field}'"):
        AutoModel.from_pretrained(folder)


def test_shards_of_a_store_lie_in_it():
    shard = {"file": "data-00000-of-00001.arrow", "cells": 1, "bytes": 1, "sha256": "0"}
    assert _is_shard(shard) and _is_shard({**shard, "file": "data/train-00000.parquet"})
    for file in (
        "../x.arrow",
        "/x.arrow",
        "a/../../x.arrow",
        "..\\x.arrow",
        "C:\\x.arrow",
        "C:x",
        "",
        ".",
        "x\0",
        3,
        None,
    ):
        assert not _is_shard({**shard, "file": file}), file


# Without the package


def test_the_checks_travel_with_the_checkpoint(tmp_path, alone):
    folder = copied("state", tmp_path)
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for loaded in (model, processor):
        loaded.save_pretrained(folder)
    script = """
import sys
from transformers import AutoModel, AutoProcessor
for kind in (AutoModel, AutoProcessor):
    try:
        kind.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ValueError as error:
        print(type(error).__name__, error)
    else:
        print("loaded")
"""
    assert alone.run(script, folder).split() == ["loaded", "loaded"]
    edit(folder / "vocabulary.json", contexts=["type_0"])
    edit_weights(folder, lambda tensors: tensors.pop(KEY))
    of_model, of_processor = alone.run(script, folder).splitlines()
    assert of_model.startswith("ValueError 1 tensors are missing from") and KEY in of_model
    assert of_processor.startswith("ValueError ") and "num_contexts in config.json says 2, found 1" in of_processor
    shutil.copy(FIXTURES / "state" / "model.safetensors", folder)
    edit_weights(folder, lambda tensors: tensors.update({KEY: torch.full((2, 16), np.nan)}))
    assert "32 of 32 values" in alone.run(script, folder).splitlines()[0]


# Names that are no names


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"genes": ["a"], "genes": ["b"], "perturbations": [], "contexts": [], "batches": []}',
            "'genes' stands in it twice",
        ),
        (
            '{"genes": ["\\ud800"], "perturbations": [], "contexts": [], "batches": []}',
            "'genes' holds .*expected names",
        ),
        (
            '{"genes": ["a\\u0000b"], "perturbations": [], "contexts": [], "batches": []}',
            "'genes' holds .*expected names",
        ),
        ('{"genes": [" "], "perturbations": [], "contexts": [], "batches": []}', "'genes' holds ' '; expected names"),
        (
            '{"genes": [], "perturbations": [""], "contexts": [], "batches": []}',
            "'perturbations' holds ''; expected names",
        ),
    ],
)
def test_a_vocabulary_holds_names_that_can_be_written(tmp_path, text, message):
    (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_file(tmp_path / "vocabulary.json")


def test_a_name_of_ten_megabytes_and_a_file_of_a_gigabyte_are_refused(tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps({"genes": ["g" * 10**7], "perturbations": [], "contexts": [], "batches": []}))
    with pytest.raises(ValueError, match="expected names that are not blank, of at most 100000 characters") as error:
        Vocabulary.from_file(path)
    assert len(str(error.value)) < 500
    with open(path, "w") as file:
        file.truncate(10**9)
    with pytest.raises(ValueError, match="has 1,000,000,000 bytes, expected at most 67,108,864"):
        Vocabulary.from_file(path)
