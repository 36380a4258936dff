"""Requests, vetoes and batches without a loss in several processes, and how often they wait for each other for these."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain.callbacks.distributed.processes import ENVIRONMENT
from tests.callbacks.distributed.agreements import FEW, LOSSES, REQUESTS, SKIPS, asked_at
from tests.callbacks.distributed.launch import HERE, result, start

Results = list[dict[str, Any]]


def started(folder: Path, processes: int, *options: str) -> Results:
    start(HERE / "agreements.py", folder, *options, processes=processes)
    return [result(folder, rank) for rank in range(processes)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return started(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return started(tmp_path_factory.mktemp("few"), 2, "few")


@pytest.fixture(scope="module")
def results_of_four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return started(tmp_path_factory.mktemp("four"), 4)


# Events after which all processes meet, so that a request of one of them holds at once.
AT_ONCE = ("fit_start", "train_start", "train_epoch_start", "train_epoch_end")
IN_VALIDATION = ("validation_start", "validation_batch_end", "validation_end")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "ask"), REQUESTS)
def test_a_request_of_one_process_holds_in_all_one_batch_later(results: Results, place: str, ask: str) -> None:
    one, of_all = (results[0][askers][place, ask] for askers in ("one", "all"))
    assert all(rank["one"][place, ask] == one for rank in results)
    at_once = place in (*AT_ONCE, *IN_VALIDATION, "train_batch_start")
    assert one[:3] == (of_all[0] + (not at_once), of_all[1], of_all[2] + (not at_once))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "ask"), REQUESTS)
def test_a_request_of_all_processes_holds_where_it_does_in_one_process(
    results: Results, place: str, ask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    expected = asked_at(tmp_path, place, ask, "all")
    assert [rank["all"][place, ask] for rank in results] == [expected] * 2


@pytest.mark.slow
def test_an_epoch_that_is_ended_before_a_batch_ends_after_it_if_only_some_processes_ask(results: Results) -> None:
    for rank in results:
        assert rank["all"]["train_batch_start", "gate"] == (11, 2, 11, False), "its fourth batch is not trained"
        assert rank["one"]["train_batch_start", "gate"] == (11, 2, 12, False), "its fourth batch is trained"


@pytest.mark.slow
def test_one_process_interrupts_all_one_batch_later(results: Results) -> None:
    for rank, place in itertools.product(results, ("train_batch_end", "safe_point")):
        assert rank["one"][place, "interrupt"] == (4, 0, 5, True)
        assert rank["all"][place, "interrupt"] == (3, 0, 4, True)


@pytest.mark.slow
def test_a_request_in_an_open_window_holds_at_the_latest_when_one_closes(few: Results) -> None:
    first, second = (rank["one"]["window"] for rank in few)
    assert first == second and 4 <= first[0] <= 7
    assert all(rank["all"]["window"] == (3, 0, 1, True) for rank in few)


@pytest.mark.slow
def test_one_process_ends_the_run_or_the_epoch_for_all(few: Results) -> None:
    for rank in few:
        assert [rank["one"][case][0] for case in FEW] == [4, 4, 7, 11]
        assert [rank["all"][case][0] for case in FEW] == [3, 3, 7, 11]


WAYS = ("without losses", "on the device")
"""How the counts of a window are told: in notices, or as on devices whose reduction the host does not wait for."""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [("many", 1, False), ("many", 4, True)])
def test_processes_without_a_loss_take_part_in_the_reduction_of_the_others(few: Results, case: Any, way: str) -> None:
    same_on_all_ranks_and_as_by_hand(few, case, way)


CASES = [*LOSSES, *itertools.product(SKIPS, (1, 4), (False, True))]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_a_window_is_the_mean_over_the_batches_of_all_processes_that_have_a_loss(results: Results, case: Any, way: str) -> None:
    same_on_all_ranks_and_as_by_hand(results, case, way)


def same_on_all_ranks_and_as_by_hand(results: Results, case: Any, way: str) -> None:
    trained, by_hand, _ = results[0][way][case]
    assert torch.allclose(trained, by_hand, atol=1e-6)
    for rank in results:
        assert torch.equal(rank[way][case][0], trained), "all processes have the same bits"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_an_update_is_skipped_if_no_process_has_a_loss(results: Results, way: str) -> None:
    for rank, window in itertools.product(results, (1, 4)):
        updates = {name: rank[way][name, window, False][2] for name in ("all", "all in one window", "many")}
        assert updates == {"all": 0, "all in one window": 4 if window == 1 else 1, "many": 7 if window == 1 else 2}


@pytest.mark.slow
def test_four_processes_agree_too(results_of_four: Results) -> None:
    for case, way in itertools.product(CASES, WAYS):
        same_on_all_ranks_and_as_by_hand(results_of_four, case, way)
    for askers in ("one", "all"):
        for case, end in results_of_four[0][askers].items():
            assert all(rank[askers][case] == end for rank in results_of_four), case


@pytest.mark.slow
def test_a_checkpoint_by_the_clock_of_one_process_is_written_by_all_in_the_same_batch(few: Results) -> None:
    for case, (noted, files) in few[0]["minutes"].items():
        assert few[1]["minutes"][case] == (noted, files)
        (batch, is_ending), *end = noted
        count, _, window = case
        if count > 1:
            assert batch == 2, "where it is in one process"
        elif window == 1:
            assert batch == 3, "one batch later"
        else:
            assert 3 <= batch <= 7
        assert end == ([] if is_ending else [(7, True)]), "and not again before its time"


@pytest.mark.slow
def test_manual_optimization_averages_by_one_exchange_and_leaves_missing_gradients_missing(few: Results) -> None:
    for rank in few:
        trained, by_hand, has_gradient, exchanges = rank["manual"]
        assert torch.equal(trained, by_hand)
        assert has_gradient == [True, True, True, False] and exchanges == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", ["none", "accumulation", "typical", "fp16"])
def test_no_batch_of_training_exchanges_anything_but_gradients(few: Results, callbacks: str) -> None:
    for rank in few:
        assert rank["exchanges"][callbacks] == [(0, 0)] * 11
