"""Following the opcodes of a pickle without running it."""

import pickle
import pickletools
from collections.abc import Iterator
from types import NoneType
from typing import Any


# Opcodes of a pickle; a vocabulary of 100,000 names takes 200,000.
LARGEST_PROGRAM = 5_000_000
# Values of the content once each is written out wherever it stands.
LARGEST_CONTENT = 20_000_000

_LARGEST_KEY = 2**63
_MARK, _SCALAR, _OTHER = object(), "scalar", "other"
_SCALARS = {"int", "int_or_bool", "bool", "float", "long", "str", "bytes", "bytes_or_str", "unicode", "None"}
_PUTS, _GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
# What numpy makes its numbers with.
_MAKES_SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar", "_codecs encode")


_NO_KEY = "a key of a mapping, or a member of a set, is no number or text"


def check_keys(keys: list):
    """
    The same as [`Keys`], of values that a function of the program is given.

    Raises:
        pickle.UnpicklingError: one is no number or text, or has more than 64 bits.
    """
    for key in keys:
        large = isinstance(key, int) and abs(key) >= _LARGEST_KEY
        if large or not isinstance(key, (int, float, str, bytes, NoneType)):
            raise pickle.UnpicklingError(_NO_KEY)


class Keys:
    """
    Follows a program as its unpickler would, and knows of each value whether it is a number, a text or nothing. Keys of a
    mapping and members of a set must be: a tuple of tuples of tuples, a few bytes long, takes years to hash. Nor may they be
    numbers of more than 64 bits: of those, as many as one likes have one hash, and a mapping is searched through for each.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument):
        """
        Raises:
            pickle.UnpicklingError: a key is no number or text, or the program takes values that are not there.
        """
        name, stack = opcode.name, self._stack
        try:
            if name in _PUTS:
                self._memo[int(argument)] = stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            elif name in _GETS:
                stack.append(self._memo[int(argument)])
            else:
                self._run(opcode, argument)
        except LookupError as error:
            raise pickle.UnpicklingError("it takes values that are not there") from error

    def _run(self, opcode: pickletools.OpcodeInfo, argument):
        name, stack, before = opcode.name, self._stack, opcode.stack_before
        taken: list[Any] = []
        count = len(before)
        if pickletools.markobject in before or (name == "POP" and stack[-1] is _MARK):
            while stack[-1] is not _MARK:
                taken.append(stack.pop())
            stack.pop()
            count = before.index(pickletools.markobject) if pickletools.markobject in before else 0
        taken.reverse()
        below = [stack.pop() for _ in range(count)][::-1]
        if name == "SETITEM":
            self._check(below[1:2])
        elif name in ("SETITEMS", "DICT"):
            self._check(taken[::2])
        elif name in ("ADDITEMS", "FROZENSET"):
            self._check(taken)
        stack += self._left(opcode, argument, below)

    @staticmethod
    def _check(keys: list):
        if any(key is not _SCALAR and not (isinstance(key, tuple) and key[0] == "text") for key in keys):
            raise pickle.UnpicklingError(_NO_KEY)

    @staticmethod
    def _left(opcode: pickletools.OpcodeInfo, argument, below: list) -> Iterator[Any]:
        """What the opcode leaves on the stack."""
        name = opcode.name
        if name == "GLOBAL":
            yield ("global", argument)
        elif name == "STACK_GLOBAL":
            yield ("global", " ".join(str(part[1]) if isinstance(part, tuple) else "" for part in below))
        elif name == "REDUCE":
            function = below[0]
            yield _SCALAR if isinstance(function, tuple) and function[1] in _MAKES_SCALARS else _OTHER
        elif name in ("DUP", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            yield from [below[0]] * len(opcode.stack_after)
        else:
            for left in opcode.stack_after:
                if left is pickletools.markobject:
                    yield _MARK
                elif left.name == "str" or left.name == "unicode":
                    yield ("text", argument)
                elif isinstance(argument, int) and abs(argument) >= _LARGEST_KEY:
                    yield _OTHER
                else:
                    yield _SCALAR if left.name in _SCALARS else _OTHER


def check_content(content, largest: int = LARGEST_CONTENT):
    """
    Check that a content of plain containers stays small once each value is written out wherever it stands: lists of
    lists of one list, a few bytes long, take years to compare or to print.

    Args:
        largest (`int`): number of values.

    Raises:
        ValueError: it does not, or it holds itself.
    """
    sizes: dict[int, int] = {}
    under_way: set[int] = set()
    todo = [content]
    while todo:
        value = todo[-1]
        key = id(value)
        parts = _parts(value)
        if key in sizes or parts is None:
            todo.pop()
            continue
        missing = [part for part in parts if _parts(part) is not None and id(part) not in sizes]
        if missing and key in under_way:
            raise ValueError("a container of it holds itself")
        if missing:
            under_way.add(key)
            todo += missing
            continue
        sizes[key] = 1 + sum(sizes.get(id(part), 1) for part in parts)
        under_way.discard(key)
        if sizes[key] > largest:
            raise ValueError(f"it holds more than {largest:,} values once all are written out")
        todo.pop()


def _parts(value) -> list | None:
    """The values in a container; None for anything else."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else None
