"""Reading YAML files of mappings, lists and words whose size is bounded, also once aliases are written out."""

import os
from typing import Any

import yaml

from pertstate.base.bounded_text import LARGEST_SETTINGS, read_text
from pertstate.data.pickle_program import check_content


LARGEST_MAPPING = 10_000
# The largest number of values, counted with every alias written out.
LARGEST_CONTENT = 1_000_000
DEEPEST = 50
# The most characters of a number. Numbers of 64 bits have fewer, and the time that Python takes grows with the square of them.
_LONGEST_NUMBER = 40


class BoundedLoader(yaml.SafeLoader):
    """A loader of text, numbers, lists and mappings, none of them large or nested deep."""

    def __init__(self, stream):
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent, index):
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"lists and mappings are nested more than {DEEPEST} deep", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode):
        """
        What `<<: [*a, *b]` does, for mappings of up to 10,000 entries: each merge copies all entries of the others, so a few
        lines of merges of merges would fill any memory.
        """
        super().flatten_mapping(node)
        if len(node.value) > LARGEST_MAPPING:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"a mapping has more than {LARGEST_MAPPING:,} entries once others are merged into it",
                node.start_mark,
            )

    def construct_scalar(self, node):
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number has {len(node.value):,} characters", node.start_mark
            )
        return super().construct_scalar(node)


def load_yaml(path: str | os.PathLike, loader: type[BoundedLoader]) -> Any:
    """
    The content of a YAML file.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is larger than what a person writes, no YAML, names anything but text, numbers, lists and mappings, or
            would grow far beyond its size.
    """
    text = read_text(path, LARGEST_SETTINGS)
    try:
        content = yaml.load(text, loader)
        check_content(content, LARGEST_CONTENT)
    # The errors of yaml's own constructors at words that are no number, truth value or date.
    except (yaml.YAMLError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    return content
