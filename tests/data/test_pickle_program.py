"""Pickles of a few bytes that would take years to read are refused at once."""

import collections
import io
import pickle
import pickletools
import time

import numpy as np
import pytest
import torch

from pertstate.data.pickle_program import Keys, check_content
from pertstate.data.restricted_pickle import read_pickled


def nested(kind, depth: int):
    value = kind(("x", "y"))
    for _ in range(depth):
        value = kind((value, value))
    return value


def program(key: bytes, after: bytes) -> bytes:
    return b"\x80\x04" + key + after + b"."


# ("x", "x"), then a tuple of two of it, and so on: 5 bytes a level.
TUPLES = b"X\x01\x00\x00\x00x\x94h\x00\x86\x94" + b"".join(
    b"h" + bytes([i, ord("h"), i]) + b"\x86\x94" for i in range(1, 60)
)


@pytest.mark.parametrize(
    "bytes_",
    [
        program(b"}" + TUPLES, b"K\x01s"),
        program(b"}(" + TUPLES, b"K\x01u"),
        program(b"(" + TUPLES, b"K\x01d"),
        program(b"\x8f(" + TUPLES, b"\x90"),
        program(b"(" + TUPLES, b"\x91"),
        b"}" + TUPLES + b"q\xffK\x01s.",
        program(b"}" + TUPLES + b"2", b"K\x01s"),
    ],
    ids=["setitem", "setitems", "dict", "additems", "frozenset", "put", "dup"],
)
def test_keys_are_numbers_and_texts(tmp_path, bytes_):
    path = tmp_path / "keys.pkl"
    path.write_bytes(bytes_)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="a key of a mapping, or a member of a set, is no number or text"):
        read_pickled(path)
    assert time.perf_counter() - start < 2


class Called:
    """Pickled, it is a call of a function."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "called",
    [
        Called(set, [nested(tuple, 60)]),
        Called(frozenset, [nested(tuple, 60)]),
        Called(collections.OrderedDict, [[nested(tuple, 60), 1]]),
        Called(set, (nested(tuple, 60), 1)),
    ],
    ids=["set", "frozenset", "OrderedDict", "a tuple"],
)
def test_keys_that_a_function_is_given_are_numbers_and_texts(tmp_path, called, protocol):
    path = tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps(called, protocol))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="a key of a mapping, or a member of a set, is no number or text"):
        read_pickled(path)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_functions_make_of_plain_keys_is_read(tmp_path, protocol):
    content = [{1, "a", 2.5}, frozenset({"b"}), collections.OrderedDict(a=1, b=[2]), set(), collections.OrderedDict()]
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_pickled(tmp_path / "plain.pkl")
    assert found == content and list(found[2]) == ["a", "b"]


# Numbers that Python gives one hash.
ALIKE = [k * (2**61 - 1) for k in range(2**3, 60_000)]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("content", [dict.fromkeys(ALIKE[:2000]), set(ALIKE[:2000]), {"a": {-(2**64): 1}}])
def test_keys_of_more_than_64_bits_are_refused(tmp_path, content, protocol):
    """Of 60,000 such keys, 700 kB, a mapping takes minutes to make; and no signal is heard meanwhile."""
    path = tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ValueError, match="a key of a mapping, or a member of a set, is no number or text"):
        read_pickled(path)


def test_large_numbers_that_are_no_keys_are_read(tmp_path):
    content = {"a": 10**40, -(2**63) + 1: [2**63], "b": {2**63 - 1, 1.5}}
    (tmp_path / "numbers.pkl").write_bytes(pickle.dumps(content))
    assert read_pickled(tmp_path / "numbers.pkl") == content


@pytest.mark.parametrize("kind", [list, tuple])
def test_contents_that_would_be_endless_are_refused(tmp_path, kind):
    path = tmp_path / "content.pkl"
    path.write_bytes(pickle.dumps({"a": nested(kind, 60), "b": nested(kind, 60)}))
    assert path.stat().st_size < 2000
    start = time.perf_counter()
    with pytest.raises(ValueError, match="more than 20,000,000 values"):
        read_pickled(path)
    assert time.perf_counter() - start < 2
    itself: list = []
    itself.append({"me": itself})
    path.write_bytes(pickle.dumps(itself))
    with pytest.raises(ValueError, match="holds itself"):
        read_pickled(path)


PLAIN = [
    {"a": 1, 2: [3.5, None, True], b"c": ("d", ("e",)), -1: {"x", "y"}, None: frozenset([1])},
    {np.str_("gene"): np.int64(3), np.float64(0.5): np.bool_(True)},
    collections.OrderedDict([("w", 1), ("v", [{}, (), set()])]),
    [[]] * 1000 + [{"k" * 300: 10**40}],
]


@pytest.mark.parametrize("content", PLAIN, ids=range(len(PLAIN)))
@pytest.mark.parametrize("protocol", range(6))
def test_plain_contents_are_read(tmp_path, content, protocol):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert read_pickled(path) == content
    torch.save({"x": torch.ones(2), "content": 1}, path)
    assert set(read_pickled(path)) == {"x", "content"}


def test_the_stack_is_followed_to_its_end():
    """After the instructions of a pickle, as pickletools lists them, one value is left, and the last instruction takes it."""
    for content in PLAIN:
        for protocol in range(6):
            keys = Keys()
            for opcode, argument, _ in pickletools.genops(io.BytesIO(pickle.dumps(content, protocol))):
                keys.step(opcode, argument)
            assert keys._stack == []


def test_shared_parts_count_wherever_they_stand():
    part = [1, 2, 3]
    check_content([part] * 1000)
    with pytest.raises(ValueError, match="more than 20,000,000 values"):
        check_content([[part] * 10_000] * 1000)
