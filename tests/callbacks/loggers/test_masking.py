"""The description of a run shows no secrets, and masks no harmless words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eventtrain import Callback
from eventtrain.callbacks import TensorBoardLogger
from eventtrain.callbacks.loggers import run_files
from eventtrain.callbacks.loggers.masking import is_secret, masked, masked_command, masked_text
from tests.callbacks.loggers.logged import Model, fit, read, texts

SECRET = "hunter2-0123456789"

SECRET_NAMES = """token key secret password api_key api-key apiKey APIKEY API_KEY hf_token HF_TOKEN accessToken auth_token
wandb_key AWS_SECRET_ACCESS_KEY aws_access_key_id db_password DB_PASSWD passphrase client_secret credentials private_key
authorization Authorization X-Api-Key user.password refresh_token openai_key secretKey cookie jwt bearer_token
service_account_key token1 TOKEN2 dbpassword Dpassword userPasswd apisecret user_pass pass pw dsn X-Token""".split()
HARMLESS_NAMES = """monkey keys_per_head num_tokens tokenizer max_tokens tokens keyboard key_dim turkey pad_token
eos_token sort_key batch_key label_key tokens_per_batch num_keys key_padding_mask secretary donkey_count passes
forward_pass author authored
tokenizer_name image_key monitor lr max_time compass bypass keynote token_embedding public_key""".split()


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_masked_by_its_name_in_every_form(name: str) -> None:
    assert is_secret(name)
    forms = [
        *(f"{name}={SECRET}", f"{name}: {SECRET}", f"{name!r}: {SECRET!r}", f'{{"{name}": "{SECRET}"}}', f"{name}='{SECRET}'"),
        *(f"https://host/a?{name}={SECRET}&b=1", f"export {name.upper()}={SECRET}; run", f"Store(a=1, {name}={SECRET!r}, b=2)"),
    ]
    for form in forms:
        assert SECRET not in masked_text(form) and "[masked]" in masked_text(form), form
    assert masked_text(forms[-1]) == f"Store(a=1, {name}='[masked]', b=2)"
    for command in (
        [f"--{name}", SECRET],
        [f"--{name}={SECRET}"],
        [f"{name}={SECRET}"],
        [f"-{name}", SECRET],
        [f"+x.{name}={SECRET}"],
    ):
        assert SECRET not in masked_command(["train.py", *command, "--lr", "0.1"])
        assert masked_command(["train.py", *command, "--lr", "0.1"]).endswith("--lr 0.1")
    nested = {"a": [{name: SECRET}], "b": {"c": {name: [SECRET, {"d": SECRET}]}}, name: (SECRET,)}
    assert SECRET not in repr(masked(nested))


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_a_harmless_name_is_not_masked(name: str) -> None:
    assert not is_secret(name)
    for form in (f"{name}=value", f"{name!r}: 'value'", f"{name}: 8", f"https://host/a?{name}=value&b=1"):
        assert masked_text(form) == form
    assert masked_command(["train.py", f"--{name}", "value", f"--{name}=value"]) == f"train.py --{name} value --{name}=value"
    assert masked({name: ["value"]}) == {name: ["value"]}


@pytest.mark.parametrize(
    "text",
    [
        *(f"https://user:{SECRET}@host/path", f"s3://{SECRET}@bucket", f"postgresql+psycopg://u:{SECRET}@h:5432/d?x=1"),
        *(f"Authorization: Bearer {SECRET}", f"authorization=Basic {SECRET}", f"-H 'Authorization: Bearer {SECRET}'"),
        *(f"Bearer {SECRET}", f"{{'headers': {{'Authorization': 'Bearer {SECRET}'}}}}", f"url='https://h?token={SECRET}'"),
        *(
            f"https://user:p@{SECRET}@host/path",
            f"tokens=1, password=[{SECRET!r}]",
            f"token=b{SECRET!r}",
            f"(secret=({SECRET!r}, 2))",
        ),
        *(f"{{'password': {{'a': {{'b': {SECRET!r}}}}}}}", f"store={{'token': {SECRET!r}}}", f"https://h/b?sv=1&sig={SECRET}"),
        f"(secret=({SECRET!r}, 2))",
        *("ghp_" + SECRET.replace("-", "") * 2, "hf_" + "a" * 34, "sk-" + "b" * 40, "AKIA" + "C" * 16),
    ],
)
def test_a_secret_is_masked_by_its_form(text: str) -> None:
    assert "[masked]" in masked_text(text)
    for secret in (SECRET, SECRET.replace("-", ""), "a" * 34, "b" * 40, "C" * 16):
        assert secret not in masked_text(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://host:8080/a@b",
            "user@host",
            "a bearer of news",
            "SGD (\n  lr: 0.1\n  momentum: 0\n)",
            "key=8",
            "token=None",
        ),
        *("Linear(in_features=2, out_features=1, bias=True)", "git clone ssh://host/x", "C:/runs", "12:30:00", "memory://a"),
        *("key=(0, 1)", "betas=(0.9, 0.999)", "layers=[Linear(key_dim=3), ReLU()]", "name=b'bytes'", "shape={'a': (1, 2)}"),
        "sk-learn and hf_hub and basic training",
    ],
)
def test_harmless_text_stays(text: str) -> None:
    assert masked_text(text) == text


class Uploads(Callback):
    def __init__(self) -> None:
        self.url, self.api_token, self.monkey, self.path = f"https://me:{SECRET}@host", SECRET, "banana", Path("a")


class Speaks(Callback):
    def __repr__(self) -> str:
        return f"Speaks(password={SECRET!r}, n=1)"


def test_a_board_shows_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--api-key", SECRET, f"--url=ftp://a:{SECRET}@b", "--num-tokens", "8"])
    module = Model()
    module.save_hyperparameters(
        {"hf_token": SECRET, "store": {"password": SECRET, "url": f"s3://k:{SECRET}@b"}, "num_tokens": 3}
    )
    logger, _, _ = fit(tmp_path, Uploads(), Speaks(), model=module, max_epochs=1)
    environment, configuration = (texts(logger, f"run/{name}")[0] for name in ("environment", "configuration"))
    assert "| command | train.py --api-key [masked] --url=ftp://[masked]@b --num-tokens 8 |" in environment
    assert "Uploads(url='https://[masked]@host', api_token='[masked]', monkey='banana', path=PosixPath('a'))" in configuration
    assert "Speaks(password='[masked]', n=1)" in configuration
    contents = [metadata.plugin_data.content for metadata in read(logger).summary_metadata.values()]
    (start,) = [content for content in contents if b"hf_token" in content]
    assert b"num_tokens" in start and b"store/url" in start
    for path in Path(str(logger.run_dir)).iterdir():
        assert SECRET.encode() not in path.read_bytes()
    assert module.hparams["hf_token"] == SECRET, "the module's own are as they were"


def test_the_description_can_be_switched_off(tmp_path: Path) -> None:
    logger, _, _ = fit(tmp_path, max_epochs=1, logger={"describe_run": False})
    assert [tag for tag in read(logger).Tags()["tensors"] if tag.startswith("run/")] == []
    logger, _, _ = fit(tmp_path, max_epochs=1)
    assert len([tag for tag in read(logger).Tags()["tensors"] if tag.startswith("run/")]) == 3


def test_a_remote_directory_is_described_without_its_credentials() -> None:
    logger = TensorBoardLogger(f"memory://me:{SECRET}@runs")
    assert SECRET not in run_files.described(logger) and "memory://[masked]@runs" in run_files.described(logger)
