"""Credentials taken out of text: what errors, logs, run.json, tables and a job's metadata may say.

A credential is known by its place (the user part of an address, the parameters of a signed one, a field whose name says
so) or by its value, where this process has been given it as a storage option or in its environment.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["HIDDEN", "is_secret_name", "redact_options", "redact_text", "remember", "unsigned", "without_secrets"]

HIDDEN = "***"
# Storage options that say where and how, not who.
OPEN_OPTIONS = {"anon", "endpoint_url", "region_name", "use_ssl", "verify"}
# Names of such options as a whole, where they stand among others.
STORAGE = {"storage", "storage_options"}
WORDS = {
    "auth", "authorization", "bearer", "cookie", "credential", "credentials", "key", "pass", "passphrase", "passwd",
    "password", "pat", "pwd", "sas", "secret", "sig", "signature", "token",
}  # fmt: skip
JOINED = ("accesskey", "accountkey", "apikey", "connectionstring", "privatekey", "sharedkey")
# What clients read by themselves.
VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN", "HF_TOKEN", "RAY_AUTH_TOKEN",
)  # fmt: skip
# A shorter value would be found in words that it has nothing to do with.
SHORTEST_VALUE = 8

# https://user:password@host, s3://key:secret@bucket (a secret may hold slashes); not http://host:8265/folder@2x.
PASSWORD = re.compile(r"(://[^/@:\s'\"]*:)(?!\d{1,5}/)[^@\s'\"]*@")
# A name alone is a token over HTTP; abfs://container@account is an address.
USER = re.compile(r"\b(https?://)[^/@:?#\s'\"]+@", re.IGNORECASE)
PAIR = re.compile(r"(?P<before>[?&;]|\b)(?P<name>[\w.-]{1,64})=(?P<value>[^&;\s'\"<>,)\]}]+)")
FIELD = re.compile(r"(?P<name>(['\"])[\w.-]{1,64}\2)(?P<colon>\s*[:=]\s*)(?P<value>b?'[^'\n]*'|b?\"[^\"\n]*\")")
HEADER = re.compile(r"\b((?:authorization|cookie)\s*:\s*)[^\r\n'\"]+", re.IGNORECASE)
BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE)
KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")
# What a signed address has beside its object's own parameters: S3, GCS, Azure's SAS, CloudFront.
SIGNED_PREFIXES = ("x-amz-", "x-goog-")
SIGNED = {
    "awsaccesskeyid", "expires", "googleaccessid", "key-pair-id", "policy", "se", "sig", "signature", "sip", "ske",
    "skoid", "sks", "skt", "sktid", "skv", "sp", "spr", "sr", "srt", "ss", "st", "sv",
}  # fmt: skip

_values: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Whether a field, parameter or variable of this name holds a credential: `account_key`, `X-Amz-Signature`."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    joined = "".join(words)
    return not WORDS.isdisjoint(words) or any(part in joined for part in JOINED)


def remember(options: Mapping[str, Any]) -> None:
    """Hide the values of storage options wherever `redact_text` meets them from now on, in this process."""
    _values.update(_secrets(options))


def redact_text(text: str) -> str:
    """`text` without the credentials that can be told; the rest stays, and doing it twice changes nothing more."""
    for value in sorted((*_values, *_environment()), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    if "@" in text and "://" in text:
        text = USER.sub(rf"\1{HIDDEN}@", PASSWORD.sub(rf"\1{HIDDEN}@", text))
    if "=" in text or ":" in text:
        text = FIELD.sub(_field, PAIR.sub(_pair, HEADER.sub(rf"\1{HIDDEN}", text)))
    return KEY_ID.sub(HIDDEN, BEARER.sub(rf"\1 {HIDDEN}", text))


def redact_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Storage options with every value hidden but addresses and switches, and the passwords in those."""
    return {name: _option(name, value) for name, value in options.items()}


def without_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options as files keep them: without those that hold a credential, which whoever reads the file gives
    anew, and without credentials in addresses. Numbers stay whatever they are called (`use_mask_token`); of storage
    options, addresses and switches alone."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        if is_secret_option(name, value):
            continue
        if isinstance(value, Mapping) and name in STORAGE:
            kept[name] = _without_hidden(redact_options(value))
        else:
            kept[name] = _without_secrets(value)
    return kept


def is_secret_option(name: str, value: Any) -> bool:
    """Whether an option is a credential: by its name, where it is text or not given."""
    texts = value if isinstance(value, list | tuple) and value else (value,)
    return is_secret_name(name) and all(text is None or isinstance(text, str) for text in texts)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return type(value)(_without_secrets(item) for item in value)
    return redact_text(value) if isinstance(value, str) else value


def _without_hidden(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_hidden(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if value != HIDDEN
    }


def unsigned(address: str) -> str:
    """An address without the parameters that sign it, which change from one signing to the next, and are a credential.

    Parameters that say which object it is stay; an address that is not signed is given back as it is.
    """
    path, mark, query = address.partition("?")
    pairs = query.split("&")
    if not mark or not any(is_secret_name(pair.partition("=")[0]) and "=" in pair for pair in pairs):
        return address
    kept = [pair for pair in pairs if not _signs(pair.partition("=")[0])]
    return path + mark + "&".join(kept) if kept else path


def _signs(name: str) -> bool:
    name = name.lower()
    return name.startswith(SIGNED_PREFIXES) or name in SIGNED or is_secret_name(name)


def _option(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_options(value)
    if name not in OPEN_OPTIONS:
        return HIDDEN
    if isinstance(value, list | tuple):
        return [_option(name, item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str) and len(value) >= SHORTEST_VALUE and is_secret_name(str(name)):
            yield value


def _environment() -> Iterator[str]:
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST_VALUE:
            yield value


def _pair(match: re.Match[str]) -> str:
    name = match["name"]
    # In prose `dotted.key=value` is no credential; as a parameter of an address `key=...` is.
    plain = name.lower().rpartition(".")[2] == "key" and not match["before"]
    return match[0] if plain or not is_secret_name(name) else f"{match['before']}{name}={HIDDEN}"


def _field(match: re.Match[str]) -> str:
    if not is_secret_name(match["name"][1:-1]):
        return match[0]
    return f"{match['name']}{match['colon']}'{HIDDEN}'"
