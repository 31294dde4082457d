"""Configuration of the gene-token transformer."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ...base.configuration_perturbation import NetworkConfig, strict_config
from ...base.constants import Values


@strict_config
class ScGPTConfig(NetworkConfig):
    r"""
    Configuration of the gene-token transformer, [`ScGPTForPerturbation`] (Cui et al. 2024). The fields of
    [`NetworkConfig`], with other defaults (`hidden_size` 512, `hidden_act` "relu", `hidden_dropout` 0.2, `set_size` 8),
    and the following; names in brackets are those of `args.json` in a published folder.

    The model reads and predicts the expression of genes, one token each: `output_dim` is `input_dim`, and there is no
    gene decoder. Cells do not see one another, so `set_size` only says how many of them are counted as one sentence. With
    `pretrained: FOLDER` in its model section, a run starts from a published folder and takes the sizes from there
    (`pertstate.legacy.scgpt`).

    Args:
        perturbation_type (`str`, *optional*, defaults to `"genetic"`):
            How a perturbation enters.

            - `"genetic"`: it is a gene of the model, whose token is flagged; needs `perturbed_genes`
            - `"chemical"`: it is a drug, a cytokine, or anything else that is not a gene of the model: an embedding of it
              is added to every token
        perturbed_genes (`list[int]`, *optional*):
            For each perturbation id the position of its gene among the model's genes. For `"genetic"` alone; it follows
            from the names in the processor.
        num_hidden_layers (`int`, *optional*, defaults to 12) [nlayers]:
            Transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 8) [nheads]:
            Attention heads; they divide `hidden_size` [embsize].
        intermediate_size (`int`, *optional*, defaults to `hidden_size`) [d_hid]:
            Width of the feed-forward layer.
        attention_dropout (`float`, *optional*, defaults to `hidden_dropout`) [dropout]:
            Dropout of the attention weights.
        genes_per_step (`int`, *optional*, defaults to 1536):
            Genes of one training step, drawn anew each time. Perturbed genes of the batch are always among them.
        genes_per_chunk (`int`, *optional*):
            Genes that are predicted together in evaluation. None: all genes see one another. A smaller number: genes are
            predicted in groups of this size, and a group sees only itself and the perturbed genes. This takes less time and
            memory, and gives **other predictions**, which depend on the number.
        tokens_per_pass (`int`, *optional*, defaults to 65536):
            Gene tokens (cells x genes) that are computed at a time in evaluation. It bounds the memory; predictions are the
            same for any number, to float rounding.
    """

    model_type = "state-scgpt"
    _derived: ClassVar[tuple[str, ...]] = ("intermediate_size",)
    training_fields: ClassVar[tuple[str, ...]] = (
        *NetworkConfig.training_fields,
        "attention_dropout",
        "genes_per_step",
        "genes_per_chunk",
        "tokens_per_pass",
    )
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "genes_per_step": 64,
            # That of torch's own linear layers of this width; the default suits the published width.
            "initializer_range": 0.1,
        },
        "published": {},
    }
    training_defaults: ClassVar[dict] = {"learning_rate": 5e-5, "lr_decay_epochs": 25, "lr_decay_factor": 0.9}
    # Genes have no order, and each sees all others.
    attention: ClassVar[str] = "bidirectional"

    hidden_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout: float | int = 0.2
    set_size: int = 8
    perturbation_type: Literal["genetic", "chemical"] = "genetic"
    perturbed_genes: list[int] | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    if TYPE_CHECKING:
        # Never None once the config is made: `__post_init__` fills them in.
        intermediate_size: int = 512
        attention_dropout: float | int = 0.2
    else:
        intermediate_size: int | None = None
        attention_dropout: float | int | None = None
    genes_per_step: int = 1536
    genes_per_chunk: int | None = None
    tokens_per_pass: int = 65536

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = self.hidden_size
        if self.attention_dropout is None:
            self.attention_dropout = self.hidden_dropout
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def fields_from_names(cls, processor, fields: dict) -> dict:
        """
        `perturbed_genes`, for genetic perturbations.

        Raises:
            ValueError: the cells are embeddings, or a perturbation is no gene of the model; all such are listed.
        """
        if processor.values == Values.EMBEDDING:
            raise ValueError(
                f"{cls.model_type} reads the expression of genes, a token each, found input={processor.input!r}, an "
                "embedding: set data.input to X or layers/NAME"
            )
        if fields.get("perturbation_type", cls.perturbation_type) != "genetic":
            return {}
        if processor.perturbation_features is not None:
            raise ValueError(
                "perturbation_type='genetic' flags the tokens of perturbed genes and takes no perturbation features: leave "
                "data.perturbation_features out, or set model.perturbation_type to chemical"
            )
        return cls._positions(processor.vocabulary)

    def fields_of_vocabulary(self, vocabulary) -> dict:
        return self._positions(vocabulary) if self.perturbation_type == "genetic" else {}

    @staticmethod
    def _positions(vocabulary) -> dict:
        positions = {gene: i for i, gene in enumerate(vocabulary.genes)}
        names = vocabulary.perturbations
        absent = [name for name in names if name not in positions]
        if absent:
            shown = ", ".join(map(repr, absent[:20])) + (f" and {len(absent) - 20} more" if len(absent) > 20 else "")
            raise ValueError(
                "perturbation_type='genetic' flags the token of the perturbed gene: expected every perturbation among the "
                f"model's {len(positions)} genes, found {len(absent)} of {len(names)} that are not: {shown}; add them to "
                "data.genes (a list; or leave it out for all genes of the data), or set model.perturbation_type to chemical"
            )
        return {"perturbed_genes": [positions[name] for name in names]}

    def validate_scgpt(self):
        counts = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "genes_per_step", "tokens_per_pass")
        self._check_at_least(1, *counts)
        if self.genes_per_chunk is not None:
            self._check_at_least(1, "genes_per_chunk")
        self._check_range("attention_dropout", 0, 1, upper_open=True)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: change "
                "one of them"
            )
        if self.output_dim != self.input_dim:
            raise ValueError(
                f"{self.model_type} predicts the genes that it reads: expected output_dim == input_dim, found "
                f"{self.output_dim} and {self.input_dim}; leave output_dim out"
            )
        if self.gene_dim is not None:
            raise ValueError(
                f"{self.model_type} predicts genes itself and has no gene decoder, found gene_dim={self.gene_dim}; leave it "
                "out (and data.gene_input)"
            )
        if self.perturbation_type == "chemical":
            if self.perturbed_genes is not None:
                raise ValueError("perturbed_genes is for perturbation_type='genetic', found 'chemical'; leave it out")
            return
        if self.perturbation_dim is not None:
            raise ValueError(
                f"perturbation_type='genetic' takes perturbations by id, found perturbation_dim={self.perturbation_dim}; set "
                "num_perturbations and perturbed_genes, or perturbation_type='chemical'"
            )
        if self.num_perturbations is None:
            return
        if self.perturbed_genes is None or len(self.perturbed_genes) != self.num_perturbations:
            found = None if self.perturbed_genes is None else len(self.perturbed_genes)
            raise ValueError(
                f"perturbation_type='genetic' needs perturbed_genes, the gene of each of {self.num_perturbations} "
                f"perturbations, found {found}; give a list of that length, or set perturbation_type='chemical'"
            )
        outside = [gene for gene in self.perturbed_genes if not 0 <= gene < self.input_dim]
        if outside:
            raise ValueError(
                f"perturbed_genes: expected positions among the {self.input_dim} genes, found {outside[:10]}; each "
                "perturbation needs its gene among the model's genes, or set perturbation_type='chemical'"
            )


__all__ = ["ScGPTConfig"]
