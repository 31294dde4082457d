"""The program of a Space, as the Hub starts it."""

import os
import re
import subprocess
import sys

import pytest
from app_models import write_model
from app_visitor import Visitor
from browser import browser

from pertstate.app import space
from pertstate.app.space import write_space
from pertstate.hub.push import push_checkpoint


pytestmark = pytest.mark.browser


def test_a_space_serves_the_model_of_the_hub(hub, tmp_path, monkeypatch):
    write_model(tmp_path)
    push_checkpoint(tmp_path / "model", "ada/kang")
    monkeypatch.setattr(space, "requires", lambda name: [])
    out = tmp_path / "out"
    write_space(out, "ada/kang", adata=tmp_path / "screen.h5ad")
    # The package is that of the Space.
    page = out / "pertstate" / "app" / "page.py"
    page.write_text(page.read_text().replace("as this model predicts it", "as this Space predicts it"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp_path)}
    started = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=out,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=open(tmp_path / "stderr", "w"),
        text=True,
    )
    try:
        assert started.stdout is not None
        line = next((line for line in started.stdout if " answers at " in line), "")
        found = re.search(r"ada/kang answers at (http://127\.0\.0\.1:\d+/)", line)
        assert found, (tmp_path / "stderr").read_text()[-2000:]
        with browser() as chromium:
            visitor = Visitor(chromium, found[1])
            visitor.says("as this Space predicts it", "body")
            visitor.says("100 cells", "#cells")
            visitor.ask()
            visitor.says("20 cells predicted")
            visitor.says("The model was trained on real cells of pert_0 in type_0")
            assert visitor.cells(tmp_path / "predicted.h5ad").uns["pertstate"]["checkpoint"].startswith("ada/kang@")
            visitor.leave()
    finally:
        started.terminate()
        started.wait()
