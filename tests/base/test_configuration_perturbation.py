import pytest

from pertstate import FAMILIES, NeuralOTConfig, PseudobulkConfig, PseudobulkForPerturbation, StateConfig
from pertstate.base.configuration_perturbation import PerturbationConfig


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_follow_from_others_are_filled_in(family):
    """Type checkers take these fields for numbers, so they must never be None."""
    fields = {"perturbed_genes": [0, 1]} if family == "state-scgpt" else {}
    config = FAMILIES[family].config(input_dim=7, num_perturbations=2, **fields)
    assert config.output_dim == 7 and config.nonnegative_output is True
    for name in ("head_dim", "intermediate_size", "attention_dropout"):
        if name in config.__dataclass_fields__:
            assert type(getattr(config, name)) in (int, float), name


def test_the_width_of_a_perturbation():
    assert StateConfig(num_perturbations=3).perturbation_width == 3
    assert StateConfig(perturbation_dim=5).perturbation_width == 5
    with pytest.raises(ValueError, match="StateConfig needs num_perturbations .* or perturbation_dim .* found neither"):
        _ = StateConfig().perturbation_width


def test_a_size_that_a_model_needs():
    config = PseudobulkConfig.from_preset("tiny", num_perturbations=2, num_batches=4, batch_encoder=True)
    assert config.required_size("num_batches") == 4
    config.num_batches = None
    with pytest.raises(ValueError, match="PseudobulkConfig needs num_batches to build this model, found None; set it"):
        PseudobulkForPerturbation(config)


def test_attention_is_an_option_of_the_state_model_alone():
    config = NeuralOTConfig(num_perturbations=1)
    assert (config.attention, config.positions) == ("bidirectional", "none")
    assert not {"attention", "positions"} & set(config.to_dict())
    with pytest.raises(ValueError, match="NeuralOTConfig has no field 'attention'"):
        NeuralOTConfig(num_perturbations=1, attention="causal")
    causal = StateConfig(num_perturbations=1, attention="causal", positions="rope")
    assert (causal.attention, causal.positions) == ("causal", "rope")
    assert causal.to_dict()["attention"] == "causal"


def test_a_config_checks_itself_again():
    config = StateConfig(num_perturbations=1)
    config.set_size = 0
    with pytest.raises(ValueError, match="set_size must be at least 1, found 0"):
        config.validate()
    assert issubclass(StateConfig, PerturbationConfig)
