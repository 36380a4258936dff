"""Values travel between processes as numbers, and their form only once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eventtrain.callbacks.distributed.compact import KEY, Forms, NotPlainError, joined, split

ENTRY = {"name": "loss", "on_step": False, "total": torch.tensor(0.1), "weight": 3.0, "options": [True, None, "mean"]}


class Group:
    """Processes that exchange values one after the other.

    Args:
        world_size: Their number.

    Attributes:
        messages: The contents of each exchange, by rank.
    """

    def __init__(self, world_size: int) -> None:
        self.forms = [Forms() for _ in range(world_size)]
        self.messages: list[list[bytes]] = []

    def exchange(self, *values: Any) -> list[Any]:
        """Let each process exchange its value; return the values that each of them gets."""
        rounds: list[list[bytes]] = []
        for _ in range(3):  # each round is played again with the contents that are known so far
            results = []
            sent: list[list[bytes]] = [[] for _ in values]
            for rank, value in enumerate(values):
                results.append(self.play(rank, value, rounds, sent[rank]))
            if all(len(each) == len(rounds) for each in sent):
                break
            rounds.append([each[len(rounds)] for each in sent])
        self.messages += rounds
        return results

    def play(self, rank: int, value: Any, rounds: list[list[bytes]], sent: list[bytes]) -> Any:
        known = dict(self.forms[rank]._known)

        class More(Exception):
            pass

        def gather(content: bytes) -> list[bytes]:
            sent.append(content)
            if len(sent) > len(rounds):
                raise More
            return rounds[len(sent) - 1]

        try:
            return self.forms[rank].exchange(value, gather)
        except More:
            self.forms[rank]._known = known
            return None


def same(first: Any, second: Any) -> bool:
    """Return whether two values are equal to the bit, with their types."""
    return repr(first) == repr(second)


def test_names_travel_once() -> None:
    group = Group(2)
    for weight in (1.0, 2.0, 3.0):
        mine, theirs = [{**ENTRY, "weight": weight}], [{**ENTRY, "name": "other", "weight": -weight}]
        for received in group.exchange(mine, theirs):
            assert same(received, [mine, theirs])
    sizes = [[len(content) for content in message] for message in group.messages]
    assert [size == [KEY + 16, KEY + 16] for size in sizes] == [True, False, True, True], "numbers, forms, numbers, numbers"


def test_a_new_name_in_one_process_is_told_to_all() -> None:
    group = Group(3)
    group.exchange([ENTRY], [ENTRY], [ENTRY])
    group.messages.clear()
    more = [ENTRY, {**ENTRY, "name": "new"}]
    for received in group.exchange([ENTRY], more, []):
        assert same(received, [[ENTRY], more, []])
    assert len(group.messages) == 2
    group.messages.clear()
    for received in group.exchange(more, [], [ENTRY]):
        assert same(received, [more, [], [ENTRY]])
    assert len(group.messages) == 1, "all processes know the forms of all"


@pytest.mark.parametrize(
    "value",
    [
        None, 3, True, "text", 0.1, float("inf"), -0.0, [], {}, (1, 2.0), {"a": [0.5, {"b": None}], 2: (1.5,)},
        torch.tensor(1 / 3), torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(1 / 3, dtype=torch.bfloat16),
        [torch.tensor(float("nan"))], torch.tensor(7), torch.ones(2, 3), [torch.zeros(1), "x", 2.5], {1, 2}, b"bytes", range(3),
    ],
)  # fmt: skip
def test_any_value_arrives_as_it_was(value: Any) -> None:
    group = Group(2)
    for _ in range(2):
        for received in group.exchange(value, 1.0):
            assert same(received, [value, 1.0])


def test_only_plain_values_have_a_form() -> None:
    numbers: list[float] = []
    form = split({"a": 1, "b": 2.0, "c": torch.tensor(3.0)}, numbers)
    assert numbers == [2.0, 3.0] and form["a"] == 1
    with pytest.raises(NotPlainError):
        split([torch.ones(2)], numbers)
    assert same(joined([1, "x"], b""), [1, "x"])
