"""The methods that load data and move batches, and the datamodule, which consists of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from eventtrain.checkpoint.storage import read as read_checkpoint
from eventtrain.data.device import move_to_device
from eventtrain.module.hparams import HyperparametersMixin, of_class
from eventtrain.module.saved_hparams import build
from eventtrain.paths import StrPath, check_path

if TYPE_CHECKING:
    from eventtrain.trainer import Trainer


class DataHooks:
    """The methods that modules and datamodules share: loaders, and the transfer of batches.

    Attributes:
        prepare_data_per_node: Of several processes, whether the first on each machine prepares the data, for disks that no
            other machine sees; if it is False, only the first of all.
    """

    prepare_data_per_node = True

    def prepare_data(self) -> None:
        """Download the data, or prepare it in another way; called once per run, before :meth:`setup`.

        Of several processes, the first on each machine calls it, and the others wait until it is done.
        So do not set attributes here, which only that process would have; set them in :meth:`setup`.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def prepare_data(self):
            ...         print("downloading")
            >>> Digits().prepare_data()
            downloading
        """

    def setup(self, stage: str) -> None:
        """Build the parts that depend on the data or on the stage.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def setup(self, stage):
            ...         self.batches = [torch.ones(2, 1)] * (3 if stage == "fit" else 1)
            >>> digits = Digits()
            >>> digits.setup("fit")
            >>> len(digits.batches)
            3
        """

    def train_dataloader(self) -> Any:
        """Return the training loader; None if it is given to ``fit``.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def train_dataloader(self):
            ...         return torch.utils.data.DataLoader(torch.arange(10), batch_size=5, shuffle=True)
            >>> len(Digits().train_dataloader())
            2
        """

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a list of loaders.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def val_dataloader(self):
            ...         return [[torch.zeros(2)], [torch.ones(2)]]
            >>> len(Digits().val_dataloader())
            2
        """

    def test_dataloader(self) -> Any:
        """Return the test loader, or a list of loaders.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def test_dataloader(self):
            ...         return torch.utils.data.DataLoader(torch.arange(10), batch_size=5)
            >>> len(Digits().test_dataloader())
            2
        """

    def predict_dataloader(self) -> Any:
        """Return the prediction loader, or a list of loaders.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def predict_dataloader(self):
            ...         return torch.utils.data.DataLoader(torch.arange(10), batch_size=5)
            >>> len(Digits().predict_dataloader())
            2
        """

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it is moved, and return it.

        Args:
            batch: The batch, as the loader made it.
            dataloader_idx: The index of its loader; 0 in training.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def on_before_batch_transfer(self, batch, dataloader_idx):
            ...         return batch.float() / 255
            >>> Digits().on_before_batch_transfer(torch.tensor([255]), 0)
            tensor([1.])
        """
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, and return it.

        Override it for batches that eventtrain cannot move: objects without ``to`` that are neither collections nor
        dataclasses.

        Args:
            batch: The batch.
            device: The device of the run.
            dataloader_idx: The index of its loader; 0 in training.

        Example:
            >>> batch = {"image": torch.zeros(2), "name": ["a", "b"]}
            >>> DataHooks().transfer_batch_to_device(batch, torch.device("meta"), 0)["image"].device
            device(type='meta')
        """
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch after it was moved, and return it.

        Args:
            batch: The batch, on the device of the run.
            dataloader_idx: The index of its loader; 0 in training.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def on_after_batch_transfer(self, batch, dataloader_idx):
            ...         return batch.flip(-1)
            >>> Digits().on_after_batch_transfer(torch.tensor([1, 2]), 0)
            tensor([2, 1])
        """
        return batch


class LightningDataModule(DataHooks, HyperparametersMixin):
    """The data of a run: its loaders, and the transfer of batches.

    Attributes:
        trainer: The trainer of the current run; None between runs.

    Example:
        >>> from eventtrain import LightningModule, Trainer
        >>> class Ones(LightningDataModule):
        ...     def predict_dataloader(self):
        ...         return [torch.ones(2)]
        >>> class Double(LightningModule):
        ...     def forward(self, batch):
        ...         return 2 * batch
        >>> Trainer(max_epochs=1, default_callbacks=False, device="cpu").predict(Double(), datamodule=Ones())
        [tensor([2., 2.])]
    """

    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    trainer: Trainer | None = None

    @of_class
    def load_from_checkpoint(
        cls: type[Self],
        checkpoint_path: StrPath,
        map_location: Any = None,
        hparams_file: StrPath | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a datamodule from the checkpoint of a run that used one, with its hyperparameters and its state.

        Arguments and errors are those of :meth:`eventtrain.LightningModule.load_from_checkpoint`.

        Example:
            >>> import tempfile
            >>> from eventtrain import LightningModule, Trainer
            >>> class Digits(LightningDataModule):
            ...     def __init__(self, batch_size=8):
            ...         self.save_hyperparameters()
            ...     def predict_dataloader(self):
            ...         return torch.utils.data.DataLoader(torch.arange(10), batch_size=self.hparams.batch_size)
            >>> class Echo(LightningModule):
            ...     def forward(self, batch):
            ...         return batch
            >>> trainer = Trainer(max_epochs=1, default_callbacks=False, device="cpu")
            >>> outputs = trainer.predict(Echo(), datamodule=Digits(batch_size=5))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     trainer.save_checkpoint(f"{folder}/last.ckpt")
            ...     digits = Digits.load_from_checkpoint(f"{folder}/last.ckpt")
            >>> digits.hparams
            {'batch_size': 5}
        """
        path = check_path(checkpoint_path, f"{cls.__name__}.load_from_checkpoint", "checkpoint_path")
        content = read_checkpoint(path, map_location, weights_only=weights_only is not False)
        datamodule: Self = build(cls, content, hparams_file, kwargs)
        if content.get("datamodule"):
            datamodule.load_state_dict(content["datamodule"])
        return datamodule

    def teardown(self, stage: str) -> None:
        """Release the resources that :meth:`setup` acquired.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def teardown(self, stage):
            ...         print(f"closing the files of {stage}")
            >>> Digits().teardown("fit")
            closing the files of fit
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the datamodule's state for a checkpoint.

        Example:
            >>> class Digits(LightningDataModule):
            ...     seed = 0
            ...     def state_dict(self):
            ...         return {"seed": self.seed}
            >>> Digits().state_dict()
            {'seed': 0}
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Args:
            state_dict: The result of :meth:`state_dict` in the run that wrote the checkpoint.

        Example:
            >>> class Digits(LightningDataModule):
            ...     def load_state_dict(self, state_dict):
            ...         self.seed = state_dict["seed"]
            >>> digits = Digits()
            >>> digits.load_state_dict({"seed": 7})
            >>> digits.seed
            7
        """
