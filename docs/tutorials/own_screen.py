# %% [markdown]
# # Your own screen, from raw counts
#
# A file from a sequencing run rarely looks like an example. This page takes one with the usual troubles: raw counts, guides instead of
# genes, several kinds of control guides, cells without a guide, cells that failed quality control, and gene symbols that stand in a
# column. Nothing has to be cleaned first: the run file says what is what.

# %% tags=["hidden"]
import numpy as np

from pertstate.data.simulator import simulate_screen


screen = simulate_screen(num_contexts=6, num_perturbations=6, num_genes=200, cells_per_group=30, seed=1)
rng = np.random.default_rng(0)
gene = screen.obs["perturbation"].astype(str).str.replace("pert_", "TF")
guide = gene + np.where(rng.random(screen.n_obs) < 0.5, "_g1", "_g2")
controls = gene == "control"
guide[controls] = "NTC-" + rng.integers(1, 5, controls.sum()).astype(str).astype(object)
guide[rng.random(screen.n_obs) < 0.02] = np.nan
screen.obs = screen.obs.assign(
    guide=guide,
    line=screen.obs["cell_type"].str.replace("type", "line"),
    lane=screen.obs["batch"],
    qc=np.where(rng.random(screen.n_obs) < 0.05, "fail", "pass"),
)[["guide", "line", "lane", "qc"]]
screen.var["symbol"] = [f"GENE{i}" for i in range(screen.n_vars)]
screen.var_names = [f"ENSG{i:011}" for i in range(screen.n_vars)]
screen.write_h5ad("screen.h5ad")

# %% [markdown]
# ## What is in the file?

# %%
import anndata as ad


adata = ad.read_h5ad("screen.h5ad")
adata.obs.head(4)

# %% language="bash"
# pertstate info screen.h5ad || true

# %% [markdown]
# `info` finds columns by the names that people often use, and says what it does not find. We answer in a run file:

# %%
from pathlib import Path


run = """
data:
  datasets: {mine: screen.h5ad}
  perturbation_key: guide
  perturbation_map: {"*_g1": "*", "*_g2": "*"}   # guides to genes
  control: NTC*                                  # every guide that targets nothing
  unlabelled: drop                               # cells without a guide
  exclude: {qc: [fail]}
  context_key: line
  batch_key: lane
  gene_key: symbol
  test_contexts: [line_5]
training:
  output_dir: runs/mine
  max_steps: 150
"""
_ = Path("run.yaml").write_text(run)

# %% [markdown]
# ## Try it dry
#
# `--dry_run` reads the data, takes a few steps, says how long the run takes and what is held out, and writes nothing.

# %% language="bash"
# pertstate train run.yaml --dry_run 2>&1

# %% [markdown]
# ## Train

# %% language="bash"
# pertstate train run.yaml 2>&1

# %% [markdown]
# Counts were recognised as counts: each cell is scaled to 10,000 and log1p-transformed, and the model remembers that. The same
# holds when it predicts: raw counts go in, and log1p expression comes out. If the file held log1p values already, they would be
# taken as they are.
#
# A mistake is one error that says what to do. Here the column is misspelt:

# %% language="bash"
# pertstate train run.yaml --context_key lines --output_dir runs/other 2>&1 || true

# %% [markdown]
# ## Predict and score
#
# By default, `predict` predicts every perturbation that the file has in a context. The perturbations of the output are genes, not guides.

# %% language="bash"
# pertstate predict --model runs/mine --adata screen.h5ad --context line_5 --output predicted.h5ad 2>&1
# pertstate evaluate --model runs/mine --real screen.h5ad --output scores.csv 2>&1 | tail -n 3

# %%
predicted = ad.read_h5ad("predicted.h5ad")
predicted.obs.groupby(["line", "guide"], observed=True).size()

# %% [markdown]
# All fields are in [training](../training.md) and [large data](../data.md#labels).
