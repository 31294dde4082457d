"""`pertstate configs` and `pertstate --version`."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import pertstate
from pertstate.cli import main


CONFIGS = sorted((Path(pertstate.__file__).parent / "configs").glob("*.yaml"))


def test_every_configuration_is_listed_with_one_line(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    of_devices = ["accelerate/ddp", "accelerate/deepspeed", "accelerate/fsdp2"]
    assert [line.split()[0] for line in lines] == [*(path.stem for path in CONFIGS), *of_devices] and len(lines) > 10
    assert "demo                  The built-in demonstration: a simulated screen, one cell type held out whole" in lines
    # The comment goes on in the next line, so that the first is a sentence of its own.
    for path in CONFIGS:
        assert path.read_text().splitlines()[0].endswith("."), path.name
        assert f"pertstate train configs/{path.name}" in path.read_text() or path.stem == "demo", path.name


def test_a_configuration_is_printed_and_written(tmp_path, capsys):
    for path in CONFIGS:
        assert main(["configs", path.stem]) == 0
        assert capsys.readouterr().out == path.read_text()
    target = tmp_path / "mine.yaml"
    assert main(["configs", "demo", "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: train with pertstate train {target}\n"
    assert set(yaml.safe_load(target.read_text())) == {"data", "model", "training"}


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_a_configuration_of_devices_is_what_accelerate_reads(name, kind, tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    assert main(["configs", f"accelerate/{name}", "--output", str(target)]) == 0
    launch = f"accelerate launch --config_file {target} -m pertstate.train CELLS|CONFIG.yaml"
    assert capsys.readouterr().out == f"{target}: train with {launch}\n"
    read = load_config_from_file(str(target))
    assert read.distributed_type == kind and read.num_processes == 2 and not read.use_cpu


@pytest.mark.parametrize(
    "words, message",
    [
        (["configs", "scgtp"], "there is no configuration 'scgtp'; did you mean 'scgpt'?"),
        (["configs", "--output", "x.yaml"], "--output writes one configuration: name it"),
    ],
)
def test_what_configs_refuses(words, message, capsys):
    assert main(words) == 1
    assert capsys.readouterr().err == f"pertstate configs: error: {message}\n"


def test_no_file_is_written_over(tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    assert main(["configs", "demo", "--output", str(target)]) == 1
    assert (
        capsys.readouterr().err
        == f"pertstate configs: error: {target} exists; name another output, or replace it with --overwrite (overwrite=True)\n"
    )
    assert target.read_text() == "mine"
    assert main(["configs", "demo", "--output", str(tmp_path / "none" / "x.yaml")]) == 1
    assert f"there is no folder {tmp_path / 'none'}" in capsys.readouterr().err
    assert main(["configs", "demo", "--output", str(target), "--overwrite"]) == 0
    assert target.read_text() == next(path for path in CONFIGS if path.stem == "demo").read_text()
    assert main(["configs", "demo", "--overwrite"]) == 1
    assert "--overwrite has no effect without --output" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"pertstate {pertstate.__version__}\n"


def test_it_imports_nothing_heavy():
    code = (
        "import sys\nfrom pertstate.cli import main\nmain(['configs', 'demo'])\n"
        "assert not {'torch', 'transformers', 'anndata', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["configs"], ["prepare", "--help"], ["train", "--help"]])
def test_a_reader_that_closes_the_output_ends_a_command_without_a_word(words):
    """As `head` does."""
    command = [sys.executable, "-m", "pertstate.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (0, 1)  # argparse itself does not mind
