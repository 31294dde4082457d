"""Pushing from a training: its repository before the first step, its checkpoints on the way, its model at the end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from pertstate.base.hub_errors import on_the_hub
from pertstate.base.printable import get_logger
from pertstate.hub.push import address_of, ensure_repository, push_checkpoint


logger = get_logger(__name__)


class TrainingPush(TrainerCallback):
    """
    Pushes what a `Trainer` saves to the repository `hub_model_id`, by default one with the name of the output folder.

    As a callback it pushes each checkpoint of the training if `hub_strategy` is `"every_save"`. The training goes on if the
    Hub is down.

    Args:
        args (`TrainingArguments`): the arguments of the Trainer.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.repository = args.hub_model_id or Path(str(args.output_dir)).absolute().name
        self._private = args.hub_private_repo

    def check(self, card: str | None):
        """
        Make the repository if it does not exist, and let the Hub check the metadata of a card. What the Hub refuses is
        then found before the training and not after it.

        Raises:
            ValueError: the Hub refuses the metadata, or a private repository is asked for and there is a public one.
            PermissionError, OSError: there is no repository to push to, and none can be made.
        """
        with on_the_hub(self.repository, "model"):
            if self.args.process_index == 0:
                api = HfApi(token=self.args.hub_token)
                self.repository = ensure_repository(api, self.repository, self._private)
                self._private = None  # the repository is now as asked for, and its owner may change that
            if card is not None:
                ModelCard(card).validate()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In this block the arguments tell `Trainer` not to push: it would make the repository by itself, with other errors."""
        asked, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            yield
        finally:
            self.args.push_to_hub = asked

    def push(
        self,
        folder: str | os.PathLike,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo:
        """Push a checkpoint folder, with the Trainer's arguments for what is not given; see [`push_checkpoint`]."""
        commit = push_checkpoint(
            folder,
            self.repository,
            private=self._private if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            message=message,
        )
        logger.info(f"pushed: {address_of(commit)}")
        return commit

    def on_save(self, args, state, control, **kwargs):
        if not args.push_to_hub or args.hub_strategy != HubStrategy.EVERY_SAVE or args.process_index != 0:
            return
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        try:
            self.push(checkpoint, f"Training in progress, step {state.global_step}")
        except OSError as error:
            logger.warning(f"{checkpoint.name} was not pushed, the training goes on: {error}")
