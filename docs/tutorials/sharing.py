# %% [markdown]
# # Sharing on the Hub
#
# A model is pushed to the Hugging Face Hub with its code, its processor and its card. Whoever loads it needs `transformers`,
# and not `pertstate`.
#
# This page ran against a small Hub on its own machine, which the project's tests bring along. With the Hub itself you run
# `hf auth login` once, and nothing else is different.

# %% tags=["hidden"]
import os
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, os.environ["PERTSTATE_ROOT"] + "/tests")
from hub_server import HubServer


hub = HubServer(Path(tempfile.mkdtemp()))
hub.start()
os.environ.update(
    HF_ENDPOINT=hub.url,
    HF_TOKEN=hub.add_user("ada"),
    HF_HUB_DISABLE_XET="1",
    HF_HOME=tempfile.mkdtemp(),
    HF_HUB_DISABLE_TELEMETRY="1",
)

# %%
import pertstate
from pertstate.data.simulator import simulate_screen


screen = simulate_screen(num_contexts=6, num_perturbations=4, num_genes=120, cells_per_group=30)
screen.write_h5ad("screen.h5ad")
trained = pertstate.fit(
    "screen.h5ad", "runs/screen", test_contexts=["type_5"], max_steps=100, quiet=True, disable_tqdm=True
)

# %% [markdown]
# ## Read the card first
#
# The run wrote it: what was read, what was held out, and the scores beside the baselines. `license` and `data_license` in the section
# `training` add what only you know.

# %%
card = Path("runs/screen/README.md").read_text().split("---", 2)[2]
print(card[:1500], "..")

# %% [markdown]
# ## Push
#
# All files go in one commit. A folder that is not whole is refused.

# %% language="bash"
# pertstate push runs/screen ada/screen --message "The first screen" 2>&1

# %% [markdown]
# ## Load
#
# Pin the commit whose code you have read. `pertstate.load` runs no code of the repository:

# %%
from huggingface_hub import HfApi


commit = HfApi().model_info("ada/screen").sha
loaded = pertstate.load("ada/screen", revision=commit)
predicted = loaded.predict(screen, perturbations=["pert_0"], contexts=["type_5"])
loaded.model.num_parameters(), predicted.shape

# %% [markdown]
# The predictions are those of the model that was pushed:

# %%
import numpy as np


mine = trained.predict(screen, perturbations=["pert_0"], contexts=["type_5"])
bool(np.array_equal(mine.X, predicted.X))

# %% [markdown]
# Without `pertstate`, the repository brings its own code:

# %%
script = f"""
import anndata as ad
from transformers import AutoModel, AutoProcessor

name, revision = "ada/screen", "{commit}"
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
model = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True).eval()
sentences = processor(ad.read_h5ad("screen.h5ad"), perturbation="pert_0", context="type_5")
print(processor.decode(model(**sentences), sentences))
"""
_ = Path("load.py").write_text(script)

# %% language="bash"
# python load.py 2>/dev/null

# %% tags=["hidden"]
hub.stop()

# %% [markdown]
# [Sharing](../sharing.md) says how checkpoints are pushed while a model trains.
