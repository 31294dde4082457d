# %% [markdown]
# # Reading the report
#
# A run that held something out ends with scores and a verdict. `pertstate report` shows them as one page for the browser. This page
# goes through it, and through the tables behind it.

# %%
import pertstate
from pertstate.data.simulator import simulate_screen


screen = simulate_screen(num_contexts=10, num_perturbations=6, num_genes=200, cells_per_group=30, effect=1.3, seed=4)
held_out = ["type_8", "type_9"]
trained = pertstate.fit(screen, test_contexts=held_out, max_steps=150, quiet=True, disable_tqdm=True)
trained.report("report.html")

# %% [markdown]
# In a shell: `pertstate report runs/screen -o report.html`. This is the page itself:

# %%
from IPython.display import IFrame


IFrame("report.html", width="100%", height=700)

# %% [markdown]
# ## 1. The verdict
#
# Read it first. It compares the model with each baseline on the same groups, by the paired bootstrap, and says *better* or *worse* only
# where the 95 % interval of the difference leaves out 0.

# %%
print(trained.scores.verdict)

# %% [markdown]
# ## 2. Averages and their intervals
#
# One row for each method: the model, every baseline that knows something of the groups, and the ceiling. The interval of a single row says
# how far its own average may be off. It does not say which of two rows is better, because both share the same cells: the verdict does.

# %%
averages = trained.scores.averages
averages[averages["metric"] == "pearson"][["method", "value", "low", "high"]].sort_values("value").round(3)

# %%
import matplotlib.pyplot as plt


shown = averages[averages["metric"] == "energy"].sort_values("value", ascending=False)
figure, panel = plt.subplots(figsize=(6, 3.4), layout="constrained")
panel.hlines(shown["method"], shown["low"], shown["high"], color="0.7")
panel.plot(shown["value"], shown["method"], "o")
panel.set(xlabel="energy distance (lower is better)")

# %% [markdown]
# The *ceiling* is no prediction. It is what a perfect model would reach, given that the real cells are few and noisy. A model at the
# ceiling cannot be improved on these data; a baseline at the ceiling says that the question is too easy.
#
# ## 3. Groups
#
# An average hides much. The table has a row for each context, perturbation and method:

# %%
table = trained.scores.table
model = table[table["method"] == "model"]
model[["context", "perturbation", "pearson", "mae", "energy"]].sort_values("pearson").head(4).round(3)

# %% [markdown]
# A group with a low correlation may be one in which little happens. Compare with its ceiling before you blame the model:

# %%
worst = model.sort_values("pearson").iloc[0]
rows = table[(table["context"] == worst["context"]) & (table["perturbation"] == worst["perturbation"])]
rows[["method", "pearson", "mae", "energy"]].round(3)

# %% [markdown]
# ## 4. Notes and marks
#
# Notes say what may mislead: control cells of the test contexts that were trained on, genes that were chosen on test cells, shares of
# zeros. Groups that the model was trained on are marked, and left out of averages and verdict.
# Here no group is marked. The notes are:

# %%
trained.scores.notes

# %% [markdown]
# ## 5. Training curves
#
# They are in the report, and in `history`:

# %%
history = trained.history
history[["step", "loss", "eval_loss"]].dropna(how="all", subset=["loss", "eval_loss"]).tail(4)

# %% [markdown]
# [How to read the verdict](../verdict.md) explains each sentence that it may say.
