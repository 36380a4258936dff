"""Weights that do not fit a module: strict_loading passes over some of them, and errors say how they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eventtrain import LightningModule, MisconfigurationError
from eventtrain.callbacks import ExponentialMovingAverage
from tests.kit import Line, new_trainer, rows


class Adapter(Line):
    """Leaves a pretrained part out of its checkpoints."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        self.pretrained = nn.Linear(1, 1)
        self.pretrained.requires_grad_(False)
        nn.init.constant_(self.pretrained.weight, 7.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if "pretrained" not in name}


class InInit(Adapter):
    strict_loading = True

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False


class AsProperty(Adapter):
    @property
    def strict_loading(self) -> bool:  # type: ignore[override]
        return False


class Strict(Adapter):
    strict_loading = True


LOADS: dict[str, Callable[[type[Adapter], Path], Any]] = {
    "fit": lambda kind, path: new_trainer(max_epochs=2).fit(kind(), rows(1), ckpt_path=path),
    "validate": lambda kind, path: new_trainer().validate(kind(), rows(1), ckpt_path=path),
    "test": lambda kind, path: new_trainer().test(kind(), rows(1), ckpt_path=path),
    "predict": lambda kind, path: new_trainer().predict(kind(), rows(1), ckpt_path=path),
    "load_from_checkpoint": lambda kind, path: kind.load_from_checkpoint(path),
    "load_into": lambda kind, path: ExponentialMovingAverage.load_into(kind(), path),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint without the pretrained weights, from which all but the averages lack them."""
    path = tmp_path_factory.mktemp("adapter") / "adapter.ckpt"
    trainer = new_trainer(ExponentialMovingAverage(0.5))
    trainer.fit(Adapter(), rows(1))
    trainer.save_checkpoint(path)
    return path


@pytest.mark.filterwarnings("ignore:The checkpoint holds state of")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("kind", [Adapter, InInit, AsProperty])
def test_strict_loading_is_honoured_by_all_that_load_a_checkpoint(adapter: Path, load: str, kind: type[Adapter]) -> None:
    LOADS[load](kind, adapter)


@pytest.mark.filterwarnings("ignore:The checkpoint holds state of")
@pytest.mark.parametrize("load", LOADS)
def test_a_strict_module_names_the_file_the_weights_and_the_remedy(adapter: Path, load: str) -> None:
    message = r"adapter\.ckpt is .* another module than Strict\. It lacks 'pretrained\.weight', .*strict_loading = False"
    with pytest.raises(MisconfigurationError, match=message) as caught:
        LOADS[load](Strict, adapter)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_argument_of_load_from_checkpoint_comes_before_the_modules(adapter: Path) -> None:
    module = Strict.load_from_checkpoint(adapter, strict=False)
    assert module.pretrained.weight.item() == 7
    with pytest.raises(MisconfigurationError, match="It lacks"):
        Adapter.load_from_checkpoint(adapter, strict=True)


def test_by_default_loading_is_strict() -> None:
    assert LightningModule().strict_loading is True


# ------------------------------------------------------------------ how weights differ


class Net(LightningModule):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        return None


def refusal(weights: dict[str, Any], module: LightningModule, path: Path) -> str:
    torch.save({"state_dict": weights}, path)
    with pytest.raises(MisconfigurationError) as caught:
        new_trainer().predict(module, [0], ckpt_path=path)
    return str(caught.value)


@pytest.mark.parametrize("strict", [True, False])
def test_other_shapes_are_named_with_and_without_strict_loading(tmp_path: Path, strict: bool) -> None:
    module = Net(a=nn.Linear(1, 2), b=nn.Linear(1, 1))
    module.strict_loading = strict
    text = refusal(Net(a=nn.Linear(3, 2), b=nn.Linear(1, 1)).state_dict(), module, tmp_path / "a.ckpt")
    assert "'a.weight' has the shape (2, 3) in it and (2, 1) in the module" in text
    assert "'b.weight'" not in text and "same hyperparameters" in text and "strict_loading" not in text


def test_weights_that_only_the_file_has_are_named(tmp_path: Path) -> None:
    text = refusal(Net(a=nn.Linear(1, 1), b=nn.Linear(1, 1)).state_dict(), Net(a=nn.Linear(1, 1)), tmp_path / "a.ckpt")
    assert "It has 'b.weight', 'b.bias', which the module does not have." in text
    assert "lacks" not in text


def test_of_many_weights_the_first_are_named(tmp_path: Path) -> None:
    layers = {f"layer{index}": nn.Linear(1, 1) for index in range(5)}
    text = refusal({}, Net(**layers), tmp_path / "a.ckpt")
    assert "It lacks 'layer0.weight', 'layer0.bias', 'layer1.weight', 'layer1.bias' and 6 others." in text


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod."])
def test_a_prefix_of_all_names_is_named(tmp_path: Path, prefix: str) -> None:
    weights = {prefix + name: value for name, value in Net(a=nn.Linear(1, 1)).state_dict().items()}
    text = refusal(weights, Net(a=nn.Linear(1, 1)), tmp_path / "a.ckpt")
    assert f"Its names begin with {prefix!r}: remove that" in text and "strict_loading" not in text


def test_an_error_of_the_modules_own_load_is_not_taken_for_a_difference(tmp_path: Path) -> None:
    class Own(Net):
        def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
            raise RuntimeError("not today")

    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="not today"):
        new_trainer().predict(Own(), [0], ckpt_path=tmp_path / "a.ckpt")


def test_a_lazy_layer_takes_its_shape_from_the_file(tmp_path: Path) -> None:
    torch.save({"state_dict": Net(a=nn.Linear(3, 2)).state_dict()}, tmp_path / "a.ckpt")
    module = Net(a=nn.LazyLinear(2))
    new_trainer().predict(module, [0], ckpt_path=tmp_path / "a.ckpt")
    assert module.get_parameter("a.weight").shape == (2, 3)
    text = refusal({"b": torch.zeros(1)}, Net(a=nn.LazyLinear(2)), tmp_path / "b.ckpt")
    assert "It lacks 'a.weight', 'a.bias'." in text


# ------------------------------------------------------------------ files of other kinds


class Config:
    """A class that a file may name."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Line().state_dict(), r"is a bare state_dict, with the keys 'layer.weight', 'layer.bias'. Load it by `module\.load_st"),
        ({"model": Line().state_dict(), "epoch": 3}, r"holds no 'state_dict', only 'model', 'epoch'. Write its weights"),
        ([1, 2], r"holds a list and no 'state_dict'"),
        (torch.zeros(2), r"holds a Tensor and no 'state_dict'"),
        (nn.Linear(1, 1), r"it holds a torch\.nn\.modules\.linear\.Linear, and only .* no code in a file is run"),
        ({"state_dict": {}, "config": Config()}, r"it holds a tests\.checkpoint\.test_weights\.Config.*weights_only=False"),
    ],
    ids=["bare state_dict", "other keys", "list", "tensor", "module", "configuration"],
)
@pytest.mark.parametrize("load", ["fit", "test", "load_from_checkpoint"])
def test_a_file_of_another_kind_is_named_with_its_content(tmp_path: Path, content: Any, message: str, load: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(MisconfigurationError, match=rf"other\.pt .*{message}"):
        LOADS[load](Adapter, tmp_path / "other.pt")


def test_a_folder_is_named_with_its_files(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationError, match=r"is a folder\. Give a file in it: it has none\."):
        LOADS["fit"](Adapter, tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(MisconfigurationError, match=r"is a folder\. Give a file in it: 'last\.ckpt'\."):
        LOADS["test"](Adapter, tmp_path)


def test_a_checkpoint_of_lightning_is_evaluated_and_not_resumed(tmp_path: Path) -> None:
    content = {"state_dict": Line().state_dict(), "pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {}}
    torch.save(content, tmp_path / "lightning.ckpt")
    new_trainer().test(Line(), rows(1), ckpt_path=tmp_path / "lightning.ckpt")
    with pytest.raises(
        MisconfigurationError, match=r"lightning\.ckpt was written by Lightning 2\.6\.6; .*load_from_checkpoint"
    ):
        new_trainer().fit(Line(), rows(1), ckpt_path=tmp_path / "lightning.ckpt")
