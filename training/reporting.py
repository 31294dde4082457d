"""Services that a run reports to: they are there, and can be written to, before any data are read."""

import importlib.util
import inspect
import os

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pertstate.base.messages import closest


# Packages that have another name than the service.
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekitplugins-deck-standard"}
# Values of WANDB_MODE with which nothing is sent.
_OFFLINE = ("offline", "disabled", "dryrun")


def check_reporting(services: list[str]):
    """
    Check that a run can report to these services, as the Trainer will when the data have been read.

    Args:
        services (`list[str]`): values of `report_to`: `tensorboard`, `wandb`, `trackio`, ..

    Raises:
        ValueError: there is no such service; or wandb is to be reached, but nobody is logged in.
        ImportError: the package of a service is not installed.
    """
    for service in services:
        if service in ("none", "all"):
            continue
        if service not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to: expected none, all or names of services, found {service!r}; {closest(service, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[service]()
        except (RuntimeError, ImportError) as error:
            package = _PACKAGES.get(service, service)
            raise ImportError(
                f"report_to: {service} needs a package that is not installed or does not load ({error}): pip install {package}"
            ) from error
    if "wandb" in services and importlib.util.find_spec("wandb") is not None:
        _check_wandb()


def _check_wandb():
    import wandb

    if os.environ.get("WANDB_MODE", "online").lower() in _OFFLINE:
        return
    # Older versions would ask for a key here.
    knows = "prompt" in inspect.signature(wandb.login).parameters
    if not (wandb.login(prompt=False) if knows else wandb.api.api_key):
        raise ValueError(
            "report_to: expected a user who is logged in to wandb, found no key; run `wandb login`, or set WANDB_MODE=offline to "
            "write to the folder wandb alone"
        )
