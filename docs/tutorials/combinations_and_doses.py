# %% [markdown]
# # Combinations and doses
#
# ## Combinations
#
# A label with `+` in it is a combination: `pert_0+pert_1` is both at once. A model predicts a pair from what it learned of each part, even
# if it never saw the two together. Here eight perturbations were measured alone and six pairs together; two pairs are held out.

# %%
import pertstate
from pertstate.data.simulator import simulate_screen


pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3)]
screen = simulate_screen(num_contexts=3, num_genes=200, cells_per_group=30, combinations=pairs, seed=3)
held_out = ["pert_0+pert_2", "pert_1+pert_3"]
trained = pertstate.fit(screen, test_perturbations=held_out, max_steps=150, quiet=True, disable_tqdm=True)
averages = trained.scores.averages.pivot(index="method", columns="metric", values="value")
averages[["pearson", "mae", "energy"]].round(3)

# %% [markdown]
# For pairs there is one baseline more, *additive*: the control cells plus the changes of both parts. A model of pairs is worth what it
# adds to that, so look at this row first. (In this simulation the effects of both parts add up on the log scale.)

# %%
print(trained.scores.verdict)

# %% [markdown]
# Any pair of known perturbations can be predicted. The order of the names plays no part:

# %%
predicted = trained.predict(screen, perturbations=["pert_7+pert_2"], contexts=["type_0"])
predicted.obs["perturbation"].unique().tolist()

# %% [markdown]
# In a shell: `pertstate train screen.h5ad --test_perturbations pert_0+pert_2 pert_1+pert_3`.
#
# ## Doses
#
# A column of obs may give the dose of each cell. In this simulated series, three drugs were measured at five doses, and their effect
# saturates. One dose in the middle, 0.1, is left out.

# %%
import anndata as ad


doses = [0.01, 0.03, 0.1, 0.3, 1.0]
parts = []
for dose in [0.0, *doses]:
    part = simulate_screen(3, 3, num_genes=150, cells_per_group=40, effect=2 * dose / (dose + 0.1), seed=5)
    part = part[(part.obs["perturbation"] == "control") == (dose == 0)].copy()
    part.obs["dose"] = dose
    part.obs_names = [f"{name}@{dose}" for name in part.obs_names]
    parts.append(part)
series = ad.concat(parts, merge="same")
series.obs.groupby(["dose", "perturbation"], observed=True).size().unstack(fill_value=0)

# %%
trained = pertstate.fit(series, dose_key="dose", exclude={"dose": [0.1]}, max_steps=200, quiet=True, disable_tqdm=True)
predicted = trained.predict(series, perturbations=["pert_0"], contexts=["type_0"], doses=doses)
predicted.obs.groupby("dose", observed=True).size()

# %% [markdown]
# The model predicts at every dose, also at the one that no training cell had. The mean change over genes, predicted and observed:

# %%
import matplotlib.pyplot as plt
import numpy as np
import scanpy as sc


real = series[series.obs["cell_type"] == "type_0"].copy()
sc.pp.normalize_total(real, target_sum=1e4)
sc.pp.log1p(real)
control = np.asarray(real[real.obs["perturbation"] == "control"].X.mean(axis=0)).ravel()


def size(cells, dose):
    """The mean absolute change of the genes at a dose of pert_0."""
    rows = (cells.obs["perturbation"].str.startswith("pert_0") & (cells.obs["dose"].astype(float) == dose)).to_numpy()
    return np.abs(np.asarray(cells[rows].X.mean(axis=0)).ravel() - control).mean()


figure, panel = plt.subplots(figsize=(5, 3.4), layout="constrained")
panel.plot(doses, [size(real, dose) for dose in doses], "o", label="observed")
panel.plot(doses, [size(predicted, dose) for dose in doses], "-", label="predicted")
panel.axvline(0.1, color="0.85", zorder=0)
panel.set(xscale="log", xlabel="dose (0.1 was not trained on)", ylabel="mean absolute change")
panel.legend()

# %% [markdown]
# Observed changes have the noise of their cells in them, so that they are never 0. In a shell: `pertstate train series.h5ad --dose_key dose`,
# then `pertstate predict --dose 0.1 0.2`. `drug@0.1` names one dose where perturbations are held out.
