"""A simulated screen: counts of cells in several contexts, under single and combined perturbations."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def simulate_screen(
    num_contexts: int = 12,
    num_perturbations: int = 8,
    num_genes: int = 300,
    cells_per_group: int = 40,
    num_batches: int = 2,
    num_lineages: int = 3,
    combinations: list[tuple[int, int]] | None = None,
    effect: float = 1.0,
    seed: int = 0,
) -> ad.AnnData:
    """
    Simulate a screen of cells with gene programmes.

    Contexts differ in the activity of their programmes; contexts of one lineage differ less. A perturbation moves a few
    programmes and genes. It moves them more in a context where one programme, its "receptor", is more active. So the
    response of a context can be learned from its unperturbed cells and from contexts of its lineage. Counts are
    Gamma-Poisson, with a depth for each cell.

    Args:
        num_contexts, num_perturbations, num_genes, num_batches, num_lineages (`int`): how many there are.
        cells_per_group (`int`): cells of each perturbation in each context; there are twice as many control cells.
        combinations (`list[tuple[int, int]]`, *optional*): pairs of perturbations that are also applied together. Their
            effects add up on the log scale.
        effect (`float`): strength of the perturbations, on the log scale.
        seed (`int`): the same seed gives the same screen.

    Returns:
        `AnnData`: X counts (CSR float32); obs `perturbation` ("control", "pert_0", .., "pert_0+pert_1"), `cell_type`
        and `batch`.
    """
    rng = np.random.default_rng(seed)
    num_programmes = 10
    loadings = rng.gamma(0.4, 1.0, (num_programmes, num_genes)) * rng.choice([-1, 1], (num_programmes, num_genes))
    loadings *= rng.random((num_programmes, num_genes)) < 0.15
    base = rng.normal(-0.5, 1.3, num_genes)
    lineages = rng.normal(0, 1.0, (num_lineages, num_programmes))
    contexts = lineages[np.arange(num_contexts) % num_lineages] + rng.normal(0, 0.3, (num_contexts, num_programmes))
    moves = np.zeros((num_perturbations, num_genes))
    for p in range(num_perturbations):
        programmes = rng.choice(num_programmes, 2, replace=False)
        moves[p] = effect * (rng.normal(0, 0.8, 2) @ loadings[programmes])
        genes = rng.choice(num_genes, max(1, num_genes // 30), replace=False)
        moves[p, genes] += effect * rng.normal(0, 1.2, len(genes))
    receptors = rng.integers(num_programmes, size=num_perturbations)
    batches = rng.normal(0, 0.1, (num_batches, num_genes))

    arms: list[tuple[str, tuple[int, ...], int]] = [("control", (), 2 * cells_per_group)]
    arms += [(f"pert_{p}", (p,), cells_per_group) for p in range(num_perturbations)]
    arms += [(f"pert_{a}+pert_{b}", (a, b), cells_per_group) for a, b in combinations or []]
    counts, frames = [], []
    for c in range(num_contexts):
        response = 2 / (1 + np.exp(-2 * contexts[c, receptors]))
        for name, parts, n in arms:
            move = sum((response[part] * moves[part] for part in parts), np.zeros(num_genes))
            batch = rng.integers(num_batches, size=n)
            activity = contexts[c] + rng.normal(0, 0.3, (n, num_programmes))
            log_rate = base + activity @ loadings + batches[batch] + move
            rate = np.exp(np.clip(log_rate, -8, 5))
            depth = rng.lognormal(0.0, 0.25, (n, 1)) * 3 * num_genes
            mean = depth * rate / rate.sum(axis=1, keepdims=True)
            counts.append(sp.csr_matrix(rng.poisson(rng.gamma(4.0, mean / 4.0)).astype(np.float32)))
            frames.append(
                pd.DataFrame({"perturbation": name, "cell_type": f"type_{c}", "batch": [f"b{b}" for b in batch]})
            )
    obs = pd.concat(frames, ignore_index=True)
    obs.index = [f"cell_{i}" for i in range(len(obs))]
    return ad.AnnData(
        sp.vstack(counts, format="csr"),
        obs=obs.astype("category"),
        var=pd.DataFrame(index=[f"gene_{g}" for g in range(num_genes)]),
    )
