"""The page of the app as people use it, in a headless Chromium."""

import io
import json
import os
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from app_models import write_model
from app_visitor import Visitor
from browser import browser

from pertstate.app.serving import served
from pertstate.hub.trained import load


pytestmark = pytest.mark.browser

# MB that a file may have.
MOST = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model and cells of [`write_model`], and `other.h5ad`: cells of type_0 alone under another name."""
    folder = tmp_path_factory.mktemp("page")
    write_model(folder)
    adata = ad.read_h5ad(folder / "screen.h5ad")
    other = adata[(adata.obs["cell_type"] == "type_0") & (adata.obs["perturbation"] == "control")][:16].copy()
    other.obs["cell_type"] = "a_line"
    other.write_h5ad(folder / "other.h5ad")
    (folder / "broken.h5ad").write_bytes((folder / "screen.h5ad").read_bytes()[:9000])
    with open(folder / "huge.h5ad", "wb") as file:
        file.truncate(2 << 30)  # it takes no room on the disk
    return folder


@pytest.fixture(scope="module")
def url(folder):
    """The page where everybody brings cells."""
    with served(str(folder / "model"), most_uploaded=MOST, device="cpu") as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with browser() as chromium:
        yield chromium


@pytest.fixture
def visitor(chromium, url):
    visitor = Visitor(chromium, url)
    yield visitor
    visitor.leave()


def test_upload_predict_download(visitor, folder, tmp_path):
    visitor.upload(folder / "screen.h5ad")
    visitor.says("100 cells, control cells of type_0 (20), type_1 (20).", "#cells")
    visitor.choose("context", "type_1")
    visitor.choose("perturbation", "pert_1")
    visitor.choose("second", "pert_2")
    visitor.ask()
    visitor.says("20 cells predicted")
    page = visitor.page
    assert page.locator("#said strong").all_inner_texts() == ["pert_1+pert_2", "type_1"]
    visitor.says("not in its data")
    visitor.says("rank correlation with the energy distance that was found is 1.00")
    page.locator("#bars svg.main-svg").first.wait_for()
    page.locator("#places svg.main-svg").first.wait_for()
    trained = load(folder / "model", device="cpu")
    expected = trained.predict(folder / "screen.h5ad", ["pert_1+pert_2"], ["type_1"], cells_per_perturbation=500)
    found = visitor.cells(tmp_path / "predicted.h5ad")
    np.testing.assert_array_equal(found[20:].X, expected.X)
    assert set(found.obs["perturbation"]) == {"control", "pert_1+pert_2"}
    change = np.abs(found.X[20:].mean(axis=0) - found.X[:20].mean(axis=0))
    largest = found.var_names[change.argmax()]
    page.locator("#genes").get_by_text(largest, exact=True).first.wait_for()
    assert page.locator("#bars .ytick text").last.text_content() == largest


def test_what_the_model_learned_from_is_said(visitor):
    visitor.page.get_by_text("What the model learned from").click()
    visitor.says("better than every baseline in pearson", "#model")
    visitor.says("train: 10 cells of 1 perturbations", "#model")


def test_an_unknown_perturbation_is_an_error_in_the_page(visitor, folder):
    visitor.upload(folder / "screen.h5ad")
    visitor.says("control cells of type_0", "#cells")
    visitor.choose("perturbation", "pert_11")
    visitor.ask()
    visitor.says("perturbation 'pert_11' is not known to the model; did you mean 'pert_1'")
    visitor.choose("perturbation", "<img src=x>")
    visitor.ask()
    visitor.says("perturbation '<img src=x>' is not known to the model; expected one of 'pert_0', 'pert_1', 'pert_2'")
    assert visitor.page.locator("#answer").is_hidden() and visitor.page.locator("img[src=x]").count() == 0
    # The page goes on.
    visitor.choose("perturbation", "pert_0")
    visitor.ask()
    visitor.says("The model was trained on real cells of pert_0 in type_0")


def test_files_that_are_no_cells_are_errors_in_the_page(visitor, folder):
    visitor.upload(folder / "broken.h5ad")
    visitor.says("broken.h5ad (9,000 bytes) cannot be read as .h5ad", "#cells")
    assert "/" not in visitor.page.locator("#cells").inner_text()
    visitor.ask()
    visitor.says("no context is chosen")


def test_a_file_of_2_gb_is_refused(visitor, folder):
    visitor.upload(folder / "huge.h5ad")
    visitor.page.get_by_text('exceed the maximum allowed size of 2.0 Mb: "huge.h5ad"').first.wait_for()
    visitor.ask()
    visitor.says("no control cells are chosen; upload an .h5ad")
    # Gradio tells its own console that it has sent nothing.
    visitor.watched.errors = [error for error in visitor.watched.errors if "404" not in error and error != "Response"]


def test_the_server_takes_no_large_file_either(url):
    boundary = uuid.uuid4().hex

    def kept() -> int:
        return sum(path.stat().st_size for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file())

    def posted(size: int) -> int:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="x.h5ad"\r\n\r\n'
        body = head.encode() + bytes(size) + f"\r\n--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        asked = urllib.request.Request(f"{url}gradio_api/upload", io.BytesIO(body), kind)
        asked.add_header("Content-Length", str(len(body)))
        try:
            return urllib.request.urlopen(asked).status
        except urllib.error.HTTPError as error:
            return error.code

    assert posted(1000) == 200
    before = kept()
    assert posted((MOST << 20) + 1000) == 413
    assert kept() == before


def test_a_request_names_no_file_that_was_not_uploaded(url, folder):
    def answered(file: str) -> str:
        """What the page's first function says of such a file."""
        session = uuid.uuid4().hex
        named = {"path": file, "meta": {"_type": "gradio.FileData"}}
        data = ["my own file", named, "", "", "", "", False, False, False]
        body = json.dumps({"data": data, "fn_index": 0, "session_hash": session}).encode()
        kind = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}gradio_api/queue/join", body, kind))
        lines = urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash={session}", timeout=20)
        return next(line.decode() for line in lines if b"process_completed" in line)

    for path in (folder / "screen.h5ad", Path("/etc/passwd"), Path("README.md")):
        said = answered(str(path))
        assert '"success":false' in said and "control cells" not in said
    for address in ("http://203.0.113.1/x.h5ad", "https://203.0.113.1/x.h5ad"):
        assert "this page fetches no addresses" in answered(address)


def test_nothing_else_of_the_machine_is_served(url, folder):
    for path in (folder / "screen.h5ad", Path(__file__), folder / "model" / "config.json", Path("/etc/passwd")):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{url}gradio_api/file={path}")


def test_two_users_at_once_do_not_mix(chromium, url, folder, tmp_path):
    one, other = Visitor(chromium, url), Visitor(chromium, url)
    one.upload(folder / "screen.h5ad")
    other.upload(folder / "other.h5ad")
    one.says("control cells of type_0 (20), type_1 (20)", "#cells")
    other.says("16 cells, control cells of a_line (16)", "#cells")
    one.choose("perturbation", "pert_2")
    one.ask()
    other.ask()
    one.says("20 cells predicted")
    other.says("16 cells predicted")
    assert one.page.locator("#said strong").all_inner_texts() == ["pert_2", "type_0"]
    assert other.page.locator("#said strong").all_inner_texts() == ["pert_0", "a_line"]
    mine, theirs = one.cells(tmp_path / "one.h5ad"), other.cells(tmp_path / "other.h5ad")
    assert set(mine.obs["perturbation"]) == {"control", "pert_2"} and set(mine.obs["cell_type"]) == {"type_0"}
    assert set(theirs.obs["perturbation"]) == {"control", "pert_0"} and set(theirs.obs["cell_type"]) == {"a_line"}
    one.leave()
    other.leave()


def test_cells_that_the_app_brings(chromium, folder, tmp_path):
    with served(str(folder / "model"), folder / "screen.h5ad", device="cpu") as url:
        visitor = Visitor(chromium, url)
        visitor.says("100 cells", "#cells")
        assert visitor.page.locator("#upload").is_hidden()
        visitor.page.get_by_label("my own file").click()
        visitor.page.locator("#upload").get_by_text("at most 500 MB").wait_for()
        visitor.upload(folder / "other.h5ad")
        visitor.says("control cells of a_line (16)", "#cells")
        visitor.page.get_by_label("screen.h5ad").click()
        visitor.says("100 cells", "#cells")
        visitor.ask()
        visitor.says("20 cells predicted")
        visitor.leave()


def test_a_port_in_use_is_one_line(url, folder):
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"127.0.0.1: port {port} is in use"), served(str(folder / "model"), port=port):
        pass


def test_what_was_written_is_gone_when_the_app_ends(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served(str(folder / "model"), folder / "screen.h5ad", device="cpu"):
        [made] = tmp_path.iterdir()
        assert made.name.startswith("pertstate-app-")
    assert list(tmp_path.iterdir()) == []
