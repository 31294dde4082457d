"""Configuration of the compositional perturbation autoencoder."""

from typing import ClassVar, Literal

from ...base.configuration_counts import CountsConfig
from ...base.configuration_perturbation import strict_config


@strict_config
class CPAConfig(CountsConfig):
    r"""
    Configuration of [`CPAForPerturbation`], the compositional perturbation autoencoder. The fields of [`CountsConfig`],
    with the published sizes as defaults, and:

    Args:
        latent_dim (`int`, *optional*, defaults to 84):
            Width of the latent state of a cell, and of the effects that are added to it.
        num_encoder_layers (`int`, *optional*, defaults to 5), num_decoder_layers (`int`, *optional*, defaults to 4):
            Layers of the encoder, the last of width `latent_dim`, and hidden layers of the decoder.
        doser (`str`, *optional*, defaults to `"linear"`):
            What a perturbation's effect is multiplied by at a dose; monotone in the dose, and 0 at dose 0.

            - `"linear"`: the dose itself (the length of the perturbation's learned vector is the slope)
            - `"sigmoid"`: `sigmoid(slope * dose + offset) - sigmoid(offset)`, slope above 0 and offset learned for each
              perturbation; needs `num_perturbations`
        likelihood (`str`, *optional*, defaults to `"gauss"`):
            Distribution of a gene in a perturbed cell.

            - `"gauss"`: normal, of log1p expression or an embedding
            - `"nb"`, `"zinb"`: of raw counts, see [`CountsConfig`], whose other fields are for these alone
        adversary_hidden_size (`int`, *optional*, defaults to 128), num_adversary_layers (`int`, *optional*, defaults to 3),
        adversary_dropout (`float`, *optional*, defaults to 0.25):
            Of the classifiers that tell perturbation, context and batch from the basal state.
        adversarial_weight (`float`, *optional*, defaults to 15.0):
            Greatest weight of the adversaries' cross-entropy in the autoencoder's loss.
        adversary_warmup_steps (`int`, *optional*, defaults to 50,000):
            Optimiser steps before the adversaries enter the autoencoder's loss. They are trained from the start themselves.
        adversary_ramp_steps (`int`, *optional*, defaults to 50,000):
            Optimiser steps after those, in which the weight rises to `adversarial_weight`. 0: it rises at once.
        penalty_weight (`float`, *optional*, defaults to 20.0):
            Weight of the adversaries' gradient penalty.
        adversary_learning_rate, adversary_weight_decay (`float`, *optional*):
            Of the adversaries. None: those of the run.

    Example:
    ```python
    >>> CPAConfig.from_preset("published", input_dim=2000, num_perturbations=25, num_contexts=7).adversaries
    {'perturbation': 26, 'context': 7}
    ```
    """

    model_type = "state-cpa"
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {
            "hidden_size": 64,
            "latent_dim": 16,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "adversary_hidden_size": 32,
            "num_adversary_layers": 2,
            "adversary_warmup_steps": 100,
            "adversary_ramp_steps": 100,
            "set_size": 32,
        },
        "published": {},
    }
    training_fields: ClassVar[tuple[str, ...]] = (
        *CountsConfig.training_fields,
        "adversary_dropout",
        "adversarial_weight",
        "adversary_warmup_steps",
        "adversary_ramp_steps",
        "penalty_weight",
        "adversary_learning_rate",
        "adversary_weight_decay",
    )
    training_defaults: ClassVar[dict] = {
        "learning_rate": 5e-4,
        "weight_decay": 4e-7,
        "l2_weight_decay": True,
        "lr_decay_epochs": 25,
        "max_grad_norm": 0.0,
    }

    hidden_size: int = 1024
    hidden_act: str = "relu"
    hidden_dropout: float | int = 0.2
    latent_dim: int = 84
    num_encoder_layers: int = 5
    num_decoder_layers: int = 4
    doser: Literal["linear", "sigmoid"] = "linear"
    likelihood: Literal["gauss", "nb", "zinb"] = "gauss"
    adversary_hidden_size: int = 128
    num_adversary_layers: int = 3
    adversary_dropout: float | int = 0.25
    adversarial_weight: float | int = 15.0
    adversary_warmup_steps: int = 50_000
    adversary_ramp_steps: int = 50_000
    penalty_weight: float | int = 20.0
    adversary_learning_rate: float | int | None = None
    adversary_weight_decay: float | int | None = None

    @property
    def adversaries(self) -> dict[str, int]:
        """
        Classes of each adversary. Perturbations by id: each of them, and last the control; perturbations by features have
        no classes. Contexts and batches: where there are several.
        """
        classes = {}
        if self.num_perturbations is not None:
            classes["perturbation"] = self.num_perturbations + 1
        for name, number in (("context", self.num_contexts), ("batch", self.num_batches)):
            if number is not None and number > 1:
                classes[name] = number
        return classes

    @property
    def reads_counts(self) -> bool:
        return self.likelihood != "gauss"

    def validate_cpa(self):
        self._check_at_least(1, "latent_dim", "num_encoder_layers", "num_decoder_layers")
        self._check_at_least(1, "adversary_hidden_size", "num_adversary_layers")
        self._check_at_least(0, "adversary_warmup_steps", "adversary_ramp_steps")
        self._check_range("adversary_dropout", 0, 1, upper_open=True)
        for name in ("adversarial_weight", "penalty_weight", "adversary_learning_rate", "adversary_weight_decay"):
            if getattr(self, name) is not None:
                self._check_range(name, 0)
        if not self.reads_counts and (self.library_size, self.prediction) != (10_000, "mean_log1p"):
            raise ValueError(
                f"library_size={self.library_size} and prediction={self.prediction!r} are options of models on counts and "
                "have no effect with likelihood='gauss'; leave them out, or set likelihood to 'nb' or 'zinb'"
            )
        if self.gene_dim is not None:
            raise ValueError(
                f"gene_dim={self.gene_dim}: this model has no gene decoder; leave gene_input out, and read expression "
                "(input: X) to predict it"
            )
        if self.doser == "sigmoid" and self.num_perturbations is None:
            raise ValueError(
                f"doser='sigmoid' learns a dose response for each perturbation and needs num_perturbations, found "
                f"perturbation_dim={self.perturbation_dim}; use doser='linear', and features scaled by the dose"
            )


__all__ = ["CPAConfig"]
