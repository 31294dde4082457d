"""YAML whose merge keys cannot grow beyond what a person writes."""

import yaml


LARGEST_MAPPING = 10_000


def bounded_merge(loader: yaml.SafeLoader, node: yaml.MappingNode):
    """
    What `<<: [*a, *b]` does in a loader, for mappings of up to 10,000 entries: each merge copies all entries of the others, so
    a few lines of merges of merges would fill any memory.
    """
    yaml.SafeLoader.flatten_mapping(loader, node)
    if len(node.value) > LARGEST_MAPPING:
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"a mapping has more than {LARGEST_MAPPING:,} entries once others are merged into it",
            node.start_mark,
        )
