"""Cell sentences straight from a stream, with nothing on disk and in bounded memory. A stopped run can be continued."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from pertstate.base.constants import (
    BATCH_IDS,
    CONTEXT_IDS,
    CONTROL_CELLS,
    GENE_LABELS,
    LABELS,
    PERTURBATION_IDS,
    Split,
    Values,
)
from pertstate.base.printable import get_logger
from pertstate.data.cell_batches import StreamedCellBatches
from pertstate.data.cell_pool import CellPool, CellRows
from pertstate.data.cells import Cells
from pertstate.data.group_sums import GroupSums
from pertstate.data.record import RecordedGroup
from pertstate.data.stream_blocks import CellBlock, CellKey, FeatureReader
from pertstate.data.stream_reading import START, CellStream, Position
from pertstate.data.stream_state import read_stream_state, write_stream_state
from pertstate.data.stream_survey import StreamSurvey, check_controls
from pertstate.data.training_sentences import TrainingSentences


if TYPE_CHECKING:
    from transformers import TrainerState

    from pertstate.training.arguments import StateTrainingArguments

logger = get_logger(__name__)

# The tensors of one sentence, by the keys of a batch.
Sentence = dict[str, "np.ndarray | np.int64"]


@dataclass(frozen=True)
class _Group:
    """Cells that may stand in one sentence, and the rows of the sampled controls that match them."""

    key: CellKey
    perturbation: dict[str, np.ndarray]
    context_id: np.int64
    controls: np.ndarray
    fell_back: bool


@dataclass
class _Pass:
    """One pass over this process' part of the stream, as far as it has come."""

    epoch: int
    generator: np.random.Generator
    position: Position = START
    read: bool = False  # to the end
    sentences: int = 0
    fallbacks: int = 0
    most_pending: int = 0
    pool: CellPool = field(default_factory=CellPool)
    groups: list[_Group] = field(default_factory=list)
    number_of: dict[CellKey, int] = field(default_factory=dict)
    # Slots in the pool: of the cells of each group that wait, and of the sentences that wait for their turn.
    pending: list[list[int]] = field(default_factory=list)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ready: list[tuple[int, np.ndarray]] = field(default_factory=list)


class StreamLoader(DataLoader):
    """A loader that tells its stream of the epoch, as the Trainer tells the loader."""

    dataset: "SentenceStream | StreamedCellBatches"

    def set_epoch(self, epoch: int):
        self.dataset.set_epoch(epoch)


class SentenceStream(TrainingSentences, IterableDataset):
    """
    Sentences of the training cells of a stream, in the form of those of [`SentenceDataset`].

    A sentence is up to `set_size` cells of one dataset, context and perturbation (and batch, where controls match by
    batch), in the order of the stream, and as many control cells of the survey's sample, drawn without replacement. The
    cells of a group wait until they fill a sentence; those that are left at the end of the stream make shorter
    sentences. In a pass each training cell stands in exactly one sentence. A pass is the same for the same seed, epoch
    and part; the shards of the stream are read in another order in each epoch.

    Several processes (`rank`, `world_size`) and workers of a `DataLoader` read disjoint parts, which together are the
    whole stream. A part is a share of the shards. Where there are fewer shards than parts, it is every n-th cell, and
    each process reads everything (`stream.reshard()` makes more shards). Parts may have different numbers of sentences:
    with several processes use `endless`, and give the batches to the model as they are; `accelerate` must not deal them
    out a second time.

    `state_dict` and `load_state_dict` continue a pass with the very next sentence. The shard that it is in is read again
    from its start; shards before it are not. The state lives in the process that iterates, so this needs
    `num_workers=0`.

    Args:
        source ([`CellStream`]): the stream.
        survey ([`StreamSurvey`]): the first look over it.
        set_size (`int`): cells of a sentence.
        seed (`int`): seed of the order and of the draws.
        control_sentences (`bool`): also map control cells to control cells of their context.
        heldout_controls (`bool`): let the control cells of contexts without any training perturbation take part in
            those control sentences.
        buffer_cells (`int`): at most so many cells wait. Where a block would bring more, the fullest groups become
            shorter sentences.
        shuffle_sentences (`int`): so many sentences wait, and the next one is drawn from them at random, so that groups
            mix.
        rank, world_size (`int`): read this one of so many disjoint parts.
        endless (`bool`): go on with the next epoch by itself.

    Raises:
        ValueError: an option is out of range; while iterating, a value or label is wrong, a context has no control
            cells, or a label was not seen in the survey.
    """

    def __init__(
        self,
        source: CellStream,
        survey: StreamSurvey,
        set_size: int,
        seed: int = 0,
        control_sentences: bool = True,
        heldout_controls: bool = True,
        buffer_cells: int = 65_536,
        shuffle_sentences: int = 64,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = False,
    ):
        if set_size < 1:
            raise ValueError(f"set_size={set_size}: expected at least 1 cell")
        if buffer_cells < source.block_size:
            raise ValueError(
                f"buffer_cells={buffer_cells}: expected at least the {source.block_size} cells of a block; lower block_size"
            )
        if shuffle_sentences < 0:
            raise ValueError(f"shuffle_sentences={shuffle_sentences}: expected 0 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1}, of world_size={world_size}")
        self.source, self.set_size, self.seed = source, set_size, seed
        self.control_sentences, self.heldout_controls = control_sentences, heldout_controls
        self.buffer_cells, self.shuffle_sentences = buffer_cells, shuffle_sentences
        self.rank, self.world_size, self.endless = rank, world_size, endless
        self._use(survey)
        # Shared with workers that live on between epochs: the epoch, and whether one of them has iterated.
        self._shared = torch.zeros(2, dtype=torch.int64).share_memory_()
        self._pass: _Pass | None = None
        self._loaded: _Pass | None = None

    def _use(self, survey: StreamSurvey):
        self.survey, self.processor = survey, survey.processor
        self.source.read_labels_as(survey.processor.label_reader)
        self._reader = FeatureReader(self.source, survey.processor)
        self._trained = survey.trained
        names = {key[2] for key in survey.counts if survey.split_of(*key) == Split.TRAIN}
        # What the sampled control cells of each (dataset, context) express, where the model reads it.
        self._expressed: dict[tuple[str, str], tuple[np.ndarray, int]] = {}
        # One width for all sentences, so that they stack.
        self._width = max([1, *(len(self.processor.split_combination(name)) for name in names)])
        self._control_batches = None
        if self.processor.batch_key is not None:
            ids = self.processor.encode_batches(survey.batch_names)
            self._control_batches = ids[survey.controls.batches]

    @property
    def epoch(self) -> int:
        """The epoch of the pass that begins next; of an endless stream, that of the pass under way."""
        return int(self._shared[0])

    def training_cells(self) -> Cells | None:
        """Those that the survey sampled, see `baseline_cells` of [`survey_stream`]."""
        return self.survey.to_cells(Split.TRAIN)

    def recorded_groups(self) -> list[RecordedGroup]:
        counts = sorted(self.survey.counts.items())
        return [RecordedGroup(*key, self.survey.split_of(*key) or Split.UNUSED, count) for key, count in counts]

    def learned_controls(self) -> list[tuple[str, str]]:
        return sorted(
            key[:2]
            for key in self.survey.counts
            if self._trains_on(CellKey(*key, batch=None)) and key[2] == self.processor.control
        )

    @property
    def num_cells(self) -> int:
        """How many of the cells that the first look saw one pass over all parts trains on."""
        return sum(count for key, count in self.survey.counts.items() if self._trains_on(CellKey(*key, batch=None)))

    @property
    def num_sentences(self) -> int:
        """As many as if each training cell stood in a full sentence."""
        if not self.survey.complete:
            raise ValueError(
                f"the length of an epoch of the stream is not known: the first look at it ended after "
                f"{self.survey.cells} cells; leave stream.fill_cells out, or do without schedules in epochs "
                "(lr_decay_epochs: null)"
            )
        return math.ceil(self.num_cells / self.set_size)

    def epoch_of(self, args: "StateTrainingArguments", state: "TrainerState") -> float | None:
        # The Trainer takes the whole of a training on a stream for one epoch.
        return state.global_step / self.steps_per_epoch(args) if self.survey.complete else None

    def steps_per_epoch(self, args: "StateTrainingArguments") -> int:
        if args.cells_per_batch is None:
            return super().steps_per_epoch(args)
        _ = self.num_sentences  # raises where the length is not known
        of_step = args.cells_of_batch(self.set_size) * args.world_size * args.gradient_accumulation_steps
        return max(1, math.ceil(self.num_cells / of_step))

    def loader(self, args: "StateTrainingArguments", collate: Callable) -> StreamLoader:
        if args.dataloader_num_workers > 0:
            raise ValueError(
                f"dataloader_num_workers={args.dataloader_num_workers}: a stream is read by the process that trains, whose "
                "checkpoints hold its state; leave it at 0"
            )
        # Not a loader of accelerate, which reads a batch ahead of the state that is saved, and deals out to the
        # processes a stream that each of them reads its own part of.
        pinned = args.dataloader_pin_memory
        if args.cells_per_batch is None:
            return StreamLoader(self, args.train_batch_size, collate_fn=collate, pin_memory=pinned)
        batches = StreamedCellBatches(self, args.cells_of_batch(self.set_size))
        return StreamLoader(batches, None, collate_fn=collate, pin_memory=pinned)

    @property
    def progress(self) -> dict[str, int]:
        """
        Counts of the pass under way: `epoch`, `rows` read, `sentences` given, the most cells that were `pending`,
        and sentences whose controls were of another batch (`fallbacks`).
        """
        run = self._pass or self._new_pass(self.epoch)
        return {
            "epoch": run.epoch,
            "rows": run.position.rows,
            "sentences": run.sentences,
            "pending": run.most_pending,
            "fallbacks": run.fallbacks,
        }

    def set_epoch(self, epoch: int):
        """
        Set the epoch of the pass that begins next. An endless stream ignores it after a state was loaded, and goes on
        with that.

        Raises:
            ValueError: a loaded state is in the middle of another epoch.
        """
        if self._loaded is not None:
            if not self.endless and epoch != self._loaded.epoch:
                raise ValueError(
                    f"set_epoch({epoch}): the loaded state is in epoch {self._loaded.epoch}; expected that, or an "
                    "endless stream, which counts epochs by itself"
                )
            return
        self._shared[0] = epoch
        if self._pass is not None and self._pass.read and not self._pass.ready:
            self._pass = None  # it has ended; a state is now that of the next one

    def group_sums(self, part: int = 0, parts: int = 1, progress: bool = False) -> GroupSums:
        """
        As [`TrainingSentences.group_sums`], over all control cells and not only the sampled ones. The stream is read
        from its start, wherever iteration stands.

        Raises:
            ValueError: a value or label is wrong, or a label was not seen in the survey.
        """
        expression: dict | None = {} if self.processor.values == Values.LOG1P else None
        summed, known = GroupSums(self.processor.control, expression=expression), set()
        with tqdm(desc="fit", unit=" cells", unit_scale=True, disable=not progress) as bar:
            for block, _ in self.source.blocks(part=part, parts=parts):
                wanted = [(key, rows) for key, rows in block.groups() if self._teaches(key)]
                for key, rows in wanted:
                    if key.perturbation not in known:
                        self._encode(key.perturbation, block.where(rows[0]))
                        known.add(key.perturbation)
                if wanted:
                    cells = self._reader.read(block, np.concatenate([rows for _, rows in wanted])).features
                    ends = np.cumsum([len(rows) for _, rows in wanted])
                    for (key, rows), end in zip(wanted, ends):
                        summed.add(key[:3], cells[end - len(rows) : end])
                bar.update(len(block))
        return summed

    def _teaches(self, key: CellKey) -> bool:
        """Whether a cell is a training cell, or a control cell of a dataset that has training cells."""
        if not self.source.uses(key.context):
            return False
        split = self.survey.split_of(*key[:3])
        return split == Split.TRAIN or (
            split == Split.CONTROL and key.dataset in {dataset for dataset, _ in self._trained}
        )

    # Iteration

    def __iter__(self) -> Iterator[Sentence]:
        worker = get_worker_info()
        part, parts = self.rank, self.world_size
        if worker is not None:
            if self._loaded is not None:
                raise ValueError(
                    f"a loaded state is continued with num_workers=0 alone, found {worker.num_workers} workers, each "
                    "with a part of its own"
                )
            self._shared[1] = 1
            part, parts = part * worker.num_workers + worker.id, parts * worker.num_workers
        else:
            self._shared[1] = 0
        run, self._loaded = self._loaded or self._new_pass(self.epoch), None
        while True:
            self._pass = run
            yield from self._sentences(run, part, parts)
            if not self.endless:
                return
            if run.sentences == 0:
                raise ValueError(
                    f"part {part} of {parts} of the stream has no training cells; use fewer processes or workers"
                )
            run = self._new_pass(run.epoch + 1)
            if worker is None:
                self._shared[0] = run.epoch

    def _new_pass(self, epoch: int) -> _Pass:
        return _Pass(epoch, np.random.default_rng([self.seed, epoch, self.rank, self.world_size]))

    def _sentences(self, run: _Pass, part: int, parts: int) -> Iterator[Sentence]:
        if parts != self.world_size and run.position == START:
            # Workers draw differently from one another.
            run.generator = np.random.default_rng([self.seed, run.epoch, part, parts])
        # All parts agree on the order of shards.
        order = np.random.default_rng([self.seed, run.epoch]).permutation(self.source.num_shards)
        blocks = self.source.blocks(order, part, parts, run.position)
        while True:
            while len(run.ready) > (0 if run.read else self.shuffle_sentences):
                yield self._draw(run)
            if run.read:
                return
            following = next(blocks, None)
            if following is None:
                for number in np.flatnonzero(run.sizes):
                    self._complete(run, int(number), int(run.sizes[number]))
                run.read = True
            else:
                block, run.position = following
                self._take_in(run, block)

    def _take_in(self, run: _Pass, block: CellBlock):
        """Let the training cells of a block wait, and complete the sentences that they fill."""
        wanted = [(self._group_of(run, key, block, rows), rows) for key, rows in block.groups()]
        wanted = [(number, rows) for number, rows in wanted if number >= 0]
        if not wanted:
            return
        count = sum(len(rows) for _, rows in wanted)
        while run.sizes.sum() + count > self.buffer_cells:
            fullest = int(run.sizes.argmax())
            self._complete(run, fullest, int(run.sizes[fullest]))
        slots = run.pool.add(self._reader.read(block, np.concatenate([rows for _, rows in wanted])))
        ends = np.cumsum([len(rows) for _, rows in wanted])
        for (number, _), mine in zip(wanted, np.split(slots, ends[:-1])):
            run.pending[number].extend(mine.tolist())
            run.sizes[number] += len(mine)
        run.most_pending = max(run.most_pending, int(run.sizes.sum()))
        for number in sorted({number for number, _ in wanted}):
            size = min(self.set_size, len(run.groups[number].controls))
            while run.sizes[number] >= size:
                self._complete(run, number, size)

    def _complete(self, run: _Pass, number: int, size: int):
        run.ready.append((number, np.array(run.pending[number][:size], dtype=np.int64)))
        del run.pending[number][:size]
        run.sizes[number] -= size

    def _draw(self, run: _Pass) -> Sentence:
        """One of the sentences that wait, at random."""
        place = int(run.generator.integers(len(run.ready)))
        run.ready[place], run.ready[-1] = run.ready[-1], run.ready[place]
        number, slots = run.ready.pop()
        group = run.groups[number]
        drawn = run.generator.choice(group.controls, len(slots), replace=False)
        labels, genes = run.pool.dense(slots)
        run.pool.remove(slots)
        run.sentences += 1
        run.fallbacks += group.fell_back
        sentence: Sentence = {
            CONTROL_CELLS: self.survey.controls.dense(drawn)[0],
            LABELS: labels,
            **group.perturbation,
            CONTEXT_IDS: group.context_id,
        }
        of_context = self.processor.control_values([group.key[:2]], self._controls, self._control_pool, self._expressed)
        sentence |= {key: values[0] for key, values in of_context.items()}
        if self._control_batches is not None:
            sentence[BATCH_IDS] = self._control_batches[drawn]
        if genes is not None:
            sentence[GENE_LABELS] = genes
        return sentence

    def _controls(self, rows: np.ndarray) -> np.ndarray:
        """The features of some sampled control cells."""
        return self.survey.controls.dense(rows)[0]

    def _control_pool(self, place: tuple[str, str]) -> np.ndarray:
        """The rows of all sampled control cells of a (dataset, context)."""
        return np.concatenate(list(self.survey.control_rows[place].values()))

    # Groups

    def _group_of(self, run: _Pass, key: CellKey, block: CellBlock, rows: np.ndarray) -> int:
        """The number of the group of some cells, -1 where they are not trained on."""
        number = run.number_of.get(key)
        if number is None:
            number = -1
            if self._trains_on(key):
                group_key = key if self.survey.control_matching == "batch" else key._replace(batch=None)
                number = run.number_of.get(group_key)
                if number is None:
                    number = self._new_group(run, group_key, block.where(rows[0]))
            run.number_of[key] = number
        return number

    def _trains_on(self, key: CellKey) -> bool:
        if not self.source.uses(key.context):
            return False
        split = self.survey.split_of(*key[:3])
        if split != Split.CONTROL:
            return split == Split.TRAIN
        if not self.control_sentences:
            return False
        return key[:2] in self._trained or (
            self.heldout_controls and key.dataset in {dataset for dataset, _ in self._trained}
        )

    def _new_group(self, run: _Pass, key: CellKey, where: str) -> int:
        encoded = self._encode(key.perturbation, where)
        together = self.processor.split_combination(key.perturbation)
        if len(together) > self._width:
            raise ValueError(
                f"{where}: {key.perturbation!r} combines {len(together)} perturbations, those of the first look at most "
                f"{self._width}; raise fill_cells"
            )
        if PERTURBATION_IDS in encoded:
            ids = encoded[PERTURBATION_IDS]
            encoded[PERTURBATION_IDS] = np.pad(ids, (0, self._width - len(ids)), constant_values=-1)
        if key[:2] not in self.survey.control_rows:
            check_controls([key[:2]])
        parts = self.survey.control_rows[key[:2]]
        of_batch = key.batch if self.survey.control_matching == "batch" else None
        fell_back = of_batch not in parts
        if fell_back:
            logger.warning(
                f"no control cell of batch {key.batch!r} of {key.dataset} / {key.context} was sampled; its cells are "
                "matched with control cells of other batches"
            )
        controls = np.concatenate(list(parts.values())) if fell_back else parts[of_batch]
        run.groups.append(
            _Group(
                key,
                encoded,
                self.processor.encode_contexts([key.context])[0],
                controls,
                fell_back,
            )
        )
        run.pending.append([])
        if len(run.groups) > len(run.sizes):
            run.sizes = np.concatenate([run.sizes, np.zeros(len(run.sizes) + 64, dtype=np.int64)])
        run.number_of[key] = len(run.groups) - 1
        return run.number_of[key]

    def _encode(self, perturbation: str, where: str) -> dict[str, np.ndarray]:
        try:
            return {name: np.asarray(values[0]) for name, values in self.processor.encode([perturbation]).items()}
        except KeyError as error:
            raise ValueError(
                f"{where}: perturbation {perturbation!r} was not among the {self.survey.cells} rows of the first look; "
                "raise fill_cells"
            ) from error

    # State

    def _settings(self) -> dict:
        """The settings under which a state was taken, and must be loaded."""
        names = ["set_size", "seed", "control_sentences", "heldout_controls", "buffer_cells", "shuffle_sentences"]
        names += ["rank", "world_size"]
        return {name: getattr(self, name) for name in names} | {
            "block_size": self.source.block_size,
            "num_shards": self.source.num_shards,
            "contexts": self.source.contexts,
            "feature_dim": self.processor.feature_dim,
            "normalize": self.processor.normalize,
        }

    def state_dict(self) -> dict:
        """
        All that the rest of the pass depends on, with the survey's samples.

        Returns:
            `dict`: `settings`, `survey` and `pass` are values for JSON, `arrays` is a `dict[str, np.ndarray]`.

        Raises:
            ValueError: workers of a `DataLoader` iterate, each with a state of its own.
        """
        if self._shared[1] or get_worker_info() is not None:
            raise ValueError(
                "workers of a DataLoader iterate over this stream, each with a state of its own; use num_workers=0 where "
                "a run is to be continued"
            )
        run = self._loaded or self._pass or self._new_pass(self.epoch)
        values, arrays = self.survey.to_state()
        waiting = [np.array(slots, dtype=np.int64) for slots in run.pending] + [slots for _, slots in run.ready]
        if sum(map(len, waiting)):
            arrays |= run.pool.take(np.concatenate(waiting)).to_arrays("waiting")
        of_pass = {
            "epoch": run.epoch,
            "generator": run.generator.bit_generator.state,
            "position": list(run.position),
            "read": run.read,
            "sentences": run.sentences,
            "fallbacks": run.fallbacks,
            "most_pending": run.most_pending,
            "groups": [[*group.key, int(size)] for group, size in zip(run.groups, run.sizes)],
            "ready": [[number, len(slots)] for number, slots in run.ready],
        }
        return {"settings": self._settings(), "survey": values, "pass": of_pass, "arrays": arrays}

    def load_state_dict(self, state: dict):
        """
        Continue where a state was taken: the next iteration gives the sentences that were still to come.

        Raises:
            ValueError: a setting was another one when the state was taken; it is named.
        """
        own = self._settings()
        for name, value in own.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"the saved stream had {name}={state['settings'][name]!r}, this one has {value!r}; give it the same"
                )
        self._use(StreamSurvey.from_state(state, self.processor, self.survey.splits))
        values = state["pass"]
        run = self._new_pass(values["epoch"])
        run.generator.bit_generator.state = values["generator"]
        run.position, run.read = Position(*values["position"]), values["read"]
        run.sentences, run.fallbacks, run.most_pending = (
            values[name] for name in ("sentences", "fallbacks", "most_pending")
        )
        for *labels, _ in values["groups"]:
            self._new_group(run, CellKey(*labels), "the saved state")
        sizes = [size for *_, size in values["groups"]] + [size for _, size in values["ready"]]
        if sum(sizes):
            slots = np.split(run.pool.add(CellRows.from_arrays(state["arrays"], "waiting")), np.cumsum(sizes)[:-1])
            pending = slots[: len(run.groups)]
            run.pending, run.sizes = [part.tolist() for part in pending], np.array(list(map(len, pending)))
            run.ready = [(number, part) for (number, _), part in zip(values["ready"], slots[len(run.groups) :])]
        self._loaded, self._pass = run, None
        self._shared[0] = run.epoch

    def save_state(self, folder: str | os.PathLike):
        """Write `state_dict` to a folder: `stream_state.json` and `stream_state.safetensors` (one pair for each rank)."""
        write_stream_state(self.state_dict(), folder, self.rank, self.world_size)

    def load_state(self, folder: str | os.PathLike) -> bool:
        """
        Continue with the state that [`SentenceStream.save_state`] wrote.

        Raises:
            FileNotFoundError, ValueError: see [`read_stream_state`] and [`SentenceStream.load_state_dict`].
        """
        self.load_state_dict(read_stream_state(folder, self.rank, self.world_size))
        return True
