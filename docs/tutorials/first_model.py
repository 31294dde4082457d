# %% [markdown]
# # A first model
#
# A screen measures how cells of several types respond to perturbations. One cell type was never perturbed. What would it do? This page
# trains a model on the others, predicts that type, and says how good the prediction is. It takes half a minute on two cores.
#
# The screen is simulated, so that nothing is downloaded. An `.h5ad` of your own is used in the same way: give its path instead of
# `adata`.

# %%
import pertstate
from pertstate.data.simulator import simulate_screen


adata = simulate_screen()
adata

# %% [markdown]
# `X` holds counts. `obs` says what was done to each cell (`perturbation`; unperturbed cells are called `control`), and its type. Control
# cells were measured for every type:

# %%
adata.obs.groupby(["cell_type", "perturbation"], observed=True).size().unstack().head(3)

# %% [markdown]
# ## Train
#
# `type_11` is held out: the model sees its control cells, and none of its perturbed ones. Columns, genes, size of the model and batch are
# found and chosen, and the log says each. To keep this page short, we set the number of steps. Leave it out, and the run chooses it on
# training cells that it holds out by itself; that takes up to three times as long.

# %%
trained = pertstate.fit(adata, test_contexts=["type_11"], max_steps=200, disable_tqdm=True)

# %% [markdown]
# In a shell, this is `pertstate train screen.h5ad --test_contexts type_11 --max_steps 200`.
#
# ## How good is it?
#
# The scores stand beside those of simple predictions ("no change" is the control cells themselves), and beside the best that is
# possible given the noise of the cells ("ceiling"). Higher is better for `pearson`; lower is better for `mae` and `energy`.

# %%
table = trained.scores.averages.pivot(index="method", columns="metric", values="value")
table[["pearson", "mae", "energy"]].round(3)

# %%
print(trained.scores.verdict)

# %% [markdown]
# The [verdict](../verdict.md) says "better" only where the difference from a baseline is larger than its uncertainty.
#
# ## Predict

# %%
predicted = trained.predict(adata, contexts=["type_11"], perturbations=["pert_1", "pert_5"])
predicted

# %% [markdown]
# Each cell is a control cell of `type_11` as the model predicts it after the perturbation. `X` is log1p expression. The mean change of
# each gene, predicted against observed:

# %%
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc


real = adata[adata.obs["cell_type"] == "type_11"].copy()
sc.pp.normalize_total(real, target_sum=1e4)
sc.pp.log1p(real)


def mean(cells, perturbation):
    return np.asarray(cells[cells.obs["perturbation"] == perturbation].X.mean(axis=0)).ravel()


control = mean(real, "control")
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), sharex=True, sharey=True, layout="constrained")
for panel, perturbation in zip(panels, ["pert_1", "pert_5"]):
    panel.axline((0, 0), slope=1, color="0.8")
    panel.scatter(mean(real, perturbation) - control, mean(predicted, perturbation) - control, s=8)
    panel.set(title=perturbation, xlabel="observed change", ylabel="predicted change")

# %% [markdown]
# ## Keep it

# %%
trained.save("model")
again = pertstate.load("model")
again

# %%
from pathlib import Path


sorted(file.name for file in Path("model").iterdir() if file.suffix != ".py")

# %% [markdown]
# The folder is a checkpoint like any other of Hugging Face: weights as safetensors, the rest as JSON, a model card, and the code that
# loads it where `pertstate` is not installed. Next: [your own screen](own_screen.py), or [how to read the report](reading_the_report.py).
