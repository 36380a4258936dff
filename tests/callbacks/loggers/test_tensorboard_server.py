"""TensorBoard's server shows the logged runs."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from eventtrain.callbacks import TensorBoardLogger
from tests.callbacks.loggers.logged import Drawn, fit, histograms, points, single


class Pictures(Drawn):
    def on_train_epoch_end(self) -> None:
        self.trainer.callback(TensorBoardLogger).writer.add_image("picture", torch.zeros(1, 4, 4), self.global_step)


class Shown:
    """Two runs with different hyperparameters, the second one resumed after a crash, and a server of their directory."""

    def __init__(self, root: Path) -> None:
        options: dict[str, Any] = {"logger": {"log_graph": True, "histograms": 2}}
        self.first = fit(root, model=Pictures(), **options)
        fit(root, model=Pictures(), fails_at=7, **options)
        resumed = Pictures()
        resumed.rate = resumed.hparams["rate"] = 0.002
        self.second = fit(root, model=resumed, ckpt_path=root / "epoch_0.ckpt", **options)
        self.loggers = {"version_0": self.first[0], "version_1": self.second[0]}
        self.address = ""

    def ask(self, path: str, content: Any = None, **query: Any) -> Any:
        url = f"{self.address}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the imports of TensorBoard's server
        from tensorboard import program  # type: ignore[import-untyped]

        servers: list[Any] = []

        def serve(application: Any, flags: Any) -> Any:
            servers.append(program.WerkzeugServer(application, flags))
            return servers[0]

        root = tmp_path_factory.mktemp("shown")
        shown = Shown(root)
        board = program.TensorBoard(server_class=serve)
        # Everything is read before the server starts, so that no test waits.
        once = ["--load_fast=false", "--reload_task=blocking", "--reload_interval=0"]
        board.configure(
            argv=["tensorboard", "--logdir", str(root / "runs" / "Pictures"), "--host=127.0.0.1", "--port=0", *once]
        )
        shown.address = board.launch()
    yield shown
    servers[0].shutdown()
    servers[0].server_close()


def test_the_server_shows_the_scalars_of_all_runs_side_by_side(shown: Shown) -> None:
    tags = shown.ask("scalars/tags")
    assert tags.keys() == shown.loggers.keys()
    for run, logger in shown.loggers.items():
        for tag in tags[run]:
            served = [(step, value) for _, step, value in shown.ask("scalars/scalars", run=run, tag=tag)]
            assert served == points(logger, tag)
        assert set(tags[run]) == {"loss", "size", "val", "epoch"}
    assert [step for _, step, _ in shown.ask("scalars/scalars", run="version_1", tag="loss")] == list(range(1, 9))
    assert [value for _, _, value in shown.ask("scalars/scalars", run="version_0", tag="loss")] == [
        single(loss) for loss in shown.first[1].losses
    ]


def test_the_server_shows_hyperparameters_beside_metrics(shown: Shown) -> None:
    experiment = shown.ask("hparams/experiment", {"experimentName": "", "includeMetrics": True})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"optimizers", "rate"}
    columns = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert columns == set(shown.ask("scalars/tags")["version_0"])

    statuses = [f"STATUS_{status}" for status in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    question = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 10}
    groups = {group["name"]: group for group in shown.ask("hparams/session_groups", question)["sessionGroups"]}
    assert groups["version_0"]["hparams"] == {"optimizers": 1.0, "rate": 0.01}
    for run, logger in shown.loggers.items():
        values = {each["name"]["tag"]: (each["trainingStep"], each["value"]) for each in groups[run]["metricValues"]}
        assert values == {tag: points(logger, tag)[-1] for tag in columns}
        assert [session["status"] for session in groups[run]["sessions"]] == ["STATUS_SUCCESS"]


def test_the_server_shows_histograms_pictures_graph_and_text(shown: Shown) -> None:
    for run, logger in shown.loggers.items():
        tags = shown.ask("histograms/tags")[run]
        assert {"parameters/layers.0.weight", "gradients/layers.0.weight"} <= set(tags)
        served = shown.ask("histograms/histograms", run=run, tag="gradients/layers.0.weight")
        assert [step for _, step, _ in served] == list(histograms(logger, "gradients/layers.0.weight")) == [2, 4, 6, 8]
        assert list(shown.ask("images/tags")[run]) == ["picture"]
        assert [image["step"] for image in shown.ask("images/images", run=run, tag="picture", sample=0)] == [4, 8]
        assert shown.ask("graphs/info")[run]["run_graph"]
        parts = [f"run/{part}/text_summary" for part in ("environment", "configuration", "module")]
        assert sorted(shown.ask("text/tags")[run]) == sorted(parts)
        (first, *_) = shown.ask("text/text", run=run, tag=parts[1])
        assert "<table>" in first["text"] and "max_epochs" in first["text"]
