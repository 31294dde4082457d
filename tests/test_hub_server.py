import os
from huggingface_hub import HfApi, snapshot_download, HfFileSystem


def test_round_trip(hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    files = {"config.json": b"{}", "deep/notes.txt": b"x" * 1000, "model.safetensors": os.urandom(300_000), "empty": b""}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    api = HfApi(endpoint=hub.url)
    print(api.whoami())
    repo = api.create_repo("ada/model")
    print(repr(repo))
    info = api.upload_folder(repo_id="ada/model", folder_path=folder)
    assert hub.read("ada/model") == files
    path = snapshot_download("ada/model")
    for r in hub.requests: print(r)
    for name, content in files.items():
        assert open(os.path.join(path, name), "rb").read() == content
    print(api.repo_info("ada/model", files_metadata=True))
    print(list(api.list_repo_tree("ada/model", recursive=True, expand=True)))
    fs = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    with fs.open("ada/model/model.safetensors") as f:
        f.seek(100_000)
        assert f.read(1000) == files["model.safetensors"][100_000:101_000]
    print(fs.find("ada/model"))
    assert not hub.crashes
