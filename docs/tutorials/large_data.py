# %% [markdown]
# # Larger than memory, and many GPUs
#
# Up to a few hundred thousand cells, files are read into memory. Beyond that, `pertstate prepare` turns any number of files into a *cell
# store*, which training reads by memory map. This page does so with two small files; with a thousand, the commands are the same.

# %%
from pathlib import Path

from pertstate.data.simulator import simulate_screen


screen = simulate_screen(num_contexts=8, num_genes=200, cells_per_group=30)
Path("files").mkdir()
first = screen.obs["cell_type"].isin([f"type_{i}" for i in range(4)])
screen[first].write_h5ad("files/one.h5ad")
screen[~first].write_h5ad("files/two.h5ad")

run = """
data:
  datasets: {screen: files/*.h5ad}
  perturbation_key: perturbation
  control: control
  context_key: cell_type
  batch_key: batch
  test_contexts: [type_7]
training:
  output_dir: runs/screen
  max_steps: 40
"""
_ = Path("run.yaml").write_text(run)

# %% [markdown]
# ## A store
#
# Memory stays bounded whatever the number of cells. A store of counts serves every model.

# %% language="bash"
# pertstate prepare --config run.yaml --output screen.store 2>&1

# %%
from pertstate.data import CellStore


store = CellStore("screen.store")
store.groups.head(3)

# %% language="bash"
# pertstate info screen.store --verify 2>&1

# %% [markdown]
# ## Train from it
#
# This is the same run as from the files, with the same weights in the end.

# %% language="bash"
# pertstate train run.yaml --store screen.store 2>&1 | tail -n 3
# pertstate train run.yaml --output_dir runs/files 2>/dev/null
# cmp runs/screen/model.safetensors runs/files/model.safetensors && echo "the same bits"

# %% [markdown]
# ## Many GPUs
#
# One line trains on eight GPUs; sentences are shared out among the processes:
#
# ```bash
# accelerate launch --num_processes 8 -m pertstate.train run.yaml --store screen.store --bf16 true
# ```
#
# Batches are for each process, so eight processes take eight times as many cells a step. The line also runs without a GPU, where
# accelerate starts several processes only with `--multi_gpu`:

# %% language="bash"
# accelerate launch --multi_gpu --num_processes 2 -m pertstate.train run.yaml --store screen.store --use_cpu true \
#     --output_dir runs/two --max_steps 20 2>&1 | grep -E "device|checkpoint|Verdict"

# %% [markdown]
# A run that was stopped continues with `--resume_from_checkpoint last`, to the same bits.
#
# ## Nothing on disk
#
# A `stream` reads cells while it trains on them, from parquet, from a data set on the Hub, or from a store. See
# [large data](../data.md#a-stream).
