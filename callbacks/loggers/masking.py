"""Mask what looks like a secret in the description of a run, which everybody who sees the board can read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

MASK = "[masked]"  # the page reads Markdown, in which asterisks vanish
ALWAYS = frozenset(
    re.findall(
        r"\w+",
        "password passwords passwd passphrase passcode pwd secret secrets credential credentials apikey apitoken authtoken "
        "accesstoken accesskey secretkey privatekey signature authorization cookie jwt bearer auth dsn pw",
    )
)
"""Words that make a name secret wherever they stand in it."""
PAIRS = frozenset(
    (first, second)
    for first in (
        "api",
        "access",
        "secret",
        "private",
        "auth",
        "bearer",
        "refresh",
        "client",
        "account",
        "encryption",
        "signing",
    )
    for second in ("key", "keys", "token", "tokens")
) | {(first, "pass") for first in ("user", "db", "smtp", "mail", "proxy", "admin", "root")}
"""Two words in a row that make a name secret, such as those of ``aws_access_key_id``."""
HARMLESS = frozenset(
    re.findall(
        r"\w+",
        # The data to which a key may belong, and the tokens of a tokenizer.
        "sort group primary foreign public dict batch image label input output target feature data metric monitor loss sample "
        "state index query value lookup map join partition column field json name num max min n k v q x y self cross attention "
        "rng prng random seed hot text audio video cache registry module layer param pad eos bos cls sep unk mask special "
        "start end begin first last next per each class patch prompt vocab word byte extra additional",
    )
)
"""Words before ``key`` and ``token`` with which a name is no secret, such as ``sort_key`` and ``pad_token``."""
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
JOINED = ("password", "passwd", "secret", "apikey", "accesskey", "accesstoken", "authtoken")
"""The ends of words that make a name secret, such as ``dbpassword`` and ``-Dpassword``."""
NAME = r"[A-Za-z_][\w.-]{0,100}"  # longer ones would cost a time that grows with the square of a text's length
URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/?#'\"]+@")
HEADER = re.compile(r"(?i)\b(bearer\s+)(?=\S*\d|\S{16})[\w.~+/=-]{6,}")
ASSIGNED = re.compile(
    rf"(?P<name>{NAME})(?P<end>['\"]?\s*(?:=>|[:=])\s*)"
    r"(?P<value>(?i:[bru]{0,2})(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")"
    r"|\((?:[^()]|\([^()]*\))*\)|\[(?:[^\[\]]|\[[^\[\]]*\])*\]|\{(?:[^{}]|\{[^{}]*\})*\}"
    r"|(?:(?i:bearer|basic|digest|token)\s+)?[^\s,;&()\[\]{}'\"|]+)"
)
OPTION = re.compile(rf"--?(?P<name>{NAME})")
PLAIN = ("None", "True", "False", "null", "true", "false")
NUMBER = re.compile(r"-?[\d.]+(?:[eE][+-]?\d+)?")
WELL_KNOWN = re.compile(
    r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_\w{20,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)


def is_secret(name: Any) -> bool:
    """Return whether a name looks like that of a secret.

    Args:
        name: The name of an argument, an attribute, an option or a variable.

    Example:
        >>> [name for name in ("api_key", "keys_per_head", "num_tokens", "hfToken", "monkey") if is_secret(name)]
        ['api_key', 'hfToken']
    """
    last = str(name).rpartition(".")[2]
    words = [word.lower() for word in WORDS.findall(re.sub(r"^[xX]-", "", last))]  # headers begin with it
    if not words:
        return False
    if not ALWAYS.isdisjoint(words) or any(pair in PAIRS for pair in pairwise(words)):
        return True
    if any(word.endswith(JOINED) for word in words):
        return True
    if words in (["pass"], ["sig"]):
        return True
    return words[-1] in ("key", "token") and (len(words) == 1 or words[-2] not in HARMLESS)


def masked(value: Any, name: Any = "") -> Any:
    """Return a value with secrets in it masked.

    Args:
        value: A value of any type. Dicts, lists, tuples and sets are searched; an object of another type stays, and its text is
            masked when it becomes one.
        name: Its name.

    Example:
        >>> masked({"lr": 0.1, "storage": {"token": "abc", "url": "s3://me:pass@host/run"}})
        {'lr': 0.1, 'storage': {'token': '[masked]', 'url': 's3://[masked]@host/run'}}
    """
    if isinstance(value, Mapping):
        return {key: masked(each, key if not is_secret(name) else name) for key, each in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(masked(each, name) for each in value)
    if is_secret(name) and value is not None and not isinstance(value, (bool, int, float)):
        return MASK
    return masked_text(value) if isinstance(value, str) else value


def masked_text(text: str) -> str:
    """Return a text with secrets in it masked: credentials in URLs, ``name=value``, ``'name': 'value'``, and headers.

    Args:
        text: The text.

    Example:
        >>> masked_text("Store(url='https://me:pass@host', api_key='abc', keys_per_head=8)")
        "Store(url='https://[masked]@host', api_key='[masked]', keys_per_head=8)"
    """
    text = URL.sub(rf"\1{MASK}@", text)
    text = ASSIGNED.sub(_assigned, text)
    return WELL_KNOWN.sub(MASK, HEADER.sub(rf"\1{MASK}", text))


def _assigned(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    start = f"{name}{match['end']}"
    quote = value[-1] if value[-1] in "'\"" and value.count(value[-1]) > 1 else ""
    if not is_secret(name):
        if quote:
            opening, _, text = value.partition(quote)
            return f"{start}{opening}{quote}{masked_text(text[:-1])}{quote}"
        # A value that assigns, as in url=https://host?token=...
        return f"{start}{masked_text(value)}" if "=" in value or ":" in value else match[0]
    is_number = NUMBER.fullmatch(value) or (value[0] in "([{" and not re.search(r"[^\W\d_]", NUMBER.sub("", value)))
    if value in PLAIN or is_number:
        return match[0]
    return f"{start}{quote}{MASK}{quote}"


def masked_command(arguments: Sequence[str]) -> str:
    """Return a command line with secrets in it masked: also those that follow an option, as in ``--api-key abc``.

    Args:
        arguments: The program and its arguments.

    Example:
        >>> masked_command(["train.py", "--api-key", "abc", "--num-tokens", "8", "model.token=abc"])
        'train.py --api-key [masked] --num-tokens 8 model.token=[masked]'
    """
    shown: list[str] = []
    is_value = False
    for argument in arguments:
        option = OPTION.fullmatch(argument)
        if is_value and option is None:
            shown.append(MASK)
        else:
            shown.append(masked_text(argument))
        is_value = option is not None and is_secret(option["name"])
    return " ".join(shown)
