"""ModelSummary counts the parameters of a module's parts and measures their inputs and outputs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import LightningModule, MisconfigurationError, Trainer
from eventtrain.callbacks import ProgressBar
from eventtrain.callbacks.monitoring.model_summary import Counts, ModelSummary, Summary, summarize
from eventtrain.distributed import SingleProcess
from tests.kit import new_trainer, train


class Net(LightningModule):
    """Has parts in parts, a frozen part, a part without parameters, and a direct parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
        self.head = nn.Linear(3, 2).requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x)) * self.temperature
        return output

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch).mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def cells(summary: Summary) -> dict[str, tuple[int, int, int]]:
    """Return the counts of parameters, trainable parameters and buffers, by the row's name."""
    return {row.name: (row.counts.parameters, row.counts.trainable, row.counts.buffers) for row in summary.rows}


# ------------------------------------------------------------------ counts


def test_there_is_a_row_for_each_direct_part_and_for_direct_parameters() -> None:
    summary = summarize(Net())
    assert cells(summary) == {"(itself)": (1, 1, 0), "body": (21, 21, 7), "head": (8, 0, 0)}
    assert [row.kind for row in summary.rows] == ["Net", "Sequential", "Linear"]
    assert (summary.total.parameters, summary.total.trainable, summary.total.frozen) == (30, 22, 8)


def test_a_depth_of_minus_one_shows_all_parts() -> None:
    assert cells(summarize(Net(), -1)) == {
        "(itself)": (1, 1, 0),
        "body": (21, 21, 7),
        "body.0": (15, 15, 0),
        "body.1": (6, 6, 7),
        "body.2": (0, 0, 0),
        "head": (8, 0, 0),
    }
    assert cells(summarize(Net(), 2)) == cells(summarize(Net(), -1))


def test_a_depth_of_zero_shows_only_the_totals() -> None:
    summary = summarize(Net(), 0)
    assert summary.rows == [] and summary.total == summarize(Net(), -1).total
    assert str(summary).splitlines()[:2] == ["Net", "30 parameters, 22 trainable and 8 frozen"]


def test_a_module_without_direct_parameters_has_no_row_for_itself() -> None:
    assert list(cells(summarize(nn.Sequential(nn.Linear(1, 1))))) == ["0"]


def test_a_direct_buffer_has_a_row() -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    module.register_buffer("steps", torch.zeros(5, dtype=torch.int64))
    summary = summarize(module)
    assert cells(summary) == {"(itself)": (0, 0, 5), "0": (2, 2, 0)}
    assert summary.total.buffer_bytes == 40


def test_a_module_without_parts_or_parameters_has_no_rows() -> None:
    summary = summarize(nn.ReLU())
    assert (summary.rows, summary.total) == ([], Counts())
    assert "0 parameters" in str(summary)


def test_memory_depends_on_the_type_of_the_numbers() -> None:
    module = nn.ModuleDict(
        {
            "in_double": nn.Linear(10, 10, bias=False, dtype=torch.float64),
            "in_single": nn.Linear(10, 10, bias=False),
            "in_half": nn.Linear(10, 10, bias=False, dtype=torch.bfloat16).requires_grad_(False),
        }
    )
    summary = summarize(module)
    assert [row.counts.parameter_bytes for row in summary.rows] == [800, 400, 200]
    assert [row.counts.gradient_bytes for row in summary.rows] == [800, 400, 0]
    assert (summary.total.parameter_bytes, summary.total.gradient_bytes) == (1400, 1200)
    assert "0.001 MB of parameters, 0.001 MB of their gradients, 0.000 MB of buffers" in str(summary)


# ------------------------------------------------------------------ shared parameters


def test_tied_parameters_count_once_in_the_totals_and_in_the_row_of_each_part() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "middle": nn.Linear(4, 4), "head": nn.Linear(4, 10)})
    module["head"].weight = module["embedding"].weight
    summary = summarize(module)
    assert cells(summary) == {"embedding": (40, 40, 0), "middle": (20, 20, 0), "head": (50, 50, 0)}
    assert summary.total.parameters == 70
    assert [row.shares for row in summary.rows] == [True, False, True]
    assert "40*" in str(summary) and "*: shared" in str(summary)


def test_parameters_tied_within_one_part_count_once_there_and_are_not_shared_with_others() -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    summary = summarize(nn.Sequential(tied, nn.Linear(1, 1)), -1)
    assert cells(summary) == {"0": (9, 9, 0), "0.0": (9, 9, 0), "0.1": (9, 9, 0), "1": (2, 2, 0)}
    assert [row.shares for row in summary.rows] == [False, True, True, False]
    assert summary.total.parameters == 11
    assert "*" not in str(summarize(nn.Sequential(tied)))


def test_a_part_with_two_names_has_two_rows() -> None:
    layer = nn.Linear(2, 2)
    summary = summarize(nn.Sequential(layer, nn.ReLU(), layer), example_input=torch.ones(1, 2))
    assert cells(summary) == {"0": (6, 6, 0), "1": (0, 0, 0), "2": (6, 6, 0)}
    assert summary.total.parameters == 6 and [row.shares for row in summary.rows] == [True, False, True]
    assert [row.sizes for row in summary.rows] == [("[1, 2]", "[1, 2]")] * 3


def test_a_parameter_of_a_part_may_also_be_a_direct_one() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module.weight = module[0].weight
    summary = summarize(module)
    assert [(row.name, row.shares) for row in summary.rows] == [("(itself)", True), ("0", True)]
    assert summary.total.parameters == 6


# ------------------------------------------------------------------ lazy and compiled modules


def test_lazy_modules_are_shown_with_a_question_mark_and_stay_lazy() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3), nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(1, 1)))
    summary = summarize(module, -1, example_input=torch.ones(2, 4))
    assert cells(summary)["1"] == (0, 0, 0) and cells(summary)["2"] == (2, 2, 1)
    assert summary.total.parameters == 22 and summary.total.uninitialized == 6
    assert summary.sizes is None, "a forward would initialize them"
    lazy = module[1]
    assert isinstance(lazy, nn.LazyLinear) and lazy.has_uninitialized_params()
    text = str(summary)
    assert [line.split()[2] for line in text.splitlines() if line.startswith(("1 ", "2.0 "))] == ["?", "?"]
    assert "2 + ?" in text and "?: lazy modules; 6 tensors" in text


def test_lazy_modules_that_are_initialized_are_like_any_other() -> None:
    module = nn.Sequential(nn.LazyLinear(3))
    module(torch.ones(1, 4))
    assert cells(summarize(module)) == {"0": (15, 15, 0)} and "?" not in str(summarize(module))


def test_compiled_modules_are_shown_as_the_original_ones() -> None:
    inner: Any = torch.compile(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), backend="eager")
    module: Any = torch.compile(nn.Sequential(nn.Linear(2, 2), inner), backend="eager")
    summary = summarize(module, -1, example_input=torch.ones(3, 2))
    assert summary.kind == "Sequential (compiled)" and summary.total.parameters == 16
    assert [(row.name, row.kind) for row in summary.rows] == [
        ("0", "Linear"),
        ("1", "Sequential (compiled)"),
        ("1.0", "Linear"),
        ("1.1", "BatchNorm1d"),
    ]
    assert [row.sizes for row in summary.rows] == [("[3, 2]", "[3, 2]")] * 4
    assert not any(row.shares for row in summary.rows)
    assert list(cells(summarize(module))) == ["0", "1"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_module_is_run_without_being_compiled_and_compiles_afterwards(in_place: bool) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    part: Any = Scaled()
    if in_place:
        part.compile(backend=backend)
    else:
        part = torch.compile(part, backend=backend)
    module = nn.Sequential(part)
    summary = summarize(module, example_input=torch.ones(3, 2))
    assert summary.rows[0].kind == "Scaled (compiled)" and summary.rows[0].sizes == ("[3, 2]", "[3, 2]")
    assert graphs == []
    module(torch.ones(3, 2))
    assert len(graphs) == 1


# ------------------------------------------------------------------ sizes of inputs and outputs


def test_each_part_has_the_sizes_of_its_inputs_and_outputs() -> None:
    summary = summarize(Net(), -1, example_input=torch.ones(5, 4))
    assert summary.sizes == ("[5, 4]", "[5, 2]")
    assert {row.name: row.sizes for row in summary.rows} == {
        "(itself)": None,
        "body": ("[5, 4]", "[5, 3]"),
        "body.0": ("[5, 4]", "[5, 3]"),
        "body.1": ("[5, 3]", "[5, 3]"),
        "body.2": ("[5, 3]", "[5, 3]"),
        "head": ("[5, 3]", "[5, 2]"),
    }


class Several(nn.Module):
    """Takes and returns several tensors, and has a part that it does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.unused = nn.Linear(1, 1)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Any]:
        both = self.pair(left, right=[right])
        return {"both": both, "scale": scale}


class Pair(nn.Module):
    def forward(self, left: Tensor, right: list[Tensor]) -> tuple[Tensor, Tensor]:
        return left, right[0]


@pytest.mark.parametrize(
    "example", [(torch.ones(1, 2), torch.ones(3)), {"left": torch.ones(1, 2), "right": torch.ones(3), "scale": 2.0}]
)
def test_sizes_of_several_inputs_and_outputs_are_listed(example: Any) -> None:
    summary = summarize(Several(), example_input=example)
    assert summary.sizes == ("[1, 2], [3]", "[1, 2], [3]")
    assert {row.name: row.sizes for row in summary.rows} == {"pair": ("[1, 2], [3]", "[1, 2], [3]"), "unused": None}


def test_a_part_that_runs_several_times_shows_its_first_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.part(self.part(x)[:1])
            return output

    assert summarize(Twice(), example_input=torch.ones(3)).rows[0].sizes == ("[3]", "[3]")


class Touchy(nn.Module):
    """Shows any trace of a forward: draws random numbers, and changes its buffers in place and by assignment."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout()
        self.frozen = nn.BatchNorm1d(2).eval()
        self.weight = nn.Parameter(torch.ones(2))
        self.calls: Tensor
        self.last: Tensor
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))
        self.fails = fails
        self.graphs: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x[0]
        random.random()
        y: Tensor = self.frozen(self.dropout(self.norm(x * self.weight))) + torch.rand(2)
        self.graphs.append(y.requires_grad or self.norm.training)
        if self.fails:
            raise ValueError("no")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_leaves_no_trace(fails: bool) -> None:
    module = Touchy(fails=fails)
    before = {name: (tensor, tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    flags = {name: part.training for name, part in module.named_modules()}
    states = random.getstate(), torch.get_rng_state()
    if fails:
        with pytest.raises(ValueError, match="no") as raised:
            summarize(module, example_input=torch.ones(4, 2))
        assert raised.value.__notes__ == [
            "raised by a forward of Touchy with its example input, which finds the sizes for a summary. Leave "
            "example_input_array None for a summary without them."
        ]
    else:
        assert summarize(module, example_input=torch.ones(4, 2)).sizes == ("[4, 2]", "[4, 2]")
    assert module.graphs == [False], "in evaluation mode, without gradients"
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])
        assert tensor.grad is None
    assert {name: part.training for name, part in module.named_modules()} == flags
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert not any(part._forward_hooks for part in module.modules())
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------ the table


def test_the_text_is_an_aligned_table() -> None:
    assert str(summarize(Net(), example_input=torch.ones(5, 4))) == (
        "Net: [5, 4] -> [5, 2]\n"
        "name      type        parameters  trainable  buffers     MB  in      out\n"
        "--------  ----------  ----------  ---------  -------  -----  ------  ------\n"
        "(itself)  Net                  1          1        0  0.000\n"
        "body      Sequential          21         21        7  0.000  [5, 4]  [5, 3]\n"
        "head      Linear               8          0        0  0.000  [5, 3]  [5, 2]\n"
        "30 parameters, 22 trainable and 8 frozen\n"
        "0.000 MB of parameters, 0.000 MB of their gradients, 0.000 MB of buffers; the optimizer's state and activations come "
        "on top"
    )


def test_large_numbers_have_separators() -> None:
    text = str(summarize(nn.Sequential(nn.Linear(1000, 2000, device="meta"))))
    assert "2,002,000" in text and "8.008 MB of parameters, 8.008 MB of their gradients" in text


# ------------------------------------------------------------------ the callback


DATA = [torch.ones(5, 4)] * 2


def test_it_prints_at_the_start_of_a_fit(capsys: pytest.CaptureFixture[str]) -> None:
    module = Net()
    train(module, DATA, ModelSummary())
    assert capsys.readouterr().out == f"{summarize(module)}\n"


def test_it_measures_the_example_of_the_module_and_changes_nothing_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    weights: list[Tensor] = []
    for callbacks in ([], [ModelSummary(max_depth=-1)]):
        torch.manual_seed(0)
        module = Net()
        module.body.append(nn.Dropout())
        module.example_input_array = torch.ones(5, 4)
        train(module, DATA, *callbacks)
        weights.append(torch.cat([each.flatten() for each in module.state_dict().values()]))
    assert torch.equal(*weights)
    out = capsys.readouterr().out
    assert out.startswith("Net: [5, 4] -> [5, 2]\n") and "body.3" in out


def test_the_example_is_moved_to_the_device_of_the_run() -> None:
    module = Net().to("meta")
    module.example_input_array = (torch.ones(5, 4),)
    run: Any = SimpleNamespace(module=module, device=torch.device("meta"))
    assert ModelSummary().summary(run).sizes == ("[5, 4]", "[5, 2]")
    assert module.example_input_array[0].device.type == "cpu"


def test_other_ranks_measure_too_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(SingleProcess):
        global_rank, local_rank = 1, 1

    measured: list[Any] = []
    module = Net()
    module.example_input_array = torch.ones(5, 4)
    module.body.register_forward_hook(lambda *args: measured.append(args))
    trainer = new_trainer(ModelSummary(), limit_train_batches=0)
    trainer.processes = Other()
    trainer.fit(module, [torch.ones(5, 4)])
    assert capsys.readouterr().out == "" and len(measured) == 1, "a sharded module's forward needs all ranks"


def test_it_is_printed_beside_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train(Net(), DATA, ProgressBar(), ModelSummary())
    assert "30 parameters" in capsys.readouterr().out


def test_an_evaluation_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Validated(Net):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    new_trainer(ModelSummary()).validate(Validated(), [torch.ones(5, 4)])
    assert capsys.readouterr().out == ""


def test_a_failing_example_ends_the_run_and_names_the_summary() -> None:
    module = Net()
    module.example_input_array = torch.ones(5, 3)
    with pytest.raises(RuntimeError, match="shapes") as raised:
        train(module, DATA, ModelSummary())
    assert [note.split()[2] for note in raised.value.__notes__] == ["a", "ModelSummary.on_fit_start"]


def test_the_policy_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    class OfTheBody(ModelSummary):
        def summary(self, trainer: Trainer) -> Summary:
            assert isinstance(trainer.module, Net)
            return summarize(trainer.module.body)

    train(Net(), DATA, OfTheBody())
    assert capsys.readouterr().out.startswith("Sequential\n")


@pytest.mark.parametrize("depth", [-2, 1.0, "1", True, None])
def test_a_depth_is_a_whole_number_from_minus_one(depth: Any) -> None:
    with pytest.raises(MisconfigurationError, match=r"ModelSummary\(max_depth="):
        ModelSummary(max_depth=depth)
    with pytest.raises(MisconfigurationError, match=r"summarize\(max_depth="):
        summarize(nn.ReLU(), depth)
