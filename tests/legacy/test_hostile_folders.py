"""Folders of research code that were made to hang or to fill a memory: one line, in no time, and nothing is written."""

import contextlib
import io
import os
import pickle
import re
import time

import pytest
import torch
import yaml
from legacy_writer import PERTURBATIONS, LegacyFolderWriter, one_hot_map
from little_room import in_little_room

from pertstate.cli import main


def converted(folder, *flags) -> str:
    """What `pertstate convert` says, its exit code first."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["convert", str(folder), str(folder.parent / "out"), *flags])
    return f"{code}: {said.getvalue()}"


def views(number: int) -> dict:
    """One-hot vectors that are views of one row of zeros with a 1 in its middle."""
    row = torch.zeros(2 * number)
    row[number] = 1
    return {f"p{i}": row[number - i : 2 * number - i] for i in range(number)}


def change(folder, name: str, entries: dict):
    """Entries of a saved mapping, changed."""
    content = torch.load(folder / name, weights_only=True)
    torch.save({**content, **entries}, folder / name)


def config(folder, entries: dict):
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["model"]["kwargs"].update(entries)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def shared_weights(folder):
    """A thousand layers that are one in the file."""
    content = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
    one = torch.ones(4000, 4000)
    content["state_dict"].update({f"project_out.{3 * i}.weight": one for i in range(1000)})
    torch.save(content, folder / "checkpoints" / "final.ckpt")


def many_names(folder):
    names = [f"p{i}" for i in range(3000)]
    torch.save(one_hot_map(["p"] * 1) | dict.fromkeys(names, torch.eye(3000)[0]), folder / "pert_onehot_map.pt")


def a_pipe(name):
    def make(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def bytes_of(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def sizes(**entries):
    def make(folder):
        content = pickle.loads((folder / "var_dims.pkl").read_bytes())
        (folder / "var_dims.pkl").write_bytes(pickle.dumps({**content, **entries}))

    return make


ATTACKS = {
    "weights that are one": (shared_weights, "its weights take 64,"),
    "names that are one": (many_names, "names|one-hot"),
    "a pipe for the settings": (a_pipe("config.yaml"), "config.yaml: no such file"),
    "a pipe for the weights": (a_pipe("checkpoints/final.ckpt"), "final.ckpt: no such file"),
    "a pipe for the names": (a_pipe("pert_onehot_map.pt"), "expected pert_onehot_map"),
    "settings of a gigabyte": (lambda folder: os.truncate(folder / "config.yaml", 10**9), "has 1,000,000,000 bytes"),
    "settings in settings": (bytes_of("config.yaml", b"a: " + b"[" * 10**5), "more than 50 deep"),
    "a width of 10^9": (sizes(hvg_dim=10**9, gene_dim=10**9), "."),
    "widths that differ": (sizes(pert_dim=10**9), "pert_dim is 4, but 1000000000"),
    "a width of 10^30": (sizes(hidden_dim=10**30), "hidden_dim|sizes"),
    "layers of 10^9": (
        lambda folder: config(folder, {"n_encoder_layers": 10**9}),
        "n_encoder_layers is 2, but 1000000000",
    ),
    "a text for a width": (sizes(input_dim="6"), "expected a whole number above 0 as input_dim"),
    "sizes in themselves": (
        bytes_of("var_dims.pkl", b"\x80\x04}\x94X\x01\x00\x00\x00ah\x00s."),
        "holds itself",
    ),
    "nothing but zeros": (bytes_of("checkpoints/final.ckpt", bytes(10**6)), "expected a whole file of torch.save"),
    "nothing": (bytes_of("checkpoints/final.ckpt", b""), "expected a whole file of torch.save"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_folders_are_one_line(tmp_path, name):
    attack, message = ATTACKS[name]
    folder = LegacyFolderWriter().write(tmp_path / "legacy")
    attack(folder)
    start = time.perf_counter()
    said = in_little_room(converted, folder)
    assert time.perf_counter() - start < 20
    assert said.startswith("read: 1: pertstate convert: error: ") and said.strip().count("\n") == 0, said[:3000]
    assert re.search(message, said), said[:3000]
    assert os.listdir(tmp_path) == ["legacy"]


def test_a_conversion_ends_after_its_seconds(tmp_path, capsys):
    """20,000 names whose vectors are views of one row of numbers: a time that grows with the square of the file."""
    folder = LegacyFolderWriter().write(tmp_path / "legacy")
    torch.save(views(20_000), folder / "pert_onehot_map.pt")
    sizes(pert_dim=20_000)(folder)
    content = torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)
    content["hyper_parameters"]["pert_dim"] = 20_000
    torch.save(content, folder / "checkpoints" / "final.ckpt")
    start = time.perf_counter()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--seconds", "0.3"]) == 1
    assert time.perf_counter() - start < 10
    said = capsys.readouterr().err
    assert f"error: {folder}: its conversion took more than 0.3 s" in said and said.count("\n") == 1, said
    assert "Give it more with --seconds" in said and os.listdir(tmp_path) == ["legacy"]
    assert (
        main(["convert", str(LegacyFolderWriter().write(tmp_path / "other")), str(tmp_path / "out"), "--seconds", "60"])
        == 0
    )


def test_vectors_that_are_views_are_read(tmp_path):
    folder = LegacyFolderWriter().write(tmp_path / "legacy")
    made = dict(zip(PERTURBATIONS, views(len(PERTURBATIONS)).values()))
    torch.save(made, folder / "pert_onehot_map.pt")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
