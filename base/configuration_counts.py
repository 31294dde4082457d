"""What the families that model raw counts share."""

from typing import Literal

from .configuration_perturbation import NetworkConfig, strict_config


@strict_config
class CountsConfig(NetworkConfig):
    r"""
    What the families that model raw counts share. They read counts and predict log1p expression, like the other families.
    The fields of [`NetworkConfig`], and:

    Args:
        likelihood (`str`, *optional*, defaults to `"zinb"`):
            Distribution of a count.

            - `"nb"`: negative binomial, with one inverse dispersion for each gene
            - `"zinb"`: the same, with additional zeros
            - `"gauss"`: not a distribution of counts; for the families that also read log1p expression or embeddings
        prediction (`str`, *optional*, defaults to `"mean_log1p"`):
            Which figure `predictions` are of the predicted distribution of counts. Its cells have as many counts as the
            control cell.

            - `"mean_log1p"`: the mean of log1p expression, which the mean of observed cells estimates
            - `"log1p_mean"`: log1p of mean expression, as published. It is the larger of the two, most of all where counts
              are few, and then does not compare well with observed log1p cells
        library_size (`float`, *optional*, defaults to 10,000):
            Total counts of a cell, over the model's genes, that expression is scaled to before log1p. None: not scaled.
    """

    likelihood: Literal["gauss", "nb", "zinb"] = "zinb"
    prediction: Literal["mean_log1p", "log1p_mean"] = "mean_log1p"
    library_size: float | int | None = 10_000

    @property
    def reads_counts(self) -> bool:
        return True

    def validate_counts(self):
        if self.library_size is not None and not 0 < self.library_size < float("inf"):
            raise ValueError(f"library_size must be a number above 0, or None, found {self.library_size}")
        predicts_genes = self.output_dim == self.input_dim and self.gene_dim is None and self.nonnegative_output
        if self.reads_counts and not predicts_genes:
            raise ValueError(
                "this model reads counts of genes and predicts log1p expression of the same genes: expected output_dim == "
                f"input_dim, no gene_dim and nonnegative_output, found output_dim={self.output_dim}, input_dim="
                f"{self.input_dim}, gene_dim={self.gene_dim}, nonnegative_output={self.nonnegative_output}; leave them out"
            )


__all__ = ["CountsConfig"]
