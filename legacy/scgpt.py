"""Starting a gene-token transformer from a published scGPT folder: `best_model.pt`, `vocab.json` and `args.json`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pertstate.base.bounded_text import load_json
from pertstate.base.messages import some
from pertstate.base.printable import joined_lines
from pertstate.data.restricted_pickle import StoredTensor, check_stored_apart, read_pickled
from pertstate.families.scgpt.modeling_scgpt import ScGPTForPerturbation


WEIGHTS_FILE, VOCABULARY_FILE, ARGUMENTS_FILE = "best_model.pt", "vocab.json", "args.json"

# Sizes that the weights have, by their names in args.json.
_SIZES = {
    "embsize": "hidden_size",
    "nlayers": "num_hidden_layers",
    "nheads": "num_attention_heads",
    "d_hid": "intermediate_size",
}
_GENE_ROWS = "encoder.embedding.weight"
_RENAMES = [
    (r"encoder\.enc_norm\.(weight|bias)", r"gene_norm.\1"),
    (r"value_encoder\.(linear1|linear2|norm)\.(weight|bias)", r"value_encoder.\1.\2"),
    # The second form is that of checkpoints trained with flash attention.
    (r"transformer_encoder\.layers\.(\d+)\.self_attn\.in_proj_(weight|bias)", r"layers.\1.attention.qkv_proj.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.self_attn\.Wqkv\.(weight|bias)", r"layers.\1.attention.qkv_proj.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"layers.\1.attention.o_proj.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.linear1\.(weight|bias)", r"layers.\1.up_proj.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.linear2\.(weight|bias)", r"layers.\1.down_proj.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.norm1\.(weight|bias)", r"layers.\1.attention_norm.\2"),
    (r"transformer_encoder\.layers\.(\d+)\.norm2\.(weight|bias)", r"layers.\1.feed_forward_norm.\2"),
    # Not every published checkpoint has these.
    (r"pert_encoder\.weight", r"flag_embedding.weight"),
    (r"bn\.(weight|bias|running_mean|running_var|num_batches_tracked)", r"norm.\1"),
    (r"decoder\.fc\.([024])\.(weight|bias)", r"head.\1.\2"),
]
# A folder must hold all of these weights; the rest may start afresh.
_CORE = re.compile(r"(gene_norm|value_encoder|layers)\.")


@dataclass
class LoadReport:
    """
    What was loaded from a published folder.

    Args:
        loaded (`list[str]`): weights of the model that were read from the folder. `gene_embedding.weight` is read for the
            known genes.
        missing (`list[str]`): weights of the model that the folder does not have; they keep their fresh values.
        unexpected (`list[str]`): weights of the folder that the model has no place for.
        new_genes (`list[str]`): genes of the model that the folder's vocabulary does not have; their rows keep fresh values.
        num_genes (`int`): genes of the model.
    """

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    new_genes: list[str]
    num_genes: int

    def __str__(self) -> str:
        known = self.num_genes - len(self.new_genes)
        lines = [f"{len(self.loaded)} weights loaded; {known} of {self.num_genes} genes are in {VOCABULARY_FILE}"]
        if self.new_genes:
            lines.append(f"{len(self.new_genes)} genes start afresh: {some(self.new_genes, 20)}")
        if self.missing:
            lines.append(f"{len(self.missing)} weights not in {WEIGHTS_FILE} start afresh: {', '.join(self.missing)}")
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} weights of {WEIGHTS_FILE} not used: {', '.join(self.unexpected)}")
        return joined_lines(lines)


def published_fields(folder: str | os.PathLike, given: dict) -> dict:
    """
    The fields of a [`ScGPTConfig`] that a published folder determines: sizes, and the dropout unless `given` has one.

    Args:
        folder: the published folder.
        given (`dict`): fields that the run sets; the sizes among them must be those of the folder.

    Returns:
        `dict[str, int | float]`: values by field.

    Raises:
        FileNotFoundError: the folder or one of its three files is missing.
        ValueError: `args.json` is not whole, lacks a size, describes another architecture, or contradicts `given`.
    """
    path = _files(folder)[ARGUMENTS_FILE]
    arguments = _read_json(path)
    lacking = [name for name in _SIZES if not isinstance(arguments.get(name), int)]
    if lacking:
        raise ValueError(
            f"{path}: expected the whole numbers {list(_SIZES)}, found none for {lacking}; copy the folder again"
        )
    style = arguments.get("input_emb_style", "continuous")
    if style != "continuous" or arguments.get("pre_norm", False):
        raise ValueError(
            f"{path}: expected values read by an MLP and norms after each sum (input_emb_style 'continuous', pre_norm false), "
            f"found {style!r} and {arguments.get('pre_norm', False)}; such weights have no place in this model"
        )
    sizes = {field: arguments[name] for name, field in _SIZES.items()}
    other = {field: given[field] for field, size in sizes.items() if given.get(field, size) != size}
    if other:
        raise ValueError(
            f"the run contradicts the weights in {folder}: expected { ({name: sizes[name] for name in other}) }, found {other}; "
            "leave these fields (or the preset that sets them) out of the model section"
        )
    if "hidden_dropout" not in given and "dropout" in arguments:
        sizes["hidden_dropout"] = arguments["dropout"]
    return sizes


@torch.no_grad()
def load_published(model: ScGPTForPerturbation, genes: list[str], folder: str | os.PathLike) -> LoadReport:
    """
    Copy the weights of a published folder into a model.

    No code of the folder is run: the weights are read by [`~pertstate.data.restricted_pickle.read_pickled`]. Gene rows are
    found by name in `vocab.json`; upper and lower case differ.

    Args:
        model ([`ScGPTForPerturbation`]): of the folder's sizes, see [`published_fields`].
        genes (`list[str]`): names of the model's genes, in order (`processor.vocabulary.genes`).
        folder: the published folder.

    Raises:
        FileNotFoundError: the folder or one of its three files is missing.
        ValueError: a file is not whole or holds more than tensors, weights of the encoders or the transformer are missing
            or of other shapes, or no gene is in the vocabulary.
    """
    files = _files(folder)
    published = _read_weights(files[WEIGHTS_FILE])
    ours = model.state_dict()
    found, unexpected = {}, []
    for name, tensor in published.items():
        target = next((re.sub(old, new, name) for old, new in _RENAMES if re.fullmatch(old, name)), None)
        if target is None or target not in ours:
            if name != _GENE_ROWS:
                unexpected.append(name)
        elif tensor.shape == ours[target].shape:
            found[target] = tensor
        elif _CORE.match(target):
            raise ValueError(
                f"{files[WEIGHTS_FILE]}: {name}: expected shape {tuple(ours[target].shape)} by {ARGUMENTS_FILE}, found "
                f"{tuple(tensor.shape)}; the files belong to different models"
            )
        else:
            unexpected.append(f"{name} (shape {tuple(tensor.shape)})")
    missing = [name for name in ours if name not in found and name != "gene_embedding.weight"]
    lost = [name for name in missing if _CORE.match(name)] + ([] if _GENE_ROWS in published else [_GENE_ROWS])
    if lost:
        raise ValueError(
            f"{files[WEIGHTS_FILE]}: expected all weights of encoder, value_encoder and transformer_encoder, found none for "
            f"{some(lost, 20)} among {some(published)}; copy the folder again"
        )
    new_genes = _copy_gene_rows(model, genes, published[_GENE_ROWS], files[VOCABULARY_FILE])
    for name, tensor in found.items():
        ours[name].copy_(tensor)
    return LoadReport(["gene_embedding.weight", *found], missing, unexpected, new_genes, len(genes))


def _copy_gene_rows(model, genes: list[str], rows: torch.Tensor, path: Path) -> list[str]:
    """Copy the rows of the known genes; returns the genes that are not known."""
    weight = model.gene_embedding.weight
    if len(genes) != len(weight):
        raise ValueError(
            f"expected the names of the model's {len(weight)} genes, found {len(genes)}; use its processor's"
        )
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{path.with_name(WEIGHTS_FILE)}: {_GENE_ROWS}: expected rows of width {weight.shape[1]} by {ARGUMENTS_FILE}, found "
            f"shape {tuple(rows.shape)}; the files belong to different models"
        )
    vocabulary = _read_json(path)
    wrong = {k: v for k, v in vocabulary.items() if type(v) is not int or not 0 <= v < len(rows)}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ValueError(
            f"{path}: expected for each gene its row among the {len(rows)} of {WEIGHTS_FILE}, found {value!r} for {name!r} "
            f"({len(wrong)} such genes); the files belong to different models"
        )
    known = [i for i, gene in enumerate(genes) if gene in vocabulary]
    if not known:
        raise ValueError(
            f"{path}: expected the names of genes, found none of this model's {len(genes)} ({some(genes, 3)}) among its "
            f"{len(vocabulary)} ({some(vocabulary, 3)}); rename the genes of the data to match"
        )
    weight[known] = rows[[vocabulary[genes[i]] for i in known]].to(weight)
    return [gene for gene in genes if gene not in vocabulary]


def _files(folder: str | os.PathLike) -> dict[str, Path]:
    files = {name: Path(folder, name) for name in (WEIGHTS_FILE, VOCABULARY_FILE, ARGUMENTS_FILE)}
    absent = [name for name, path in files.items() if not path.is_file()]
    if absent:
        there = some(sorted(os.listdir(folder))) if os.path.isdir(folder) else "no such folder"
        raise FileNotFoundError(
            f"{folder}: expected a published scGPT folder with {', '.join(files)}, found no {', '.join(absent)} ({there}); "
            "copy the whole folder"
        )
    return files


def _read_json(path: Path) -> dict:
    content = load_json(path, advice="copy the folder again")
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected names and their values, found a {type(content).__name__}; copy the folder again"
        )
    return content


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    content = read_pickled(path)
    if not isinstance(content, dict) or not all(isinstance(value, StoredTensor) for value in content.values()):
        held = some(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path}: expected a state dict, names and their tensors, found {held}; save the state dict alone"
        )
    check_stored_apart(content.values(), path)
    return {str(name): tensor.load() for name, tensor in content.items()}
