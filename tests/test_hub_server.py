"""The loopback Hub with the real clients: what they push comes back, and every failure leaves a whole repository."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import launches
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


WEIGHTS = os.urandom(400_000)
FILES = {
    "config.json": b'{"model_type": "state"}',
    "empty.txt": b"",
    "notes/deep/reading.md": "na\u00efve T cells\n".encode() * 50,
    "with space & sign.txt": b"a",
    "model.safetensors": WEIGHTS,
    "notes/large.bin": os.urandom(1_000),
}
BUSY = {"RateLimit": '"api";r=0;t=0'}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def content_of(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != ".gitattributes"}


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi()
    assert api.endpoint == hub.url
    return api


@pytest.fixture
def pushed(hub, api, tmp_path):
    """Push a folder to "ada/model", and return it."""
    folder = write(tmp_path / "folder", FILES)
    api.create_repo("ada/model")
    api.upload_folder(repo_id="ada/model", folder_path=folder)
    return folder


def client(code: str, folder, *arguments: str, **environment):
    """Run `code` in a process of its own; returns what it printed last, read as JSON."""
    done = launches.run(["-c", code, *arguments], {**os.environ, **environment}, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def failing(call, *args, **kwargs) -> HfHubHTTPError:
    with pytest.raises(HfHubHTTPError) as caught:
        call(*args, **kwargs)
    return caught.value


def unspoken(hub) -> list[str]:
    """Requests that the server does not know, without that for the list of agents that name themselves to a Hub."""
    return [seen.path for seen in hub.requests if seen.status == 501 and seen.path != "/api/agent-harnesses"]


# What is pushed comes back


def test_a_folder_comes_back_bit_for_bit(hub, api, pushed, tmp_path):
    assert hub.read("ada/model") == FILES
    large = {path for path, file in hub.repository("ada/model").at().files.items() if file.lfs}
    assert large == {"model.safetensors", "notes/large.bin"}
    assert hub.count("PUT", "/objects/") == 2
    snapshot = snapshot_download("ada/model", local_dir=tmp_path / "copy")
    assert {k: v for k, v in content_of(tmp_path / "copy").items() if not k.startswith(".cache")} == FILES
    assert snapshot == str(tmp_path / "copy")


def test_files_of_any_name_from_a_size_on_go_through_lfs(hub, api, pushed):
    hub.large = 1_000
    api.upload_file(repo_id="ada/model", path_or_fileobj=b"x" * 1_000, path_in_repo="table.csv")
    api.upload_file(repo_id="ada/model", path_or_fileobj=b"x" * 999, path_in_repo="small.csv")
    files = hub.repository("ada/model").at().files
    assert files["table.csv"].lfs and not files["small.csv"].lfs


def test_listings_come_in_pages(hub, api, pushed):
    hub.page_size = 2
    assert sorted(api.list_repo_files("ada/model")) == sorted([*FILES, ".gitattributes"])
    assert hub.count("GET", "/tree/main") == 5
    listed = list(api.list_repo_tree("ada/model", recursive=True, expand=True))
    assert [entry.path for entry in listed] == sorted([*FILES, ".gitattributes", "notes", "notes/deep"])
    assert hub.count("GET", "/tree/main") == 10
    assert {entry.path: entry.last_commit.title for entry in listed}[".gitattributes"] == "initial commit"
    flat = [entry.path for entry in api.list_repo_tree("ada/model", "notes")]
    assert flat == ["notes/deep", "notes/large.bin"]
    sizes = {entry.path: entry.size for entry in api.get_paths_info("ada/model", ["empty.txt", "model.safetensors"])}
    assert sizes == {"empty.txt": 0, "model.safetensors": 400_000}
    siblings = {s.rfilename: s for s in api.model_info("ada/model", files_metadata=True).siblings}
    assert siblings["model.safetensors"].lfs.size == 400_000 and siblings["config.json"].lfs is None


def test_what_did_not_change_is_not_sent_again(hub, api, pushed):
    head = hub.repository("ada/model").at().id
    assert api.upload_folder(repo_id="ada/model", folder_path=pushed).oid == head
    assert hub.count("POST", "/commit/") == 1 and hub.count("PUT", "/objects/") == 2


def test_old_revisions_are_still_served(hub, api, pushed, tmp_path):
    first = api.repo_info("ada/model").sha
    api.create_tag("ada/model", tag="v1")
    api.create_branch("ada/model", branch="wip/one", revision=first)
    second = api.upload_file(
        repo_id="ada/model", path_or_fileobj=b"new", path_in_repo="config.json", commit_message="Second"
    ).oid
    api.delete_file("model.safetensors", repo_id="ada/model", commit_message="Third")
    api.upload_file(repo_id="ada/model", path_or_fileobj=b"wip", path_in_repo="wip.txt", revision="wip/one")
    for revision in (first, "v1"):
        snapshot = snapshot_download("ada/model", revision=revision, local_dir=tmp_path / revision)
        assert (tmp_path / revision / "model.safetensors").read_bytes() == WEIGHTS, snapshot
    assert open(hf_hub_download("ada/model", "config.json", revision="wip/one"), "rb").read() == FILES["config.json"]
    assert hub.read("ada/model", "wip/one") == {**FILES, "wip.txt": b"wip"}
    assert open(hf_hub_download("ada/model", "config.json"), "rb").read() == b"new"
    assert open(hf_hub_download("ada/model", "model.safetensors", revision=second), "rb").read() == WEIGHTS
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("ada/model", "model.safetensors")
    titles = [commit.title for commit in api.list_repo_commits("ada/model")]
    assert titles == ["Third", "Second", "Upload folder using huggingface_hub", "initial commit"]
    refs = api.list_repo_refs("ada/model")
    assert {b.name for b in refs.branches} == {"main", "wip/one"} and refs.tags[0].target_commit == first
    assert failing(api.create_branch, "ada/model", branch="wip/one").response.status_code == 409
    api.delete_branch("ada/model", branch="wip/one")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info("ada/model", revision="wip/one")


def test_ranges_are_read_alone(hub, pushed):
    fs = HfFileSystem(skip_instance_cache=True)
    with fs.open("ada/model/model.safetensors", block_size=1_000, cache_type="none") as file:
        file.seek(123_456)
        assert file.read(1_000) == WEIGHTS[123_456:124_456]
        file.seek(-10, 2)
        assert file.read(100) == WEIGHTS[-10:]
    assert fs.cat_file("ada/model/notes/deep/reading.md", start=3, end=8) == FILES["notes/deep/reading.md"][3:8]
    gets = [seen for seen in hub.requests if seen.method == "GET" and seen.path.startswith(("/objects/", "/api/res"))]
    assert [seen.status for seen in gets] == [206, 206, 206]
    signed = httpx2.get(f"{hub.url}/ada/model/resolve/main/model.safetensors").headers["Location"]
    beyond = httpx2.get(signed, headers={"Range": "bytes=400000-"})
    assert beyond.status_code == 416 and beyond.headers["Content-Range"] == "bytes */400000"


def test_the_storage_takes_signed_addresses_and_no_token(hub, pushed):
    signed = httpx2.get(f"{hub.url}/ada/model/resolve/main/model.safetensors").headers["Location"]
    assert signed.startswith(hub.storage_url) and hub.storage_url != hub.url
    assert httpx2.get(signed).content == WEIGHTS
    assert httpx2.get(signed[:-1] + ("0" if signed[-1] != "0" else "1")).status_code == 403
    assert httpx2.put(signed, content=WEIGHTS).status_code == 403
    assert httpx2.get(signed, headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"}).status_code == 400


def test_a_commit_that_names_a_large_file_that_never_came_changes_nothing(hub, api, pushed):
    api.create_repo("ada/other")
    missing = hub.repository("ada/model").at().files["model.safetensors"].sha256
    lines = [
        {"key": "header", "value": {"summary": "all or nothing"}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "b.bin", "algo": "sha256", "oid": missing, "size": 400_000}},
    ]
    answer = httpx2.post(
        f"{hub.url}/api/models/ada/other/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": f"Bearer {os.environ['HF_TOKEN']}"},
    )
    assert answer.status_code == 400 and answer.json()["error"] == f"b.bin: the LFS object {missing} was not uploaded"
    assert hub.read("ada/other") == {} and len(hub.repository("ada/other").history()) == 1


# Who may do what


def test_an_existing_repository(hub, api, pushed):
    error = failing(api.create_repo, "ada/model")
    assert error.response.status_code == 409 and "You already created this model repo: ada/model" in str(error)
    assert api.create_repo("ada/model", exist_ok=True).repo_id == "ada/model"
    assert api.create_repo("ada/model", repo_type="dataset").url == f"{hub.url}/datasets/ada/model"
    assert hub.read("ada/model") == FILES and hub.read("ada/model", kind="dataset") == {}
    api.delete_repo("ada/model")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("ada/model")


def test_an_expired_or_missing_token(hub, api, pushed, tmp_path):
    hub.expire(os.environ["HF_TOKEN"])
    head = hub.repository("ada/model").at().id
    error = failing(api.whoami)
    assert error.response.status_code == 401 and "HF_TOKEN environment variable is invalid" in str(error)
    write(pushed, {"config.json": b"changed"})
    for token in (None, False):
        error = failing(api.upload_folder, repo_id="ada/model", folder_path=pushed, token=token)
        assert error.response.status_code == 401
        assert failing(api.create_repo, "ada/other", token=token).response.status_code == 401
    assert hub.repository("ada/model").at().id == head and ("model", "ada/other") not in hub.repositories
    assert open(hf_hub_download("ada/model", "config.json", token=False), "rb").read() == FILES["config.json"]


def test_namespaces_of_others_and_private_repositories(hub, api, pushed):
    bea = HfApi(token=hub.add_user("bea"))
    reader = HfApi(token=hub.add_user("cy", organizations=("ada",), write=False))
    assert api.whoami()["name"] == "ada" and [org["name"] for org in api.whoami()["orgs"]] == ["lab"]
    assert api.create_repo("lab/screen", repo_type="dataset", private=True).repo_id == "lab/screen"
    for call in (
        lambda: bea.create_repo("lab/mine"),
        lambda: bea.upload_file(repo_id="ada/model", path_or_fileobj=b"x", path_in_repo="x"),
        lambda: reader.upload_file(repo_id="ada/model", path_or_fileobj=b"x", path_in_repo="x"),
    ):
        assert failing(call).response.status_code == 403
    assert hub.read("ada/model") == FILES
    for stranger in (bea, HfApi(token=False)):
        with pytest.raises(RepositoryNotFoundError):
            stranger.repo_info("lab/screen", repo_type="dataset")
    assert api.repo_info("lab/screen", repo_type="dataset").private is True


def test_what_is_not_there(hub, api, pushed):
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("ada/model", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id="ada/model", path_or_fileobj=b"x", path_in_repo="x", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("ada/model", "pytorch_model.bin")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("ada/model", "weights"))
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist: gone.txt"):
        api.delete_file("gone.txt", repo_id="ada/model")
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("ada/nothing")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(repo_id="ada/model", path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md")
    error = failing(lambda: list(api.list_repo_likers("ada/model")))
    assert error.response.status_code == 501 and "does not speak GET /api/models/ada/model/likers" in str(error)


# Faults


def test_an_upload_cut_in_the_middle_is_sent_again_by_the_client(hub, api, tmp_path):
    api.create_repo("ada/model")
    hub.cut("/objects/", of="request", after=100_000)
    api.upload_folder(repo_id="ada/model", folder_path=write(tmp_path / "folder", FILES))
    assert hub.read("ada/model") == FILES
    puts = [seen.status for seen in hub.requests if seen.method == "PUT"]
    assert sorted(puts, key=str) == [200, 200, None]


def test_an_upload_that_breaks_leaves_no_half_commit_and_a_second_one_completes(hub, api, pushed):
    head = hub.repository("ada/model").at().id
    new = {"config.json": b"new", "model.safetensors": os.urandom(300_000), "second.safetensors": os.urandom(300_000)}
    write(pushed, new)
    hub.refuse("/objects/", 403, method="PUT")
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.upload_folder(repo_id="ada/model", folder_path=pushed)
    hub.cut("/commit/main", of="request", after=10)
    with pytest.raises(httpx2.TransportError):
        api.upload_folder(repo_id="ada/model", folder_path=pushed)
    assert hub.repository("ada/model").at().id == head and hub.read("ada/model") == FILES
    stored = hub.count("PUT", "/objects/")
    api.upload_folder(repo_id="ada/model", folder_path=pushed)
    assert hub.read("ada/model") == {**FILES, **new}
    assert hub.count("PUT", "/objects/") == stored
    assert not list(hub.contents.folder.glob("*.partial"))


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, api, pushed):
    write(pushed, {"config.json": b"new"})
    hub.cut("/commit/main", of="answer")
    with pytest.raises(httpx2.TransportError):
        api.upload_folder(repo_id="ada/model", folder_path=pushed)
    assert hub.read("ada/model")["config.json"] == b"new"
    api.upload_folder(repo_id="ada/model", folder_path=pushed)
    assert len(hub.repository("ada/model").history()) == 3


def test_a_download_cut_in_the_middle_goes_on_where_it_was(hub, api, pushed):
    # The client keeps what it has by chunks of 10 MiB.
    weights = os.urandom(12_000_000)
    api.upload_file(repo_id="ada/model", path_or_fileobj=weights, path_in_repo="long.safetensors")
    hub.cut("/objects/", of="answer", after=11_000_000, method="GET")
    assert open(hf_hub_download("ada/model", "long.safetensors"), "rb").read() == weights
    gets = [seen.status for seen in hub.requests if seen.method == "GET" and seen.path.startswith("/objects/")]
    assert gets == [None, 206]


def test_too_many_requests_and_a_server_that_is_down(hub, api, pushed):
    hub.refuse("/tree/", 429, headers=BUSY)
    assert [entry.path for entry in api.list_repo_tree("ada/model", "notes")] == ["notes/deep", "notes/large.bin"]
    assert [seen.status for seen in hub.requests if "/tree/" in seen.path] == [429, 200]
    hub.refuse("/objects/", 503, method="PUT")
    api.upload_file(repo_id="ada/model", path_or_fileobj=b"w", path_in_repo="other.safetensors")
    assert hub.read("ada/model")["other.safetensors"] == b"w"
    assert [seen.status for seen in hub.requests if seen.method == "PUT"] == [200, 200, 503, 200]
    hub.refuse("/api/models/ada/model", 500, times=2)
    for _ in range(2):
        assert failing(api.repo_info, "ada/model").response.status_code == 500
    assert api.repo_info("ada/model").sha == hub.repository("ada/model").at().id
    with pytest.raises(ValueError, match='`of` must be "request" or "answer", found \'both\''):
        hub.cut("/", of="both")


def test_two_pushes_at_once_both_land(hub, api, pushed, tmp_path):
    start = threading.Barrier(2)

    def push(name):
        folder = write(tmp_path / name, {f"{name}.txt": name.encode(), f"{name}.bin": os.urandom(50_000)})
        start.wait()
        HfApi().upload_folder(repo_id="ada/model", folder_path=folder)
        return content_of(folder)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(push, ("one", "other"))
    assert hub.read("ada/model") == {**FILES, **one, **other}
    assert len(hub.repository("ada/model").history()) == 4


def test_one_of_two_pushes_from_one_parent_is_a_clear_conflict(hub, api, pushed):
    start = threading.Barrier(2)
    parent = api.repo_info("ada/model").sha

    def push(name):
        start.wait()
        operations = [CommitOperationAdd("config.json", name.encode())]
        try:
            return HfApi().create_commit("ada/model", operations, commit_message=name, parent_commit=parent).oid
        except HfHubHTTPError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(push, ("one", "other")))
    (error,) = (outcome for outcome in outcomes if not isinstance(outcome, str))
    (landed,) = (outcome for outcome in outcomes if isinstance(outcome, str))
    assert error.response.status_code == 412 and "A commit has happened since" in str(error)
    head = hub.repository("ada/model").at()
    assert (head.id, head.parent) == (landed, parent)
    assert hub.read("ada/model")["config.json"].decode() == head.title


# Other processes


OFFLINE = """
import json
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
try:
    hf_hub_download("ada/model", "other.txt")
except LocalEntryNotFoundError as error:
    print(json.dumps([snapshot_download("ada/model"), type(error).__name__]))
"""


def test_without_the_hub_the_cache_answers(hub, pushed, tmp_path):
    snapshot = snapshot_download("ada/model")
    hub.stop()
    assert client(OFFLINE, tmp_path, HF_HUB_OFFLINE="1") == [snapshot, "LocalEntryNotFoundError"]
    assert snapshot_download("ada/model") == snapshot
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("ada/other")


DATASETS = """
import json
from datasets import Dataset, load_dataset
from huggingface_hub.errors import HfHubHTTPError
cells = Dataset.from_dict({"gene": ["a", "b", "c"] * 40, "values": [[i / 7, 2.0] for i in range(120)]})
try:
    cells.push_to_hub("ada/cells", num_shards=3)
except HfHubHTTPError as error:
    assert error.response.status_code == 409
first = cells.push_to_hub("ada/cells", num_shards=3)
cells.select(range(10)).push_to_hub("ada/cells", split="test")
loaded = load_dataset("ada/cells")
old = load_dataset("ada/cells", revision=first.oid)
streamed = list(load_dataset("ada/cells", split="train", streaming=True))
assert loaded["train"].to_list() == cells.to_list() == streamed == old["train"].to_list()
assert loaded["train"].features == cells.features
print(json.dumps([{name: len(split) for name, split in which.items()} for which in (loaded, old)]))
"""


def test_datasets_pushes_loads_and_streams(hub, tmp_path):
    # The first push finds another one at work: a clear error, and the next push completes.
    hub.refuse("/api/datasets/ada/cells/commit/", 409)
    assert client(DATASETS, tmp_path) == [{"train": 120, "test": 10}, {"train": 120}]
    shards = {path for path in hub.read("ada/cells", kind="dataset") if path.startswith("data/train-")}
    assert shards == {f"data/train-0000{i}-of-00003.parquet" for i in range(3)}
    assert all(hub.repository("ada/cells", "dataset").at().files[path].lfs for path in shards)
    assert not unspoken(hub)


PREDICTION = """
import json, sys
import numpy as np, torch
from anndata import AnnData
torch.set_num_threads(1)
screen = AnnData(np.linspace(0, 3, 80, dtype=np.float32).reshape(8, 10))
screen.var_names = [f"gene_{i}" for i in range(10)]
screen.obs["cell_type"] = "K562"
screen.obs["perturbation"] = ["control"] * 4 + ["A"] * 4
def predict(model, processor):
    with torch.no_grad():
        return model.eval()(**processor(screen, perturbation="A")).predictions.flatten().tolist()
"""
PUSH = (
    PREDICTION
    + """
from pertstate import StateConfig, StateForPerturbation, StateProcessor
processor = StateProcessor.fit(screen, set_size=4)
predicted = []
for seed in range(2):
    torch.manual_seed(seed)
    model = StateForPerturbation(StateConfig.from_preset("tiny", input_dim=10, num_perturbations=1, set_size=4))
    # A new model predicts no change, whatever its seed.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.push_to_hub("ada/state")
    predicted.append([processor.push_to_hub("ada/state").oid, predict(model, processor)])
print(json.dumps(predicted))
"""
)
LOAD = (
    PREDICTION
    + """
# As for a user who has transformers and anndata only.
sys.modules["pertstate"] = None
from transformers import AutoModel, AutoProcessor
predicted = []
for revision, alone in [(revision, False) for revision in sys.argv[1:]] + [(sys.argv[-1], True)]:
    where = {"trust_remote_code": True, "revision": revision, "local_files_only": alone}
    model = AutoModel.from_pretrained("ada/state", **where)
    processor = AutoProcessor.from_pretrained("ada/state", **where)
    predicted.append([revision, predict(model, processor)])
    assert type(model).__module__.startswith("transformers_modules.ada.state.")
print(json.dumps(predicted))
"""
)


@pytest.mark.slow
def test_a_pushed_model_predicts_the_same_from_every_revision_without_the_package(hub, tmp_path):
    pushed = client(PUSH, tmp_path)
    (first, predicted), (second, otherwise) = pushed
    assert predicted != otherwise and len(predicted) == 4 * 10
    files = hub.repository("ada/state").at(second).files
    assert {"config.json", "processor_config.json", "vocabulary.json", "modeling_state.py", "processing.py"} <= set(
        files
    )
    assert [path for path, file in files.items() if file.lfs] == ["model.safetensors"]
    # Both are loaded with an empty cache, and the second once more from the cache alone.
    assert client(LOAD, tmp_path, first, second, HF_HOME=str(tmp_path / "elsewhere")) == [*pushed, pushed[1]]
    assert not unspoken(hub)
