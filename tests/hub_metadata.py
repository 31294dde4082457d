"""What the Hub refuses in the metadata of a card, as far as cards here use it."""

import re


# Some of the licences that the Hub knows.
LICENSES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "gpl-3.0", "mit", "other", "unknown"}
TASKS = {"feature-extraction", "graph-ml", "other", "tabular-regression", "text-generation"}
# Tasks of models' own pipelines: the Hub warns that it does not list them, and takes them.
OWN_TASKS = {"perturbation-prediction"}
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")


def problems_of(data: dict) -> list[str]:
    """One sentence for each problem of the metadata of a model card."""
    problems = []
    if data.get("license", "other") not in LICENSES:
        problems.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("pipeline_tag", "other") not in TASKS | OWN_TASKS:
        problems.append(f'"pipeline_tag" must be one of {sorted(TASKS | OWN_TASKS)}')
    for key in ("base_model", "datasets"):
        names = data.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if not _REPOSITORY.fullmatch(name):
                problems.append(f'"{key}" with value "{name}" is not a valid repository')
    for index in data.get("model-index") or []:
        if not isinstance(index.get("name"), str):
            problems.append('"model-index[].name" is required')
        for result in index["results"]:
            if not result["task"].get("type"):
                problems.append('"model-index[].results[].task.type" is required')
            if not _DATASET_TYPE.fullmatch(str(result["dataset"].get("type"))):
                problems.append(f'"model-index[].results[].dataset.type" with value {result["dataset"]["type"]!r}')
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                    problems.append('"model-index[].results[].metrics[]" needs type and value')
    return problems
