"""
What `AutoConfig`, `AutoModel` and `AutoProcessor` know of the families: with this package imported they load our checkpoints
without `trust_remote_code`. They are told when they are imported themselves, before or after this package, so that it does
not import them.
"""

from importlib import import_module

from wrapt import register_post_import_hook

from pertstate.families import FAMILIES


def _register_configs(module):
    for family in FAMILIES.values():
        module.AutoConfig.register(family.model_type, family.config, exist_ok=True)


def _register_models(module):
    # By name, as transformers does with its own models, and not with AutoModel.register, which wants the classes: this runs
    # while modules that they import are being imported.
    of_library = import_module("transformers.models.auto.configuration_auto")
    known = module.MODEL_MAPPING
    for family in FAMILIES.values():
        config, model = family.places
        known._reverse_config_mapping[config] = family.model_type
        known._model_mapping[family.model_type] = model
        known._modules[of_library.model_type_to_module_name(family.model_type)] = import_module("pertstate")


def _register_processor(module):
    processor = import_module("pertstate.processing").StateProcessor
    for family in FAMILIES.values():
        module.AutoProcessor.register(family.config, processor, exist_ok=True)


def register():
    """Tell the Auto classes as soon as there are any."""
    register_post_import_hook(_register_configs, "transformers.models.auto.configuration_auto")
    register_post_import_hook(_register_models, "transformers.models.auto.modeling_auto")
    register_post_import_hook(_register_processor, "transformers.models.auto.processing_auto")
