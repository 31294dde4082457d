"""
Time and memory of one training step of this package beside a reference built from stock parts, in one run.

Both sides compute the same function of the same weights and data (loss and gradient norm are checked to agree at the
start), with fused Adam, clipped gradients and no dropout. They differ in what this package does in its own way:

| | ours | reference |
|---|---|---|
| perturbation | `perturbation_ids`, encoded once a sentence | one-hot tensor (B, S, P), encoded once a cell |
| backbone | `SetTransformer` | `transformers.LlamaModel`, with a 4D mask of zeros and every position 0 |
| loss | `objective_for(config)` | geomloss' `SamplesLoss("energy")` |

The last row is the share of the machine's ceiling that a step reaches: the operations of the matrix products of the network and of the
loss, over the time of the whole step, over the rate of a product of two square matrices of the same precision. The products take
turns with the steps, and the fastest of each counts.

Steps are timed in turns, so that a busy machine slows both. The memory of each side is measured in a fresh process: peak
resident memory minus what was resident before the model was built, or, on a GPU, the peak of allocated memory. The exit
status is 1 unless this package is both faster and leaner. The fastest step of each side decides which is faster, because
other work on the machine only adds time, and can move a median by more than the two sides differ.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --profile    # what a step of this package takes, operation by operation
    python benchmarks/train_step.py --sentences 32
    python benchmarks/train_step.py --device cuda --dtype bfloat16 --steps 50
"""

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
from geomloss import SamplesLoss
from torch import nn
from transformers import LlamaConfig, LlamaModel

from pertstate import StateForPerturbation
from pertstate.configuration_state import StateConfig
from pertstate.families import objective_for


# A published shape: 12 heads of 64 are wider than the hidden size.
HIDDEN_SIZE = 328
NUM_HIDDEN_LAYERS = 8
NUM_ATTENTION_HEADS = 12
HEAD_DIM = 64
INTERMEDIATE_SIZE = 1312
NUM_ENCODER_LAYERS = 4
NUM_DECODER_LAYERS = 4

# Sentences of a batch, and cells of each.
SHAPE = (8, 64)
FEATURES = 2000
PERTURBATIONS = 2000

# Rows and columns of the matrices whose product is the ceiling.
CEILING_SIZE = {"cpu": 1536, "cuda": 8192}

LEARNING_RATE = 1e-4
GRADIENT_CLIP = 10.0
WARMUP_STEPS = 3
MEMORY_STEPS = 3
SIDES = ("ours", "reference")


class FreeHeadsLlamaConfig(LlamaConfig):
    """Llama's layers take any `head_dim`. Only the check of the stock config refuses a width of 328 with 12 heads."""

    def validate_architecture(self):
        pass


class ReferenceModel(nn.Module):
    """The same model from stock parts: a one-hot perturbation for every cell, and a `LlamaModel`."""

    def __init__(self):
        super().__init__()

        def mlp(widths):
            layers = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.GELU())]
            return nn.Sequential(*layers[:-1])

        self.perturbation_encoder = mlp([PERTURBATIONS] + [HIDDEN_SIZE] * NUM_ENCODER_LAYERS)
        self.cell_encoder = nn.Linear(FEATURES, HIDDEN_SIZE)
        self.backbone = LlamaModel(
            FreeHeadsLlamaConfig(
                vocab_size=1,
                hidden_size=HIDDEN_SIZE,
                num_hidden_layers=NUM_HIDDEN_LAYERS,
                num_attention_heads=NUM_ATTENTION_HEADS,
                head_dim=HEAD_DIM,
                intermediate_size=INTERMEDIATE_SIZE,
                use_cache=False,
            )
        )
        self.backbone.embed_tokens = None
        self.output_head = mlp([HIDDEN_SIZE] * NUM_DECODER_LAYERS + [FEATURES])

    def forward(self, control_cells: torch.Tensor, perturbation: torch.Tensor) -> torch.Tensor:
        encoded_cells = self.cell_encoder(control_cells)
        hidden = encoded_cells + self.perturbation_encoder(perturbation)
        length = hidden.shape[1]
        transformed = self.backbone(
            inputs_embeds=hidden,
            attention_mask=hidden.new_zeros(len(hidden), 1, length, length),
            position_ids=torch.zeros(1, length, dtype=torch.long, device=hidden.device),
        ).last_hidden_state
        return nn.functional.relu(self.output_head(transformed + encoded_cells))

    @torch.no_grad()
    def copy_weights(self, ours: StateForPerturbation):
        first, *rest = (layer for layer in self.perturbation_encoder if isinstance(layer, nn.Linear))
        first.weight.copy_(ours.perturbation_encoder.embedding.weight.T)
        first.bias.copy_(ours.perturbation_encoder.embedding.bias)
        head = [layer for layer in self.output_head if isinstance(layer, nn.Linear)]
        pairs = [
            *zip(rest, ours.perturbation_encoder.layers),
            (self.cell_encoder, ours.cell_encoder.layers[0]),
            *zip(head, ours.output_head.layers),
            (self.backbone.norm, ours.backbone.norm),
        ]
        for theirs, mine in zip(self.backbone.layers, ours.backbone.layers):
            attention = theirs.self_attn
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            for projection, weight in zip(projections, mine.attention.qkv_proj.weight.chunk(3)):
                projection.weight.copy_(weight)
            pairs += [
                (attention.o_proj, mine.attention.o_proj),
                (theirs.input_layernorm, mine.attention_norm),
                (theirs.post_attention_layernorm, mine.feed_forward_norm),
                (theirs.mlp.gate_proj, mine.feed_forward.gate_proj),
                (theirs.mlp.up_proj, mine.feed_forward.up_proj),
                (theirs.mlp.down_proj, mine.feed_forward.down_proj),
            ]
        for theirs, mine in pairs:
            theirs.load_state_dict(mine.state_dict())


class Step:
    """Takes one optimiser step. Returns the loss and the gradient norm before clipping, both still on the device."""

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor]):
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimizer.step()
        return loss.detach(), norm


def make_cells(device: str, batch: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Control cells and labels (B, S, D), sparse and not negative as log1p expression is, and perturbation ids (B, 1)."""
    generator = torch.Generator().manual_seed(0)
    shape = (*batch, FEATURES)
    control, labels = (torch.randn(shape, generator=generator).sub(0.5).relu().to(device) for _ in range(2))
    return control, labels, torch.randint(PERTURBATIONS, (batch[0], 1), generator=generator).to(device)


def make_step(side: str, device: str, dtype: torch.dtype, batch: tuple[int, int] = SHAPE) -> Step:
    """A training step. Weights and losses are float32; another `dtype` is that of autocast."""
    torch.manual_seed(0)
    control, labels, ids = make_cells(device, batch)

    def precision():
        return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    if side == "ours":
        config = StateConfig(
            input_dim=FEATURES,
            num_perturbations=PERTURBATIONS,
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=NUM_HIDDEN_LAYERS,
            num_attention_heads=NUM_ATTENTION_HEADS,
            head_dim=HEAD_DIM,
            intermediate_size=INTERMEDIATE_SIZE,
            num_encoder_layers=NUM_ENCODER_LAYERS,
            num_decoder_layers=NUM_DECODER_LAYERS,
            set_size=batch[1],
            hidden_dropout=0.0,
            residual="hidden",
        )
        model, objective = StateForPerturbation(config).to(device), objective_for(config)
        inputs = {"control_cells": control, "perturbation_ids": ids, "labels": labels}

        def loss():
            with precision():
                outputs = model(**inputs)
            return objective(outputs, inputs)["loss"]
    else:
        model, distance = ReferenceModel().to(device), SamplesLoss("energy")
        one_hot = nn.functional.one_hot(ids, PERTURBATIONS).float().repeat(1, batch[1], 1)

        def loss():
            with precision():
                predictions = model(control, one_hot)
            return distance(predictions.float(), labels).mean()

    return Step(model, loss)


def operations(batch: tuple[int, int]) -> float:
    """Multiplications and additions of the matrix products of a step, forward and backward, of this package's side."""
    sentences, length = batch
    width, cells = NUM_ATTENTION_HEADS * HEAD_DIM, sentences * length
    of_cell = NUM_HIDDEN_LAYERS * HIDDEN_SIZE * (4 * width + 3 * INTERMEDIATE_SIZE)
    of_cell += NUM_HIDDEN_LAYERS * 2 * length * width
    of_cell += (2 * FEATURES + (NUM_DECODER_LAYERS - 1) * HIDDEN_SIZE) * HIDDEN_SIZE
    of_sentence = (NUM_ENCODER_LAYERS - 1) * HIDDEN_SIZE**2
    # Nothing needs the gradient of the control cells. The loss has the Gram matrix of both sets, and one product for the gradient.
    network = 3 * 2 * (cells * of_cell + sentences * of_sentence) - 2 * cells * FEATURES * HIDDEN_SIZE
    return network + sentences * FEATURES * 2 * ((2 * length) ** 2 + 2 * length**2)


class Ceiling:
    """Multiplies two square matrices."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.size = CEILING_SIZE[device]
        self.a, self.b = (torch.randn(self.size, self.size, device=device, dtype=dtype) for _ in range(2))

    def __call__(self):
        return self.a @ self.b


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def check_equal(steps: dict[str, Step], dtype: torch.dtype):
    """Check that one step of each side, from equal weights, gives the same figures: else their speeds could not be compared."""
    steps["reference"].model.copy_weights(steps["ours"].model)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    (loss, norm), (expected_loss, expected_norm) = (steps[side]() for side in SIDES)
    for name, found, expected in (("loss", loss, expected_loss), ("gradient norm", norm, expected_norm)):
        if not abs(found.item() - expected.item()) <= tolerance * abs(expected.item()):
            sys.exit(f"the two sides differ: {name} {found.item():.6g} against the reference's {expected.item():.6g}")
    print(
        f"first step of both: loss {loss:.5f} and {expected_loss:.5f}, gradient norm {norm:.5f} and {expected_norm:.5f}"
    )


def time_steps(steps: dict[str, Callable], count: int, device: str) -> dict[str, list[float]]:
    """Seconds of `count` steps of each side. The sides take turns, and each goes first every other time."""
    seconds = {side: [] for side in steps}
    for i in range(WARMUP_STEPS + count):
        for side in steps if i % 2 else reversed(steps):
            synchronize(device)
            start = time.perf_counter()
            steps[side]()
            synchronize(device)
            if i >= WARMUP_STEPS:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def profile(step: Step, count: int, rows: int = 20):
    """Print the operations of steps, sorted by their own time."""
    for _ in range(WARMUP_STEPS):
        step()
    with torch.profiler.profile() as recorded:
        for _ in range(count):
            step()
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{total / count / 1000:.1f} ms in a step")
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:rows]:
        print(f"{event.self_cpu_time_total / total:6.1%} {event.count // count:5d} x {event.key[:90]}")


def peak_memory(side: str, device: str, dtype: torch.dtype, batch: tuple[int, int]) -> int:
    """Bytes that building and training the model adds at the peak. This is right only in a process that did nothing else."""
    before = psutil.Process().memory_info().rss
    step = make_step(side, device, dtype, batch)
    for _ in range(MEMORY_STEPS):
        step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def peak_memory_of_fresh_process(side: str, arguments: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory-of", side]
    for name in ("threads", "device", "dtype", "sentences", "cells"):
        command += [f"--{name}", str(getattr(arguments, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="other than float32: autocast"
    )
    parser.add_argument("--sentences", type=int, default=SHAPE[0], help="of a batch")
    parser.add_argument("--cells", type=int, default=SHAPE[1], help="of a sentence")
    parser.add_argument("--profile", action="store_true", help="operations of a step, on a CPU")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    batch = (arguments.sentences, arguments.cells)
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, device, dtype, batch)))
        return

    if arguments.profile:
        profile(make_step("ours", device, dtype, batch), arguments.steps)
        return
    memory = {side: peak_memory_of_fresh_process(side, arguments) for side in SIDES}
    steps = {side: make_step(side, device, dtype, batch) for side in SIDES}
    print(
        f"hidden {HIDDEN_SIZE}, {NUM_HIDDEN_LAYERS} layers, {NUM_ATTENTION_HEADS} heads of {HEAD_DIM}, "
        f"intermediate {INTERMEDIATE_SIZE}, encoders {NUM_ENCODER_LAYERS}, heads {NUM_DECODER_LAYERS}\n"
        f"{arguments.sentences} sentences of {arguments.cells} cells, {FEATURES} features, {PERTURBATIONS} perturbations; "
        f"{device}, {arguments.dtype}, {arguments.threads} threads, torch {torch.__version__}"
    )
    check_equal(steps, dtype)
    seconds = time_steps({**steps, "ceiling": Ceiling(device, dtype)}, arguments.steps, device)
    ceiling = 2 * CEILING_SIZE[device] ** 3 / min(seconds["ceiling"])

    median = {side: statistics.median(seconds[side]) for side in SIDES}
    rows = {
        "parameters": {side: sum(p.numel() for p in steps[side].model.parameters()) for side in SIDES},
        "step, minimum (ms)": {side: 1e3 * min(seconds[side]) for side in SIDES},
        "step, median (ms)": {side: 1e3 * median[side] for side in SIDES},
        "cells/s": {side: arguments.sentences * arguments.cells / median[side] for side in SIDES},
        "peak memory (MiB)": {side: memory[side] / 2**20 for side in SIDES},
        "share of ceiling (%)": {side: 100 * operations(batch) / min(seconds[side]) / ceiling for side in SIDES},
    }
    print(f"\n{'':<20}{'ours':>14}{'reference':>14}{'ours/reference':>16}")
    for name, row in rows.items():
        digits = 0 if name == "parameters" else 1
        ours, reference = (row[side] for side in SIDES)
        print(f"{name:<20}{ours:>14,.{digits}f}{reference:>14,.{digits}f}{ours / reference:>16.3f}")

    print(f"ceiling: {ceiling / 1e9:,.1f} GFLOP/s; the reference's share counts the operations of ours")
    faster, leaner = min(seconds["ours"]) < min(seconds["reference"]), memory["ours"] < memory["reference"]
    print(f"\nours is {'' if faster else 'NOT '}faster and {'' if leaner else 'NOT '}leaner")
    sys.exit(0 if faster and leaner else 1)


if __name__ == "__main__":
    main()
