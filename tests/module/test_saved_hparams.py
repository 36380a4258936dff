"""Hyperparameters of every kind come back from a checkpoint, or are left out with one warning."""

from __future__ import annotations

import functools
import json
import math
import warnings
from argparse import Namespace
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from enum import Enum, Flag, IntEnum, auto
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eventtrain import LightningDataModule, LightningModule, MisconfigurationError
from eventtrain.callbacks.loggers.run_files import logged_hparams
from eventtrain.checkpoint import storage
from tests.kit import Line, new_trainer, rows

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Color(Enum):
    RED = "red"


class Size(IntEnum):
    BIG = 3


class Access(Flag):
    READ = auto()
    WRITE = auto()


@dataclass
class Inner:
    root: Path
    color: Color = Color.RED


@dataclass(frozen=True, slots=True)
class Config:
    width: int
    inner: Inner
    area: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", self.width**2)


Point = namedtuple("Point", ["x", "y"])


class ConfigMapping(MutableMapping[str, Any]):
    """A mapping with attributes, as configuration libraries have it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        vars(self)["_content"] = {
            key: ConfigMapping(value) if isinstance(value, Mapping) else value for key, value in values.items()
        }

    def __getattr__(self, name: str) -> Any:
        return self._content[name]

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._content[key] = value

    def __delitem__(self, key: str) -> None:
        del self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


class One(Line):
    """Has one hyperparameter."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.value = value


class Holder(Line):
    """Takes all hyperparameters in one object."""

    def __init__(self, hparams: Any, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters(hparams)
        self.given = hparams


def saved(module: Any, path: str = "m.ckpt", data: Any = None) -> Any:
    """Predict with a module and write a checkpoint; return its plain content."""
    trainer = new_trainer()
    trainer.predict(module, None if data is not None else rows(1), datamodule=data)
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


KEPT: dict[str, Any] = {
    "path": Path("/data/x"),
    "enum": Color.RED,
    "int enum": Size.BIG,
    "flags": Access.READ | Access.WRITE,
    "namespace": Namespace(width=3, root=Path("a")),
    "dataclass": Config(3, Inner(Path("a"))),
    "named tuple": Point(1, Path("b")),
    "float of numpy": np.float32(0.5),
    "integer of numpy": np.int64(7),
    "bool of numpy": np.bool_(True),
    "nested": {"paths": [Path("a"), (Path("b"), None)], 3: {"color": Color.RED}, "set": {1, 2}},
    "frozen set": frozenset({1, 2}),
    "text": "text",
    "nothing": None,
    "dtype": torch.float16,
    "ordered dict": OrderedDict(a=1),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_value_comes_back_with_its_type(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(One(KEPT[kind]))
        loaded = One.load_from_checkpoint("m.ckpt")
    assert loaded.value == KEPT[kind] == loaded.hparams.value
    if kind not in ("float of numpy", "integer of numpy", "bool of numpy", "ordered dict"):
        assert type(loaded.value) is type(KEPT[kind])


def test_a_dataclass_keeps_the_fields_that_it_has_computed() -> None:
    saved(One(Config(3, Inner(Path("a")))))
    assert One.load_from_checkpoint("m.ckpt").value.area == 9


def test_arrays_and_attributes_come_back() -> None:
    values = {"array": np.arange(3.0), "tensor": torch.ones(2), "pure": PurePosixPath("a"), "space": SimpleNamespace(a=1)}
    saved(One(values))
    loaded = One.load_from_checkpoint("m.ckpt").value
    assert isinstance(loaded["array"], np.ndarray) and loaded["array"].tolist() == [0, 1, 2]
    assert loaded["tensor"].tolist() == [1, 1]
    assert loaded["pure"] == Path("a") and loaded["space"].a == 1


def test_the_values_in_the_file_are_plain_to_read() -> None:
    content = saved(One({"root": Path("a"), "color": Color.RED, "config": Inner(Path("b"))}))
    expected = {"root": "a", "color": "red", "config": {"root": "b", "color": "red"}}
    assert content["hyper_parameters"] == {"value": expected}


class Bare:
    pass


LEFT_OUT: dict[str, Any] = {
    "function": math.sqrt,
    "lambda": lambda x: x,
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "class": nn.ReLU,
    "dataclass": Config,
    "module": nn.Linear(1, 1),
    "python module": math,
    "object": Bare(),
    "list of classes": [nn.ReLU, nn.GELU],
    "dict with a function": {"f": math.sqrt},
    "array of objects": np.array([Bare()]),
    "lock": __import__("threading").Lock(),
    "generator": (x for x in [1]),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_code_is_left_out_with_one_warning_and_can_be_given(kind: str) -> None:
    module = One(LEFT_OUT[kind])
    message = r"leave out hyperparameters of One.*value \(.*load_from_checkpoint\(path, value="
    with pytest.warns(UserWarning, match=message) as caught:
        saved(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = saved(module)
    assert len(caught) == 1
    assert content["hyper_parameters"] == {}
    assert module.hparams.value is LEFT_OUT[kind]
    given = One.load_from_checkpoint("m.ckpt", value=LEFT_OUT[kind])
    assert given.value is LEFT_OUT[kind]


def test_one_warning_names_all_that_are_left_out_and_what_is_ignored_is_silent() -> None:
    class Two(Line):
        def __init__(self, act: Any, layer: Any, width: int = 1, ignore: Any = ()) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=[*ignore, "ignore"])

    with pytest.warns(UserWarning, match=r"act \(type\), layer \(Linear\)") as caught:
        assert saved(Two(nn.ReLU, nn.Linear(1, 1)))["hyper_parameters"] == {"width": 1}
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved(Two(nn.ReLU, nn.Linear(1, 1), ignore=["act", "layer"]))
    with pytest.raises(MisconfigurationError, match=r"Two\.__init__ needs act, layer.*load_from_checkpoint\(path, act="):
        Two.load_from_checkpoint("m.ckpt")


def test_a_class_that_is_gone_leaves_an_object_with_attributes() -> None:
    @dataclass
    class Local:
        width: int

    saved(One(Local(3)))
    with pytest.warns(UserWarning, match="A hyperparameter was of the class .*Local"):
        assert One.load_from_checkpoint("m.ckpt").value.width == 3


def test_no_class_is_imported_or_called_for_a_file() -> None:
    content = {"state_dict": Line().state_dict(), "hyper_parameters": {"value": {"args": "x"}}}
    for note in ("record subprocess:Popen", "enum enum:Enum", "record no.such.module:Thing", "enum os:system"):
        storage.write({**content, "hparams_type": {("value",): note}}, "evil.ckpt")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = One.load_from_checkpoint("evil.ckpt").value
        assert not hasattr(value, "pid")


# ------------------------------------------------------------------ one object for all

HOLDERS: dict[str, Any] = {
    "dict": lambda: {"width": 3, "root": Path("a"), "nested": {"a": 1}},
    "namespace": lambda: Namespace(width=3, root=Path("a")),
    "dataclass": lambda: Config(3, Inner(Path("a"))),
    "mapping": lambda: ConfigMapping({"width": 3, "nested": {"a": 1}}),
    "object": lambda: SimpleNamespace(width=3),
    "other keys": lambda: {1: 1, "a": 2, "width": 3},
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_an_object_of_hyperparameters_loads_again(kind: str) -> None:
    module = Holder(HOLDERS[kind]())
    assert module.hparams.width == 3
    saved(module)
    loaded = Holder.load_from_checkpoint("m.ckpt")
    assert loaded.hparams == module.hparams
    given = loaded.given
    assert (given["width"] if isinstance(given, dict) else given.width) == 3
    if kind in ("namespace", "dataclass", "dict", "other keys"):
        assert given == module.given and type(given) is type(module.given)
    if kind == "mapping":
        assert given.nested.a == 1 == loaded.hparams.nested["a"]


def test_overrides_reach_the_object_and_the_other_arguments() -> None:
    saved(Holder({"width": 3}))
    loaded = Holder.load_from_checkpoint("m.ckpt", width=5, depth=2, lr=0.5)
    assert loaded.given == {"width": 5, "depth": 2} and loaded.lr == 0.5
    assert Holder.load_from_checkpoint("m.ckpt", hparams={"width": 1}).given == {"width": 1}


def test_an_object_beside_arguments_by_name() -> None:
    class Wider(Holder):
        def __init__(self, hparams: Any, factor: int = 1) -> None:
            super().__init__(hparams)
            self.save_hyperparameters("factor")
            self.factor = factor

    saved(Wider({"width": 3}, 4))
    loaded = Wider.load_from_checkpoint("m.ckpt")
    assert (loaded.given, loaded.factor) == ({"width": 3}, 4)


def test_nothing_is_saved_from_nothing() -> None:
    assert Holder(None).hparams == Holder({}).hparams == {}
    with pytest.raises(AttributeError, match=r"no hyperparameter 'b'; there are \[1, 'a'\]"):
        _ = Holder({1: 1, "a": 2}).hparams.b


# ------------------------------------------------------------------ the arguments of __init__


class Base(Line):
    def __init__(self, width: int, net: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Sub(Base):
    def __init__(self, width: int, net: Any, lr: float = 0.1) -> None:
        super().__init__(width, net)
        self.save_hyperparameters(ignore="net")


class EarlySub(Base):
    def __init__(self, width: int, net: Any) -> None:
        self.save_hyperparameters(ignore=["net"])
        super().__init__(width, net)


class IgnoringBase(Line):
    def __init__(self, width: int, net: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="net")


class SavingSub(IgnoringBase):
    def __init__(self, width: int, net: Any, *names: str) -> None:
        super().__init__(width, net)
        self.save_hyperparameters(*names)


def test_what_one_class_ignores_no_other_class_brings_back() -> None:
    assert Base(1, 2).hparams == {"width": 1, "net": 2}
    assert Sub(1, 2).hparams == {"width": 1, "lr": 0.1} == Sub(1, 2).hparams_initial
    assert EarlySub(1, 2).hparams == {"width": 1}
    assert SavingSub(1, 2).hparams == {"width": 1}
    assert SavingSub(1, 2, "net").hparams == {"width": 1, "net": 2}, "unless it gives the name"


def test_positional_and_variable_arguments_come_back() -> None:
    class Layers(Line):
        def __init__(self, width: int, /, *layers: int, bias: bool = True, **options: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.given = (width, layers, bias, options)

    module = Layers(3, 1, 2, bias=False, name="x")
    assert module.hparams == {"width": 3, "layers": (1, 2), "bias": False, "name": "x"}
    saved(module)
    assert Layers.load_from_checkpoint("m.ckpt").given == module.given
    assert Layers.load_from_checkpoint("m.ckpt", name="y").given[-1] == {"name": "y"}


def test_a_subclass_that_passes_everything_on_adds_nothing() -> None:
    class Passes(Base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert Passes(3).hparams == {"width": 3, "net": None}
    saved(Passes(3))
    assert Passes.load_from_checkpoint("m.ckpt").hparams.width == 3


def test_a_helper_and_a_decorator_may_come_between() -> None:
    def decorated(init: Any) -> Any:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)

        return wrapper

    class Helped(Line):
        @decorated
        def __init__(self, width: int) -> None:
            super().__init__()
            self.keep()

        def keep(self) -> None:
            self.save_hyperparameters()

    class Wider(Helped):
        @decorated
        def __init__(self, width: int, depth: int = 2) -> None:
            super().__init__(width)

    assert Wider(3).hparams == {"width": 3, "depth": 2}


def test_the_initial_values_are_a_copy_and_uncopyable_ones_are_shared() -> None:
    lock, net, shape = LEFT_OUT["lock"], nn.Linear(1, 1), [1]
    module = LightningModule()
    module.save_hyperparameters({"lock": lock, "net": net, "shape": shape})
    shape.append(2)
    module.hparams.new = 1
    assert module.hparams_initial == {"lock": lock, "net": net, "shape": [1]}


# ------------------------------------------------------------------ load_from_checkpoint


def test_a_file_of_hyperparameters_takes_their_place() -> None:
    saved(Base(3))
    Path("h.yaml").write_text("width: 5\nnet: [1, 2]\n")
    Path("h.json").write_text(json.dumps({"width": 6}))
    assert Base.load_from_checkpoint("m.ckpt", hparams_file="h.yaml").hparams == {"width": 5, "net": [1, 2]}
    assert Base.load_from_checkpoint("m.ckpt", hparams_file=Path("h.json"), width=7).hparams == {"width": 7, "net": None}
    saved(Holder({"width": 3}))
    assert Holder.load_from_checkpoint("m.ckpt", hparams_file="h.json").given == {"width": 6}


def test_layers_of_configure_model_are_built_before_the_weights_are_loaded() -> None:
    class Late(Line):
        def configure_model(self) -> None:
            self.late = nn.Linear(1, 1)

    module = Late()
    saved(module)
    assert torch.equal(Late.load_from_checkpoint("m.ckpt").late.weight, module.late.weight)


def test_strict_and_map_location() -> None:
    class More(Line):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(1, 1)

    class Lenient(More):
        strict_loading = False

    saved(Line())
    with pytest.raises((RuntimeError, MisconfigurationError), match=r"more\.weight"):
        More.load_from_checkpoint("m.ckpt")
    More.load_from_checkpoint("m.ckpt", strict=False)
    Lenient.load_from_checkpoint("m.ckpt")
    with pytest.raises((RuntimeError, MisconfigurationError), match=r"more\.weight"):
        Lenient.load_from_checkpoint("m.ckpt", strict=True)
    assert Line.load_from_checkpoint("m.ckpt", map_location="meta").device.type == "meta"
    assert Line.load_from_checkpoint("m.ckpt", lambda storage, location: storage).device.type == "cpu"


def test_a_module_without_weights_loads() -> None:
    class Nothing(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return 1

    saved(Nothing())
    assert Nothing.load_from_checkpoint("m.ckpt").training


def test_code_in_a_file_runs_only_if_the_user_trusts_it() -> None:
    torch.save({"state_dict": Line().state_dict(), "hyper_parameters": {"value": Bare()}}, "trusted.ckpt")
    for trusted in (None, True):
        with pytest.raises(MisconfigurationError, match="no checkpoint that can be read safely"):
            One.load_from_checkpoint("trusted.ckpt", weights_only=trusted)
    assert isinstance(One.load_from_checkpoint("trusted.ckpt", weights_only=False).value, Bare)


# ------------------------------------------------------------------ datamodules


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 1, root: Path = Path("a")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.epoch_of_data = 0

    def predict_dataloader(self) -> Any:
        return rows(self.hparams.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 5}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch_of_data = state_dict["epoch"]


def test_a_datamodule_has_hyperparameters_and_loads_from_a_checkpoint() -> None:
    content = saved(One(1), data=Data(2, Path("b")))
    assert content["datamodule_hyper_parameters"] == {"batch_size": 2, "root": "b"}
    assert content["hyper_parameters"] == {"value": 1}
    loaded = Data.load_from_checkpoint("m.ckpt")
    assert loaded.hparams == {"batch_size": 2, "root": Path("b")} and loaded.epoch_of_data == 5
    assert Data.load_from_checkpoint("m.ckpt", batch_size=4).hparams.batch_size == 4


def test_loggers_write_the_hyperparameters_of_both() -> None:
    class Sized(Line):
        def __init__(self, batch_size: int, width: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = new_trainer()
    trainer.predict(Sized(1, 2), datamodule=Data(1))
    assert logged_hparams(trainer) == {"batch_size": 1, "width": 2, "root": Path("a")}
    trainer.predict(Sized(1, 2), datamodule=Data(3))
    assert logged_hparams(trainer) == {"batch_size": 1, "width": 2, "root": Path("a"), "datamodule/batch_size": 3}


def test_a_method_of_the_class_is_refused_on_an_object() -> None:
    for instance in (Line(), Data()):
        with pytest.raises(MisconfigurationError, match=r"leaves this \w+ as it is.*model = \w+\.load_from_checkpoint"):
            instance.load_from_checkpoint("m.ckpt")
