"""Import of other people's formats: training folders of the published research code, and scGPT folders."""

from pertstate.legacy.weights import config_from_legacy, state_dict_from_legacy


__all__ = ["config_from_legacy", "state_dict_from_legacy"]
