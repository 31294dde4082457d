"""
What one GPU does with the models: training steps as shares of the ceiling of its matrix products, the losses, and trainings from
cells in memory and in a store.

All ceilings are measured in the same run. A step is forward, backward, loss, clip and AdamW; its share counts the matrix
products of the network alone, over the whole step's time. The part "runs" trains with the Trainer, once with cells on the device and
once with cells on the host, beside the bare step of the same model and batch; the first steps are not timed. The part "batches" times the making of a batch
alone, in both places, without the sending of one that is made on the host.

    python benchmarks/gpu.py [--parts precision losses steps runs batches profile]
    python benchmarks/gpu.py --device cpu --small    # only shows that it runs
"""

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import nn
from transformers import TrainerCallback

from pertstate import StateConfig, StateForPerturbation, objective_for
from pertstate.data import SentenceDataset, Splits, load_cells, load_store, prepare
from pertstate.data.arguments import DataArguments, PrepareArguments
from pertstate.data.cells_on_device import CellsOnDevice
from pertstate.losses.energy import energy_distance
from pertstate.losses.sinkhorn import SinkhornLoss
from pertstate.training import StateTrainer, StateTrainingArguments


PARTS = ("precision", "losses", "steps", "runs", "batches", "profile")
LOSSES = ((8, 64, 2000), (16, 128, 2000), (16, 512, 2000), (1, 2048, 512), (2, 4096, 2000), (8, 64, 18000))
# Each size is a preset, the sentences of a batch, and the cells of a sentence.
STEPS = (("small", 16, 128), ("small", 64, 128), ("base", 16, 512), ("large", 16, 512))
MODES = ("float32", "tf32", "bf16", "bf16 padded", "bf16 compiled", "bf16 graphs")
GENES = 2000
# Trainings: the size of the model, sentences of a batch, cells of a sentence; cells and genes of the data, and of wide data.
RUNS = (("base", 16, 512), (100_000, 2000), (20_000, 18_000))
SMALL_RUNS = (("tiny", 4, 16), (1000, 50), (400, 300))
# Batches: cells and genes of the data, sentences of a batch, cells of a sentence.
BATCHES = ((10_000, 2000, 8, 64), (10_000, 2000, 16, 512), (3000, 18_000, 8, 64))
SMALL_BATCHES = ((1000, 50, 4, 16),)
STEPS_OF_A_RUN, WARM = 60, 20


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], device: str, repeat: int = 10, warm: int = 3) -> float:
    """The median time of several runs."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def ceilings(device: str, size: int) -> dict[str, float]:
    """TFLOP/s of a product of two square matrices of random numbers."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[name] = 2 * size**3 / milliseconds(lambda a=a, b=b: a @ b, device) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    print("ceilings, TFLOP/s: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    return found


def precision(device: str, shapes):
    """Relative errors of the energy distance and of its gradient against float64, for sets far apart and close together."""
    print("\nenergy distance against float64: largest relative error of a value, and of the gradient (norm)")
    for shape in shapes:
        for apart in (1.0, 0.05):
            torch.manual_seed(0)
            x = torch.randn(shape, device=device).relu()
            y = (x + apart * torch.randn_like(x)).requires_grad_()
            value = energy_distance(y, x)
            (gradient,) = torch.autograd.grad(value.sum(), y)
            exact = y.detach().double().requires_grad_()
            wanted = energy_distance(exact, x.double())
            (of_wanted,) = torch.autograd.grad(wanted.sum(), exact)
            wrong = ((value - wanted).abs() / wanted.abs()).max().item()
            wrong_gradient = ((gradient - of_wanted).norm() / of_wanted.norm()).item()
            print(f"{shape!s:<18} {'close' if apart < 1 else 'apart':<6} {wrong:.1e} {wrong_gradient:.1e}", flush=True)


def losses(device: str, shapes):
    """The time of forward and backward of each loss, beside geomloss."""
    from geomloss import SamplesLoss

    print("\nloss, forward and backward, ms: energy, geomloss' energy, sinkhorn, geomloss' sinkhorn")
    both: list[Callable] = [energy_distance, SamplesLoss("energy", backend="tensorized")]
    sinkhorn = SinkhornLoss(0.05)
    both += [lambda x, y: sinkhorn(x, y, None), SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")]
    for shape in shapes:
        y = torch.randn(shape, device=device).relu()
        shown = []
        for loss in both:
            x = torch.randn(shape, device=device).relu().requires_grad_()

            def work(loss=loss, x=x, y=y):
                x.grad = None
                loss(x, y).mean().backward()

            try:
                shown.append(f"{milliseconds(work, device, 5, 2):8.2f}")
            except torch.OutOfMemoryError:
                shown.append(" no room")
            torch.cuda.empty_cache()
        print(f"{shape!s:<18}" + "".join(shown), flush=True)


def operations(config: StateConfig, sentences: int, cells: int) -> float:
    """Multiplications and additions of the network's matrix products, forward and backward."""
    hidden, width, inner = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    layers, genes = config.num_hidden_layers, config.input_dim
    of_cell = layers * (2 * hidden * 3 * width + 2 * width * hidden + 6 * hidden * inner + 4 * cells * width)
    of_cell += 2 * genes * hidden + 2 * hidden * genes + 2 * hidden**2 * (config.num_decoder_layers - 1)
    return 3.0 * sentences * cells * of_cell


def training_step(preset: str, sentences: int, cells: int, mode: str, device: str, genes: int):
    """A function that takes a training step, and the config of the model that it trains."""
    torch.manual_seed(0)
    config = StateConfig.from_preset(preset, input_dim=genes, output_dim=genes, num_perturbations=genes)
    model, objective = StateForPerturbation(config).to(device).train(), objective_for(config)
    x, y = (torch.randn(sentences, cells, genes, device=device).sub(0.5).relu() for _ in range(2))
    ids = torch.randint(genes, (sentences, 1), device=device)
    batch = {"control_cells": x, "perturbation_ids": ids, "labels": y}
    if "padded" in mode:
        batch["cell_mask"] = torch.ones(sentences, cells, dtype=torch.bool, device=device)
        batch["cell_mask"][0, -5:] = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward: Callable = model
    if "compiled" in mode or "graphs" in mode:
        forward = torch.compile(model, mode="reduce-overhead" if "graphs" in mode else "default")
    half = mode.startswith("bf16")

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            outputs = forward(**batch)
        objective(outputs, batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    return step, config


def steps(device: str, sizes, modes, genes: int, ceiling: dict[str, float]):
    """The time of a training step with each preset."""
    print(f"\ntraining step, {genes} genes: ms, cells/s, share of the ceiling, seconds until the first is done")
    for preset, sentences, cells in sizes:
        for mode in modes:
            torch._dynamo.reset()
            torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
            start = time.perf_counter()
            step, config = training_step(preset, sentences, cells, mode, device, genes)
            step()
            synchronize(device)
            first = time.perf_counter() - start
            took = milliseconds(step, device)
            share = operations(config, sentences, cells) / took / 1e9 / ceiling[mode.split()[0]]
            print(
                f"{preset:<6} B {sentences:<3} S {cells:<4} {mode:<14} {took:8.2f} {1000 * sentences * cells / took:10,.0f} "
                f"{share:5.0%} {first:6.1f}",
                flush=True,
            )
            del step
            torch.cuda.empty_cache()
    torch.backends.cuda.matmul.allow_tf32 = False


def screen(cells: int, genes: int) -> ad.AnnData:
    """Random counts in two contexts, a tenth of them not 0."""
    rng = np.random.default_rng(0)
    blocks = [
        sp.csr_matrix((rng.random((n, genes), dtype=np.float32) < 0.1) * rng.integers(1, 9, (n, genes), dtype=np.uint8))
        for n in np.diff([*range(0, cells, 5000), cells])
    ]
    names = ["control", *(f"pert_{i}" for i in range(max(3, cells // 2000)))]
    obs = pd.DataFrame(
        {
            "perturbation": np.resize(np.repeat(names, 2), cells),
            "cell_type": np.resize(["one", "other"], cells),
        },
        index=[f"cell_{i}" for i in range(cells)],
    )
    return ad.AnnData(
        sp.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=[f"gene_{i}" for i in range(genes)])
    )


class Clock(TrainerCallback):
    """The time of the steps after the first ones."""

    def __init__(self, device: str, warm: int):
        self.device, self.warm = device, warm

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warm, args.max_steps):
            synchronize(self.device)
            self.start, self.taken = time.perf_counter(), time.perf_counter() - getattr(self, "start", 0.0)


def of_a_training(cells, processor, size, device: str, there: bool) -> tuple[float, float]:
    """Milliseconds of a step of a training, and cells per second."""
    preset, sentences, length = size
    torch.manual_seed(0)
    sizes = {"num_perturbations": len(processor.vocabulary.perturbations)}
    config = StateConfig.from_preset(preset, input_dim=processor.feature_dim, **sizes)
    dataset = SentenceDataset(cells, processor, "train", length, multiple_of=sentences)
    clock = Clock(device, WARM)
    with tempfile.TemporaryDirectory() as folder:
        args = StateTrainingArguments(
            output_dir=folder,
            use_cpu=device == "cpu",
            bf16=True,
            optim="adamw_torch_fused",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=STEPS_OF_A_RUN,
            max_steps=STEPS_OF_A_RUN,
            per_device_train_batch_size=sentences,
            cells_on_device=there,
        )
        trainer = StateTrainer(
            StateForPerturbation(config), args, dataset, processing_class=processor, callbacks=[clock]
        )
        trainer.train()
    took = clock.taken / (STEPS_OF_A_RUN - WARM)
    return 1000 * took, sentences * float(dataset.sizes().mean()) / took


def screens(sizes) -> Iterator[tuple[str, tuple[int, int], tuple]]:
    """Cells and their processor, in memory and in a store, of each number of cells and genes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held = Splits({"screen": [folder / "screen.h5ad"]}, {"screen"})
        for number, size in enumerate(sizes):
            screen(*size).write_h5ad(folder / "screen.h5ad")
            yield "memory", size, load_cells(held)
            data = DataArguments(datasets={"screen": str(folder / "screen.h5ad")})
            yield (
                "store",
                size,
                load_store(prepare(data, folder / f"store-{number}", PrepareArguments(), quiet=True), held),
            )


def batches(device: str, shapes):
    """The making of batches, on the device and on the host."""
    print("\nmaking a batch: ms on the device, on the host, ratio")
    for shape in shapes:
        cells, genes, sentences, length = shape
        for kind, _, (of, processor) in screens([(cells, genes)]):
            dataset, taken = SentenceDataset(of, processor, "train", length), list(range(sentences))
            host = milliseconds(lambda dataset=dataset, taken=taken: dataset.__getitems__(taken), device)
            dataset.place_cells(CellsOnDevice(of, torch.device(device), whole=True))
            there = milliseconds(lambda dataset=dataset, taken=taken: dataset.__getitems__(taken), device)
            of_batch = f"{sentences} x {length}"
            print(
                f"{kind:<7}{cells:>8,} x {genes:<7,}{of_batch:>9} {there:8.2f} {host:8.2f} {there / host:6.2f}",
                flush=True,
            )


def runs(device: str, size, of_data):
    """Trainings from memory and from a store, beside the bare step."""
    print(
        "\ntraining, bf16: ms of a step with cells on the device, on the host; of the bare step; cells/s; beyond the bare step"
    )
    for kind, (cells, genes), loaded in screens(of_data):
        bare = milliseconds(training_step(*size, "bf16", device, genes)[0], device)
        there, rate = of_a_training(*loaded, size, device, there=True)
        gc.collect()  # the cells of that training
        torch.cuda.empty_cache()
        host, _ = of_a_training(*loaded, size, device, there=False)
        print(
            f"{kind:<7}{cells:>8,} x {genes:<7,}{there:8.2f} {host:8.2f} {bare:8.2f} {rate:10,.0f} {there / bare - 1:+6.0%}",
            flush=True,
        )


def profile(device: str, size, genes: int, rows: int = 20):
    """The kernels of a step, sorted by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for mode in ("bf16", "bf16 compiled") if device == "cuda" else ("bf16",):
        torch._dynamo.reset()
        step, _ = training_step(*size, mode, device, genes)
        for _ in range(3):
            step()
        synchronize(device)
        with profiled(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as recorded:
            for _ in range(3):
                step()
            synchronize(device)
        events = recorded.key_averages()
        name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        total = sum(getattr(event, name) for event in events) / 3000
        print(f"\n{size[0]}, {mode}: {total:.2f} ms of the device in a step")
        for event in sorted(events, key=lambda event: -getattr(event, name))[:rows]:
            print(f"{getattr(event, name) / 3000:8.3f} ms {event.count // 3:5d} x {event.key[:90]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="sizes that take seconds on a CPU")
    args = parser.parse_args()
    name = torch.cuda.get_device_name(0) if args.device == "cuda" else args.device
    print(f"torch {torch.__version__}, {name}")
    genes = 50 if args.small else GENES
    sizes = (("tiny", 2, 16),) if args.small else STEPS
    modes = MODES[:4] if args.small else MODES
    shapes = ((2, 16, 50),) if args.small else LOSSES
    if "precision" in args.parts:
        precision(args.device, shapes[:3])
    if "losses" in args.parts:
        losses(args.device, shapes)
    if "steps" in args.parts:
        ceiling = ceilings(args.device, 256 if args.small else 8192)
        steps(args.device, sizes, modes, genes, ceiling)
    if "runs" in args.parts:
        size, *of_data = SMALL_RUNS if args.small else RUNS
        runs(args.device, size, of_data)
    if "batches" in args.parts:
        batches(args.device, SMALL_BATCHES if args.small else BATCHES)
    if "profile" in args.parts:
        profile(args.device, sizes[-1] if args.small else STEPS[2], genes)


if __name__ == "__main__":
    main()
