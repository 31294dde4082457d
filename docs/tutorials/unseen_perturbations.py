# %% [markdown]
# # Perturbations that were never measured
#
# A screen of ten genes says nothing of the eleventh, unless the model is told what the genes have in common. Give each perturbation a
# *vector* (a protein embedding, a chemical fingerprint, co-expression), and the model learns from vectors instead of names.
#
# ## A screen and its vectors
#
# The perturbations of this simulated screen have vectors of five numbers, and what a perturbation does to the genes depends on its
# vector. Real vectors are never as good as these.

# %%
import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


rng = np.random.default_rng(0)
names, genes, types = [f"drug_{i}" for i in range(24)], 120, ["A", "B", "C"]
vectors = rng.normal(size=(len(names), 5))
response = 0.5 * rng.normal(size=(5, genes)) * (rng.random((5, genes)) < 0.3)
base = {cell_type: rng.normal(0, 1, genes) for cell_type in types}

counts, labels = [], []
for cell_type in types:
    for name, change in [("control", np.zeros(genes)), *zip(names, np.tanh(vectors) @ response)]:
        cells = 120 if name == "control" else 30
        counts.append(rng.poisson(rng.gamma(4, np.exp(base[cell_type] + change) / 4, (cells, genes))))
        labels += [(name, cell_type)] * cells
obs = pd.DataFrame(labels, columns=["perturbation", "cell_type"], index=[f"cell_{i}" for i in range(len(labels))])
var = pd.DataFrame(index=[f"gene_{i}" for i in range(genes)])
screen = ad.AnnData(sp.csr_matrix(np.vstack(counts).astype(np.float32)), obs=obs, var=var)
screen

# %% [markdown]
# The vectors go into a table: a name, then its numbers. `.csv`, `.parquet`, `.npz` and `.safetensors` are read. The model takes the numbers
# as they are, so scale columns to mean 0 and variance 1.

# %%
table = pd.DataFrame(vectors, index=names).rename_axis("perturbation")
table.to_csv("vectors.csv")
table.head(3).round(2)

# %% [markdown]
# Where perturbations are knock-outs or activations of genes that the screen measures, no table is needed:
# `perturbation_features="coexpression"` makes the vectors from how genes vary together in the control cells of the training.
#
# ## Hold out perturbations
#
# Six drugs are held out of all cell types. The model sees their vectors, and none of their cells.

# %%
import pertstate


unseen = names[18:]
trained = pertstate.fit(
    screen, perturbation_features="vectors.csv", test_perturbations=unseen, max_steps=300, quiet=True, disable_tqdm=True
)
averages = trained.scores.averages.pivot(index="method", columns="metric", values="value")
averages[["pearson", "mae", "energy"]].round(3)

# %% [markdown]
# Most baselines know nothing of a perturbation that was never measured, and their rows are missing. Two remain that must be beaten: the
# *mean of all perturbations*, which ignores the vector, and *linear*, a ridge regression from the vector to the change.

# %%
print(trained.scores.verdict)

# %% [markdown]
# In this simulation the change is nearly linear in the vector, so *linear* is hard to beat. On real data it often is, too: report it
# beside every prediction of an unseen perturbation.
#
# The same run in a shell:
#
# ```bash
# pertstate train screen.h5ad --perturbation_features vectors.csv --test_perturbations drug_18 drug_19 --max_steps 300
# ```
#
# ## Predict one that is in no file
#
# The table of vectors is saved with the checkpoint, so every name in it can be predicted. Vectors of further perturbations are added
# when the model predicts; in a shell, by `pertstate predict --perturbation-features FILE`.

# %%
predicted = trained.predict(screen, perturbations=["drug_20"], contexts=["A"])
predicted.obs.head(3)

# %% [markdown]
# The prediction says of itself that no cell of this perturbation took part in the training:

# %%
import json


json.loads(predicted.uns["pertstate"]["groups"])
