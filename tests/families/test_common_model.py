"""
transformers' own common model tests, run against [`StateForPerturbation`].

They come from the source distribution of the pinned release, fetched once into a cache folder. Without a network and
without that cache, collecting this module is an error that says how to leave it out.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch

from pertstate import StateForPerturbation
from pertstate.configuration_state import StateConfig
from pertstate.training import objective_for


pytestmark = pytest.mark.slow

RELEASE = "transformers-5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pertstate-tests"

NEEDS_ACCELERATOR = "needs a GPU, and this suite is made to pass without one"
NEEDS_FLASH = "needs a GPU and the flash-attention package"
NEEDS_DEEPSPEED = "needs deepspeed"
TOKENS = "has no vocabulary of tokens and no token embedding"
LANGUAGE = "is no language model"
COMPOSITE = "is one model, not a composite of several"
CONFIG_ROPE = "has no rotary settings in its config: `positions='rope'` runs legacy checkpoints, with one base"
MAPPING = "declares no weight conversion: its files hold the names of its modules"
TP_PLAN = "has no tensor-parallel plan"
FP32_MODULES = "keeps no module in float32"
EXPERTS = "has no experts"
MISSING = "refuses a checkpoint that lacks tensors, instead of drawing them anew"

# The common tests that do not apply to this model, and why (read: "this model ..." or "the test ...").
# A name stands for all cases of a parametrized test.
NOT_APPLICABLE = {
    "test_attn_implementation_composite_models": COMPOSITE,
    "test_can_init_all_missing_weights": MISSING,
    "test_can_load_from_already_mapped_keys": MAPPING,
    "test_can_load_with_device_context_manager": NEEDS_ACCELERATOR,
    "test_can_load_with_global_device_set": NEEDS_ACCELERATOR,
    "test_can_set_attention_dynamically_composite_model": COMPOSITE,
    "test_causal_lm_loss_honors_shift_labels": LANGUAGE,
    "test_cpu_offload": NEEDS_ACCELERATOR,
    "test_disk_offload_bin": NEEDS_ACCELERATOR,
    "test_disk_offload_safetensors": NEEDS_ACCELERATOR,
    "test_eager_matches_batched_and_grouped_inference": EXPERTS,
    "test_enable_input_require_grads_with_gradient_checkpointing": TOKENS,
    "test_encoder_decoder_loss_no_double_shift": LANGUAGE,
    "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break": NEEDS_FLASH,
    "test_flash_attn_2_can_dispatch_composite_models": NEEDS_FLASH,
    "test_flash_attn_2_fp32_ln": NEEDS_FLASH,
    "test_flash_attn_2_from_config": NEEDS_FLASH,
    "test_flash_attn_2_inference_equivalence": NEEDS_FLASH,
    "test_flash_attn_2_inference_equivalence_right_padding": NEEDS_FLASH,
    "test_flash_attn_3_can_dispatch_composite_models": NEEDS_FLASH,
    "test_flash_attn_3_from_config": NEEDS_FLASH,
    "test_flash_attn_3_inference_equivalence": NEEDS_FLASH,
    "test_flash_attn_3_inference_equivalence_right_padding": NEEDS_FLASH,
    "test_flash_attn_4_can_dispatch_composite_models": NEEDS_FLASH,
    "test_flash_attn_4_from_config": NEEDS_FLASH,
    "test_flash_attn_4_inference_equivalence": NEEDS_FLASH,
    "test_flash_attn_4_inference_equivalence_right_padding": NEEDS_FLASH,
    "test_flash_attn_kernels_inference_equivalence": NEEDS_FLASH,
    "test_flash_attn_kernels_mps_inference_equivalence": NEEDS_FLASH,
    "test_flex_attention_with_grads": NEEDS_ACCELERATOR,
    "test_inputs_embeds": TOKENS,
    "test_internal_model_config_and_subconfig_are_same": COMPOSITE,
    "test_keep_in_fp32_modules": FP32_MODULES,
    "test_keep_in_fp32_modules_exist": FP32_MODULES,
    "test_kernels_can_load_without_crashing": "needs the kernels package",
    "test_load_save_without_tied_weights": "ties no weights, and its config refuses the field that would untie them",
    "test_model_get_set_embeddings": TOKENS,
    "test_model_parallelism": NEEDS_ACCELERATOR,
    "test_model_rope_scaling_frequencies": CONFIG_ROPE,
    "test_model_rope_scaling_from_config": CONFIG_ROPE,
    "test_model_rope_with_partial_rotation": CONFIG_ROPE,
    "test_model_weights_reload_no_missing_tied_weights": MISSING,
    "test_moe_models_record_router_logits": EXPERTS,
    "test_output_router_logits_from_config": EXPERTS,
    "test_resize_embeddings_untied_with_deepspeed": NEEDS_DEEPSPEED,
    "test_resize_embeddings_untied_with_deepspeed_multi_gpu": NEEDS_DEEPSPEED,
    "test_resize_position_vector_embeddings": "has no learned positions",
    "test_resize_tokens_embeddings": TOKENS,
    "test_resize_tokens_embeddings_with_deepspeed": NEEDS_DEEPSPEED,
    "test_resize_tokens_embeddings_with_deepspeed_multi_gpu": NEEDS_DEEPSPEED,
    "test_reverse_loading_mapping": MAPPING,
    "test_sdpa_can_compile_dynamic": NEEDS_ACCELERATOR,
    "test_sdpa_can_dispatch_composite_models": COMPOSITE,
    "test_sdpa_can_dispatch_on_flash": NEEDS_ACCELERATOR,
    "test_sliding_window_mask": "has no sliding window: all cells see all cells",
    "test_tied_head_has_a_tp_plan_entry": TP_PLAN,
    "test_torch_compile_for_training": NEEDS_ACCELERATOR,
    "test_tp_plan_matches_params": TP_PLAN,
    "test_vision_axial_rope": CONFIG_ROPE,
}


def fetch() -> Path:
    """The source file of the common tests, from the cache or from the source distribution that pip finds."""
    source = CACHE / RELEASE / "test_modeling_common.py"
    if source.is_file():
        return source
    source.parent.mkdir(parents=True, exist_ok=True)
    name, version = RELEASE.split("-")
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        command += ["--no-deps", "--no-binary", name, "--dest", folder, f"{name}=={version}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        archive = Path(folder) / f"{RELEASE}.tar.gz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{archive.name}: expected sha256 {SHA256}, found {found}; do not run its code")
        with tarfile.open(archive) as files:
            content = files.extractfile(f"{RELEASE}/tests/{source.name}").read()
        # Moved into place whole: a run that is cut short leaves no half of a file in the cache.
        complete = Path(folder) / source.name
        complete.write_bytes(content)
        os.replace(complete, source)
    return source


def load(source: Path) -> types.ModuleType:
    """Load the module of the common tests. Empty classes replace its sibling test modules, of generation and export."""
    root = "transformers_common_tests"
    siblings = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
    for name, mixin in siblings.items():
        package, module = types.ModuleType(f"{root}.{name.split('.')[0]}"), types.ModuleType(f"{root}.{name}")
        package.__path__ = []
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules |= {package.__name__: package, module.__name__: module}
    sys.modules[root] = types.ModuleType(root)
    sys.modules[root].__path__ = []
    spec = importlib.util.spec_from_file_location(f"{root}.{source.stem}", source)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    # The library's markers are not registered here, and --strict-markers would refuse them.
    markers = set(re.findall(r"\bmark\.(\w+_tests?)\b", source.read_text()))
    with mock.patch.dict(vars(pytest.mark), dict.fromkeys(markers, lambda test: test)):
        spec.loader.exec_module(module)
    # It would give every norm of the config an epsilon of 1, and our config refuses fields that it does not have. The
    # library does the same to the norms of the model itself, which is what counts.
    module.set_config_for_less_flaky_test = lambda config: None
    return module


try:
    SOURCE = fetch()
except subprocess.CalledProcessError as error:
    raise RuntimeError(
        f"the common model tests need {RELEASE}.tar.gz, and pip could not fetch it: {error.stderr}\n"
        f"Without a network, leave them out: pytest --ignore tests/{Path(__file__).name}"
    ) from error
common = load(SOURCE)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors of this size gain nothing from a second thread, and lose much time if other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StateInLibraryTerms(StateForPerturbation):
    """The model for the tests that read a loss off its output, or give it a mask under the library's name."""

    _auto_class = None

    def forward(self, control_cells, attention_mask=None, output_attentions=None, **batch):
        if output_attentions:
            batch["output_attentions"] = True
        outputs = super().forward(control_cells=control_cells, cell_mask=attention_mask, **batch)
        if batch.get("labels") is not None:
            outputs["loss"] = objective_for(self.config)(outputs, {"control_cells": control_cells, **batch})["loss"]
        return outputs


class StateTester:
    """Gives the sizes that the common tests compare with what they find, and a batch."""

    is_training = True
    # The library fills up integer inputs with numbers below 5: no vocabulary may be smaller.
    batch_size, num_genes, num_perturbations, num_batches = 3, 12, 5, 5
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    # The library makes masks of the width of the main input: there must be as many cells as features.
    seq_length = latent_dim = 9
    # Attention and hidden states also have the two learned tokens.
    encoder_seq_length = key_length = seq_length + 2

    def __init__(self, backbone: str):
        self.backbone = backbone

    def get_config(self) -> StateConfig:
        return StateConfig(
            input_dim=self.latent_dim,
            num_perturbations=self.num_perturbations,
            num_batches=self.num_batches,
            gene_dim=self.num_genes,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=40,
            backbone=self.backbone,
            set_size=self.seq_length,
            num_encoder_layers=2,
            num_decoder_layers=2,
            basal_encoder="mlp",
            # With residual="output" a new model copies its input, and most comparisons would prove nothing.
            residual="hidden",
            output_adapter=True,
            batch_encoder=True,
            batch_token=True,
            confidence_token=True,
            decoder_hidden_sizes=[16, 16],
            residual_decoder=True,
        )

    def prepare_config_and_inputs_for_common(self):
        cells = (self.batch_size, self.seq_length)
        return self.get_config(), {
            "control_cells": common.floats_tensor([*cells, self.latent_dim]),
            "perturbation_ids": common.ids_tensor([self.batch_size, 2], self.num_perturbations),
            "batch_ids": common.ids_tensor(cells, self.num_batches),
        }


class CommonTests(common.ModelTesterMixin):
    backbone: str
    all_model_classes = (StateForPerturbation,)
    additional_model_inputs = ["perturbation_ids", "batch_ids"]
    # Without this the library leaves out the test for sources that carry no copyright year.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = StateTester(self.backbone)
        if self._testMethodName.startswith(("test_training", "test_eager_matches_sdpa_inference")):
            self.all_model_classes = (StateInLibraryTerms,)

    def skipTest(self, reason):
        self.fail(f"the library would skip this test ({reason}): name it in NOT_APPLICABLE")

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            tester = self.model_tester
            for name, width in (("labels", tester.latent_dim), ("gene_labels", tester.num_genes)):
                inputs[name] = common.floats_tensor([tester.batch_size, tester.seq_length, width])
        return inputs


def cases(name: str) -> list[str]:
    """The attributes of the common tests that `name` stands for."""
    return [test for test in dir(common.ModelTesterMixin) if re.fullmatch(rf"{name}(_\d+(_.*)?)?", test)]


for _name in NOT_APPLICABLE:
    for _case in cases(_name):
        setattr(CommonTests, _case, None)


class TestLlamaBackbone(CommonTests, unittest.TestCase):
    backbone = "llama"


class TestGPT2Backbone(CommonTests, unittest.TestCase):
    backbone = "gpt2"


@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_what_is_left_out_exists(name):
    assert cases(name)


def test_library_terms_are_ours():
    tester = StateTester("llama")
    config, batch = tester.prepare_config_and_inputs_for_common()
    model = StateInLibraryTerms(config).eval()
    mask = torch.arange(tester.seq_length) < torch.tensor([[4], [9], [2]])
    masked = model(**batch, attention_mask=mask).predictions
    expected = StateForPerturbation.forward(model, **batch, cell_mask=mask).predictions
    torch.testing.assert_close(masked, expected, atol=0, rtol=0)
    assert not torch.equal(masked, model(**batch).predictions)
