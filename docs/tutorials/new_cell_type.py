# %% [markdown]
# # Fine-tuning on a new cell type with LoRA
#
# Somebody trained a model on many cell types, and you have a few perturbed cells of another one. A low-rank adapter (LoRA) trains
# few numbers beside the weights of that model, which stay as they are.
#
# ## The model of somebody else
#
# It knows eleven cell types. The twelfth is yours.

# %%
import pertstate
from pertstate.data.simulator import simulate_screen


screen = simulate_screen(num_genes=200, cells_per_group=30, seed=2)
theirs = screen[screen.obs["cell_type"] != "type_11"].copy()
mine = screen[screen.obs["cell_type"] == "type_11"].copy()
base = pertstate.fit(theirs, max_steps=150, quiet=True, disable_tqdm=True)
base.save("base")

# %% [markdown]
# ## Your cells
#
# Of the eight perturbations, six were measured in your cell type. Two are held out to see what the adapter is worth there.

# %%
tested = ["pert_6", "pert_7"]
adapted = pertstate.fit(
    mine,
    pretrained="base",
    test_perturbations=tested,
    lora_rank=8,
    max_steps=60,
    learning_rate=1e-3,
    quiet=True,
    disable_tqdm=True,
)

# %% [markdown]
# The same in a shell:
#
# ```bash
# pertstate train mine.h5ad --pretrained base --test_perturbations pert_6 pert_7 --lora_rank 8 --max_steps 60 --learning_rate 1e-3
# ```
#
# The adapter is small beside its base model:

# %%
from pathlib import Path


adapted.save("adapter")
for file in ["base/model.safetensors", "adapter/adapter_model.safetensors"]:
    print(f"{file}: {Path(file).stat().st_size / 1e6:.2f} MB")

# %% [markdown]
# ## Before and after
#
# Both models predict the two perturbations that the adapter never saw in this cell type.

# %%
import pandas as pd


def scores(model):
    predicted = model.predict(mine, perturbations=tested)
    found = pertstate.evaluate(predicted, mine, record=adapted.record, quiet=True).averages
    return found[found["method"] == "model"].set_index("metric")["value"]


pd.DataFrame({"before": scores(base), "after": scores(adapted)}).loc[["pearson", "mae", "energy"]].round(3)

# %% [markdown]
# Two perturbations are few. A difference that is small beside this interval means nothing, and a few cells often change little:

# %%
table = adapted.scores.averages
table[table["method"] == "model"][["metric", "value", "low", "high"]].head(3).round(3)

# %% [markdown]
# ## One plain model again
#
# `pertstate merge` adds the adapter to its base model. What comes out loads like any checkpoint, and needs no peft.

# %% language="bash"
# pertstate merge adapter merged 2>&1

# %%
pertstate.load("merged").model.num_parameters()

# %% [markdown]
# [Fine-tuning](../fine_tuning.md) has the rest: new perturbations and genes, training of heads alone, and control cells alone.
