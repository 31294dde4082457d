"""No path of a machine is written for others. Paths are found by what a value looks like."""

from pathlib import Path

import pytest

from pertstate.base.public import last_part, public, public_text


PATHS = {
    "/home/ada/data/x.h5ad": "x.h5ad",
    "/home/ada/data/": "data",
    "//home/ada/data//x.h5ad": "x.h5ad",
    "/home/ada lovelace/my data/x y.h5ad": "x y.h5ad",
    "/Users/ada": "~",
    "/home/ada/": "~",
    "~": "~",
    "~/": "~",
    "~/x/y.yaml": "y.yaml",
    "~ada/x": "x",
    "~ada/": "~",
    "C:\\Users\\Ada Lovelace\\runs\\x": "x",
    "c:/Users/ada/x": "x",
    "C:\\\\Users\\\\ada\\\\x": "x",
    "C:\\Users\\ada": "~",
    "\\\\server\\share\\ada\\x": "x",
    "\\\\?\\C:\\Users\\ada\\x.h5": "x.h5",
    "file:///home/ada/x.h5ad": "x.h5ad",
    "file://host/home/ada/x": "x",
    "file:/home/ada/x": "x",
    "file:///C:/Users/ada/x": "x",
    "FILE:///home/ada/x": "x",
    "s3://ada-private/x/y.parquet": "y.parquet",
    "sftp://ada@host/home/ada/x": "x",
    "/mnt/c/Users/ada/x": "x",
    "/mnt/c/Users/ada": "~",
    "../../home/ada/x": "x",
    "host:/home/ada/x": "host:x",
    "/root/x": "x",
}
STAYS = [
    "",
    "/",
    "+/-",
    "-/-",
    "KO +/+ and -/-",
    "NK / B",
    "10 ng /ml",
    "TNF/IFNγ",
    "a/b/c",
    "C/C=C\\C",
    "layers/counts",
    "raw/X",
    "ada/model",
    "ada/model@0123abc",
    "runs/screen",
    "./runs/x",
    "https://huggingface.co/ada/model/tree/main",
    "see https://x.org/home/ada/x, or http://y.org/a/b",
    "hf://ada/model/x",
    "https://x.org/Users/ada/x?y=/home/ada",
    "docs/users/guide.md",
    "./home/x",
    "x/home/ada/y",
    "12:30",
    "1/2",
    "~5 µM",
    "~5/6 of them",
    "control: [A, B]",
    "{{ 7 * 7 }}",
    "'\"; import os #",
]
TEXTS = {
    "columns of obs that /home/ada/a b/x.h5ad lacks: ['q']": "columns of obs that x.h5ad lacks: ['q']",
    "from '/home/ada/x' and \"C:\\Users\\ada\\y\"": "from 'x' and \"y\"",
    '{"offload": "/home/ada/nvme", "n": [1, "~/z/k"]}': '{"offload": "nvme", "n": [1, "k"]}',
    "--dir=/home/ada/x --other ~/q/r": "--dir=x --other r",
    "--dirs=/home/ada/x,/home/ada/y": "--dirs=y",
    "PATH=/home/ada/bin:/usr/bin": "PATH=bin",
    "(/home/ada/x)": "(x)",
    "see /home/ada/x, NK / B": "see x, NK / B",
    "see /home/ada/x: NK / B": "see x: NK / B",
    "`/home/ada/x`": "`x`",
    "a: /data/x.h5ad\nb: /data/y.h5ad\n": "a: x.h5ad\nb: y.h5ad\n",
    "[x](/home/ada/x.md)": "[x](x.md)",
    "at /home/ada.": "at ~",
    "'/home/ada, b: c; d/x y.h5ad' and \"C:\\Users\\ada, b\\x\"": "'x y.h5ad' and \"x\"",
    '"{\\"a\\": \\"/home/ada, b/x\\"}"': '"{\\"a\\": \\"x\\"}"',
    "-I/home/ada/include -L/home/ada": "-Iinclude -L~",
    "(x)/home/ada/y, +/home/ada/y, \\Users\\ada\\x": "(x)y, +y, x",
    "key: file:///home/ada/x.h5ad, then": "key: x.h5ad, then",
}


@pytest.mark.parametrize("path, last", PATHS.items())
def test_the_last_part_of_a_path_is_kept(path, last):
    assert public(path) == last
    assert public(public(path)) == last
    assert public_text(f"it says '{path}' there") == f"it says '{last}' there"


@pytest.mark.parametrize("text", STAYS)
def test_texts_that_are_not_paths_stay(text):
    assert public(text) == text == public_text(text)


@pytest.mark.parametrize("text, found", TEXTS.items())
def test_paths_within_texts(text, found):
    assert public_text(text) == found and public_text(found) == found


def test_the_own_home_has_a_name_of_its_own(monkeypatch):
    monkeypatch.setenv("HOME", "/data/people/ada")
    assert public("/data/people/ada") == "~" and public("/scratch/ada") == "~"
    assert public("/scratch/ada/run") == "run" and public_text("in /data/people/ada/x y") == "in x y"


def test_what_is_known_to_be_a_path_may_have_any_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert last_part("runs/a / b, c: d/x y") == "x y" == last_part(Path("/home/ada, b: c/'q'/x y/"))
    assert last_part("/home/ada") == "~" and last_part(".") == tmp_path.name


def test_values_of_every_kind():
    value = {
        "a": ["/home/ada/x", ("~/y", {"b": Path("/home/ada/z")})],
        "/home/ada/key": 1,
        "n": None,
        "f": 0.5,
        "t": True,
        "deep": {"fsdp": {"offload": "C:\\ada\\q", "list": ["ada/model"]}},
    }
    assert public(value) == {
        "a": ["x", ["y", {"b": "z"}]],
        "key": 1,
        "n": None,
        "f": 0.5,
        "t": True,
        "deep": {"fsdp": {"offload": "q", "list": ["ada/model"]}},
    }


@pytest.mark.parametrize(
    "folder", ["/home/ada", "/Users/Ada Lovelace", "C:\\Users\\ada", "//nas/home/ada", "~ada", "file:///home/ada"]
)
def test_no_name_of_a_person_is_left_wherever_it_stands(folder):
    for text in (
        "{}",
        "{}/x",
        "a {}/x b",
        "a={}/q/x",
        "['{}/x']",
        'x: "{}/x y/z"',
        "{}/x\n{}/y",
        "({}/x, {}/y)",
        "{}/x;{}/y",
    ):
        found = public_text(text.replace("{}", folder)) if text != "{}" else public(folder)
        assert "ada" not in found.lower(), (text, found)
