"""Two processes train like a hand-written loop with torch's wrapper, make the same decisions, and share a checkpoint.

The script ``checks.py`` runs once in two processes and saves its results; most of these tests look at them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eventtrain import MisconfigurationError, Trainer
from eventtrain.callbacks import GradientAccumulation
from eventtrain.callbacks.distributed.distributed_data_parallel import DistributedDataParallel
from eventtrain.callbacks.distributed.processes import ENVIRONMENT
from tests.callbacks.distributed.launch import HERE, ROOT, result, start
from tests.callbacks.distributed.parts import Model, Weighted, loader, resumable, state, weighted_batches
from tests.kit import Line, On, train
from tests.resuming import equal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of each check, on rank zero and on rank one."""
    start(HERE / "checks.py", folder)
    return [result(folder, rank) for rank in range(2)]


def trained(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors that are the same on all ranks: all but the statistics of batch norm, which differ."""
    return {name: value for name, value in state["module"].items() if "running" not in name}


# ------------------------------------------------------------------ training


def test_automatic_optimization_equals_a_loop_by_hand_with_the_wrapper(results: list[Any]) -> None:
    for rank in results:
        assert equal(rank["automatic"]["ours"], rank["automatic"]["by hand"])
    (first, _), (second, _) = (rank["automatic"]["ours"] for rank in results)
    assert equal(trained(first), trained(second))


def test_gradients_are_exchanged_once_per_window(results: list[Any]) -> None:
    for rank in results:
        counted = rank["automatic"]
        assert counted["batches"] == 5  # windows of 3 and 2
        assert counted["all-reduces"] == counted["updates"] == 3 * 2
        assert counted["estimated"] == 3 * 2, "of this process's batches, not of all"


def by_samples(batches: list[Any], window: int) -> nn.Linear:
    """Train in one process on the batches of all ranks, by the mean over the samples of each window."""
    net = Weighted().net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for begin in range(0, len(batches), window):
        xs, ys, weights = zip(*batches[begin : begin + window], strict=True)
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(net(torch.cat(xs)), torch.cat(ys), reduction="sum") / sum(weights))
        optimizer.step()
    return net


def test_a_window_counts_by_the_weights_of_all_ranks(results: list[Any]) -> None:
    alone = Weighted()
    train(alone, weighted_batches(), GradientAccumulation(6))
    by_hand = by_samples(weighted_batches(), 6)
    for rank in results:
        for name, value in rank["weighted"].items():
            assert torch.allclose(value, alone.get_parameter(name), atol=1e-6)
            assert torch.allclose(value, by_hand.get_parameter(name.removeprefix("net.")), atol=1e-6)


def test_manual_optimization_equals_a_loop_by_hand(results: list[Any]) -> None:
    for rank in results:
        assert equal(rank["manual"]["ours"], rank["manual"]["by hand"])
    assert equal(results[0]["manual"]["ours"]["module"], results[1]["manual"]["ours"]["module"])


def test_a_window_whose_last_batch_is_skipped_is_averaged_too(results: list[Any]) -> None:
    by_hand = by_samples(weighted_batches()[:3], 3)
    assert equal(results[0]["skipped"], results[1]["skipped"])
    for name, value in results[0]["skipped"].items():
        assert torch.allclose(value, by_hand.get_parameter(name.removeprefix("net.")), atol=1e-6)


def test_an_overflow_on_one_rank_skips_the_step_on_all(results: list[Any]) -> None:
    assert equal(results[0]["overflow"], results[1]["overflow"])
    assert results[0]["overflow"]["skipped"] == ["overflow"]
    assert results[0]["overflow"]["scale"] == 512.0
    assert results[0]["overflow"]["updates"] == 2


def test_shares_of_unequal_lengths_end_together(results: list[Any]) -> None:
    assert equal(results[0]["unequal"], results[1]["unequal"])
    for counts in results[0]["unequal"]:  # two epochs of five batches: windows of 2, 2 and 1
        assert counts["updates"] == counts["all-reduces"] == 6


def test_a_thawed_layer_is_averaged_and_all_ranks_begin_with_rank_zeros_weights(results: list[Any]) -> None:
    assert equal(results[0]["thawed"], results[1]["thawed"])
    frozen, thawed = results[0]["thawed"]["firsts"]
    assert not torch.equal(frozen, thawed)


def test_a_layer_that_is_frozen_or_thawed_within_an_epoch_is_averaged_as_by_hand(results: list[Any]) -> None:
    assert len(results[0]["changed"]) == 18
    for (first, by_hand), (second, _) in zip(*(rank["changed"] for rank in results), strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first, by_hand, atol=1e-6)


def test_steps_of_ones_own_are_averaged_as_by_hand(results: list[Any]) -> None:
    for (first, by_hand), (second, _) in zip(*(rank["own_steps"] for rank in results), strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first, by_hand, atol=1e-6)


def test_the_wrapper_is_released_when_the_run_ends(results: list[Any]) -> None:
    assert all(rank["thawed"]["released"] for rank in results)


# ------------------------------------------------------------------ decisions and metrics


def test_values_of_a_step_are_reduced_if_asked_and_values_of_an_epoch_always(results: list[Any]) -> None:
    for index, rank in enumerate(results):
        values = rank["logged"]["values"]
        steps = [each for each in values if "own" in each][:3]
        assert [each["own"] for each in steps] == [10.0 * index + at for at in range(3)]
        assert [each["mean"] for each in steps] == [5.0, 6.0, 7.0]
        assert [each["max_step"] for each in steps] == [10.0, 11.0, 12.0]
        epoch = next(each for each in values if "epoch" in each)
        assert epoch["max_epoch"] == 12.0
        assert epoch["sum"] == 36.0
        assert epoch["epoch"] == pytest.approx((1 * 3 + 3 * 33) / 12)  # by the samples that each rank says it has


def test_all_ranks_make_the_same_decisions_for_schedulers_and_stopping(results: list[Any]) -> None:
    first, second = (rank["logged"] for rank in results)
    assert first["epochs"] == second["epochs"] == 4  # "val" is 0, 1, 2, 3, and -0, -1, -2, -3 on rank zero
    assert first["lr"] == second["lr"] == pytest.approx(1e-3)


def test_each_sample_is_evaluated_once(results: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator)[:, 0]
    both = [rank["evaluation"] for rank in results]
    assert both[0]["within fit"] == both[1]["within fit"]
    assert both[0]["within fit"]["samples"] == 7
    assert both[0]["within fit"]["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert both[0]["within fit"]["metric"] == pytest.approx(float(values.mean()), abs=1e-6)
    assert sorted(both[0]["seen"] + both[1]["seen"]) == pytest.approx(sorted(values.tolist()))
    assert [len(each["seen"]) for each in both] == [4, 3]
    assert [each["validated"]["samples"] for each in both] == [9, 9]
    assert [each["tested"]["samples"] for each in both] == [5, 5]
    assert [len(each["seen later"]) for each in both] == [5 + 3, 4 + 2]
    assert [len(each["predicted"]) for each in both] == [5, 4]


def test_evaluation_uses_rank_zeros_statistics(results: list[Any]) -> None:
    first, second = (rank["evaluation"]["statistics"] for rank in results)
    assert len(first) == 2
    assert equal(first, second)


def test_averaged_statistics_are_rank_zeros_in_either_order_of_attachment(results: list[Any]) -> None:
    (first, other_order), (second, second_in_other_order) = (rank["averaged"] for rank in results)
    assert first == other_order
    assert second == second_in_other_order
    *metrics, statistics = first
    *metrics_on_rank_one, statistics_of_rank_one = second
    assert metrics == metrics_on_rank_one
    assert [each["statistics"] for each in metrics] == [statistics] * 2
    assert statistics != statistics_of_rank_one


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("run", ["resumed", "finetuned"])
def test_a_run_resumes_exactly_from_each_safe_point(results: list[Any], run: str) -> None:
    for rank in results:
        assert len(rank[run]["resumed"]) == 2 * (4 + 1)  # after each batch but the last, and at the epoch's end
        for resumed in rank[run]["resumed"]:
            assert equal(resumed["optimizers"], rank[run]["undisturbed"]["optimizers"])
            assert equal(trained(resumed), trained(rank[run]["undisturbed"]))
    for resumed in results[0][run]["resumed"]:
        assert equal(resumed, results[0][run]["undisturbed"])  # with its statistics
    [optimizer] = results[0][run]["undisturbed"]["optimizers"]
    assert len(optimizer["param_groups"]) == 1 + (run == "finetuned")


def test_only_rank_zero_writes_checkpoints(results: list[Any]) -> None:
    assert all(results[0]["resumed"]["written"])
    assert not any(results[1]["resumed"]["written"])


def test_one_process_resumes_the_run_of_two(results: list[Any], folder: Path) -> None:
    # After the fifth batch an epoch is over; after the third a window, where 12 of 20 samples were trained.
    for index in (4, 2):
        module = Model()
        trainer, batches = resumable()
        indices: list[int] = []
        trainer.signals.train_batch_end.connect(
            lambda trainer, event, indices=indices: indices.append(event.batch_idx), weak=False
        )
        trainer.fit(module, batches, ckpt_path=folder / f"resume-{index}-rank-0.ckpt")
        assert indices == ([] if index == 4 else [6, 7, 8, 9]) + list(range(10))
        assert trainer.current_epoch == 2


def test_one_process_cannot_resume_an_open_window_of_two(results: list[Any], folder: Path) -> None:
    trainer, batches = resumable()
    with pytest.raises(MisconfigurationError, match="written by 2 processes in an open accumulation window"):
        trainer.fit(Model(), batches, ckpt_path=folder / "resume-1-rank-0.ckpt")


@pytest.mark.slow
def test_a_run_resumes_after_one_of_its_processes_was_killed(results: list[Any], tmp_path: Path) -> None:
    start(HERE / "elastic.py", tmp_path, options=("--max-restarts", "1"))
    for rank, checks in enumerate(results):
        restarted = result(tmp_path, rank)
        assert restarted["trained"] == [6, 7, 8, 9]
        assert equal(restarted["state"]["optimizers"], checks["resumed"]["undisturbed"]["optimizers"])
        assert equal(trained(restarted["state"]), trained(checks["resumed"]["undisturbed"]))


def test_a_signal_to_one_rank_ends_all_at_a_safe_point(results: list[Any]) -> None:
    for rank in results:
        assert rank["preempted"] == {"batches": 3, "saved": True}, "one batch later"


def test_one_rank_ends_the_run_or_the_epoch_for_all(results: list[Any]) -> None:
    for rank in results:
        stopped, *ended = rank["stopped"]
        assert stopped == (1, 6 + 4), "one batch later"
        assert ended == [(3, 6 + 4 + 6)] * 2


# ------------------------------------------------------------------ one process


def test_a_single_process_trains_as_without_the_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    states = []
    for callbacks in ([], [DistributedDataParallel()]):
        torch.manual_seed(1)
        module = Model()
        trainer = Trainer(callbacks=callbacks, max_epochs=2, device="cpu")
        trainer.fit(module, loader(22))
        states.append(state(module, trainer.optimizers))
        assert trainer.world_size == 1
    assert equal(*states)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_single_process_does_not_call_the_handlers_of_steps(monkeypatch: pytest.MonkeyPatch, automatic: bool) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    listeners: list[Any] = []

    def copy_listeners(trainer: Any, event: Any) -> None:
        signals = trainer.signals
        listeners.append((signals.before_forward.listeners, signals.reduce_gradients.listeners))

    callback = DistributedDataParallel()
    trainer = train(Line(automatic=automatic), [torch.ones(2, 1)], callback, On(train_batch_end=copy_listeners))
    assert listeners == [((), ())]
    assert trainer.signals.before_forward.attached() == [callback.on_before_forward]


# ------------------------------------------------------------------ errors


def test_a_run_that_would_wait_forever_is_refused(results: list[Any]) -> None:
    for rank in results:
        line_search, batches, sparse = rank["refused"]
        assert "LBFGS decides by the loss" in line_search
        assert "the train loader (list" in batches
        assert "shares_data=False" in batches
        assert "sparse gradients in manual optimization" in sparse


@pytest.mark.slow
def test_the_example_runs_in_two_processes_as_in_one(tmp_path: Path) -> None:
    example = ROOT / "examples" / "distributed.py"
    options = ("--epochs", "2", "--log-dir", tmp_path)
    (_, two, _), (_, one, _) = (start(example, *options, processes=count).splitlines() for count in (2, 1))
    assert two == "processes 2, updates 40"
    assert one == "processes 1, updates 40"
