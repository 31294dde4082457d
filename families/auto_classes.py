"""
What `AutoConfig`, `AutoModel` and `AutoProcessor` know of the families: with this package imported they load our checkpoints
without `trust_remote_code`. They are told when they are imported themselves, before or after this package, so that it does
not import them.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from pertstate.families import FAMILIES


def _register_configs(module: ModuleType):
    for family in FAMILIES.values():
        module.AutoConfig.register(family.model_type, family.config, exist_ok=True)


def _register_models(module: ModuleType):
    # By name, as transformers does with its own models, and not with AutoModel.register, which wants the classes: this runs
    # while modules that they import are being imported.
    of_library = import_module("transformers.models.auto.configuration_auto")
    known = module.MODEL_MAPPING
    for family in FAMILIES.values():
        config, model = family.places
        known._reverse_config_mapping[config] = family.model_type
        known._model_mapping[family.model_type] = model
        known._modules[of_library.model_type_to_module_name(family.model_type)] = import_module("pertstate")


def _register_processor(module: ModuleType):
    processor = import_module("pertstate.processing").StateProcessor
    for family in FAMILIES.values():
        module.AutoProcessor.register(family.config, processor, exist_ok=True)


class _AfterImport:
    """A finder of modules that finds none by itself: it has others find them, and is told when a module is whole."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]):
        self.waiting = waiting

    def find_spec(self, name: str, path=None, target=None):
        if name not in self.waiting:
            return None
        tell = self.waiting.pop(name)
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(spec for spec in found if spec is not None)
        load = spec.loader.exec_module

        def load_and_tell(module: ModuleType):
            load(module)
            tell(module)

        spec.loader.exec_module = load_and_tell
        return spec


def register():
    """Tell the Auto classes of the families, as soon as there are any."""
    waiting = {
        "transformers.models.auto.configuration_auto": _register_configs,
        "transformers.models.auto.modeling_auto": _register_models,
        "transformers.models.auto.processing_auto": _register_processor,
    }
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(waiting))
