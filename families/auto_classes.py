"""
Registers the families with `AutoConfig`, `AutoModel` and `AutoProcessor`, and the pipeline, which then load our checkpoints
without `trust_remote_code`. Each is told of the families when its own module is imported, be it before this package or after, so that
this package need not import transformers.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

from pertstate.families import FAMILIES


def _register_configs(module: ModuleType):
    for family in FAMILIES.values():
        module.AutoConfig.register(family.model_type, family.config, exist_ok=True)


def _register_models(module: ModuleType):
    # By name, as transformers registers its own models. AutoModel.register takes the classes, which cannot be imported yet:
    # this may run while the modules that they need are still being imported.
    of_library = import_module("transformers.models.auto.configuration_auto")
    known = module.MODEL_MAPPING
    # A table of its own: the library's lists models that it looks for in its own modules.
    known._model_mapping = copy.copy(known._model_mapping)
    for family in FAMILIES.values():
        config, model = family.places
        known._reverse_config_mapping[config] = family.model_type
        known._model_mapping[family.model_type] = model
        known._modules[of_library.model_type_to_module_name(family.model_type)] = import_module("pertstate")


def _register_processor(module: ModuleType):
    processor = import_module("pertstate.processing").StateProcessor
    for family in FAMILIES.values():
        module.AutoProcessor.register(family.config, processor, exist_ok=True)


def _register_pipeline(module: ModuleType):
    # By its name, which is imported when somebody asks for the pipeline.
    module.PIPELINE_REGISTRY.supported_tasks["perturbation-prediction"] = {
        "impl": "pertstate.base.pipeline_perturbation.PerturbationPredictionPipeline",
        "pt": (module.AutoModel,),
        "type": "multimodal",
    }


class _AfterImport:
    """A finder that lets the others find a module, and has a function called once that module is imported."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]):
        self.waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        # Those after this one: another of its kind before it is asking just now.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load, tell = spec.loader.exec_module, self.waiting[name]

            def load_and_tell(module: ModuleType):
                load(module)
                tell(module)

            # The loader stays the library's own, so that its source is found where an error is shown.
            spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec


def register():
    """Register with each Auto class, and the pipeline: now if its module is imported, else as soon as it is. Once is enough."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    waiting = {
        "transformers.models.auto.configuration_auto": _register_configs,
        "transformers.models.auto.modeling_auto": _register_models,
        "transformers.models.auto.processing_auto": _register_processor,
        "transformers.pipelines": _register_pipeline,
    }
    for name in [name for name in waiting if name in sys.modules]:
        waiting.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(waiting))
