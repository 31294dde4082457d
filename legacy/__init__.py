"""Import of what other people's code wrote: training folders of the published research code, scGPT folders."""

from pertstate.legacy.weights import config_from_legacy, state_dict_from_legacy


__all__ = ["config_from_legacy", "state_dict_from_legacy"]
