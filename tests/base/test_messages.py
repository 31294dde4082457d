import pytest

from pertstate.base.messages import closest, counted, given, some


def test_the_nearest_names_or_the_list_of_them():
    assert closest("hiden_size", ["hidden_size", "head_dim"]) == "did you mean 'hidden_size'?"
    assert closest("x", ["hidden_size", "head_dim"]) == "expected one of 'hidden_size', 'head_dim'"
    assert closest("x", range(12)).endswith("'8', '9' and 2 more")


def test_the_first_names_and_how_many_follow():
    assert some(["a", "b"]) == "['a', 'b']"
    assert some(range(5), 2) == "['0', '1'] and 3 more"


def test_a_value_that_is_given_comes_back_and_none_is_an_error():
    value = [1]
    assert given("numbers", value) is value
    # Only None is missing: what is empty or 0 is a value.
    assert given("number", 0) == 0
    with pytest.raises(ValueError, match="^expected perturbation_features, found None$"):
        given("perturbation_features", None)


def test_a_list_with_commas_is_told_how_to_write_it():
    hint = closest("NK,CD14+ Mono", ["NK", "CD14+ Mono", "B"])
    assert (
        hint == "write several names apart, with spaces between (NK 'CD14+ Mono'); in YAML, as a list [NK, CD14+ Mono]"
    )
    # A name that holds a comma is a name.
    assert closest("CD4 T, naive", ["CD4 T, naiv", "B"]) == "did you mean 'CD4 T, naiv'?"


@pytest.mark.parametrize(
    "number, noun, words",
    [(1, "context", "1 context"), (0, "cell", "0 cells"), (2, "batch", "2 batches"), (1, "batch", "1 batch")]
    + [(12345, "training group", "12,345 training groups")],
)
def test_counted_nouns_agree_with_their_number(number, noun, words):
    assert counted(number, noun) == words
