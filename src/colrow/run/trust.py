"""Whose code a run folder may start: a mark says that this user made the folder.

A run folder names code that `export` and `generate` import: `model.python`, or a model folder's own code
(`model.trust_code`). A user who copies a run folder from somebody else has not agreed to run that code. So each run
leaves a mark: an HMAC of config.yaml under a key that lies in the user's own configuration folder. Without the mark,
`--trust-code` asks for the code.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from pathlib import Path

from colrow.config import RunConfig
from colrow.data.disk import atomic_write
from colrow.errors import ConfigError
from colrow.yaml_text import read_text

MARK = ".made-by"
_KEY_BYTES = 32


def mark_as_ours(folder: Path, config_text: str) -> None:
    """Say that this user made the run folder whose config.yaml has this text."""
    if (key := _key(create=True)) is not None:
        atomic_write(folder / MARK, _signature(key, config_text))


def require_trusted(config: RunConfig, file: Path, trust_code: bool) -> None:
    """Refuse a config of a run folder that somebody else made, where building its model runs code.

    Args:
        file: the config.yaml that `config` was read from.
        trust_code: whether the user asked for that code on the command line.

    Raises:
        ConfigError: the code is named by the folder alone.
    """
    code = (
        config.model.python or config.model.reduced or (config.model.huggingface if config.model.trust_code else None)
    )
    if code is None or trust_code or _is_ours(file):
        return
    raise ConfigError(
        f"{file} names code ({code}) and was not written by a run of this user: building its model would run that "
        "code. Read it first; --trust-code then runs it"
    )


def _is_ours(file: Path) -> bool:
    key = _key(create=False)
    try:
        mark, text = (read_text(path, "file", ConfigError) for path in (file.parent / MARK, file))
    except ConfigError:
        return False
    return key is not None and hmac.compare_digest(mark.encode(), _signature(key, text).encode())


def _signature(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def _key(create: bool) -> bytes | None:
    """This user's key; None where there is none and it cannot be made, as in a container without a home folder."""
    base = os.environ.get("XDG_CONFIG_HOME")
    try:
        path = (Path(base) if base else Path.home() / ".config") / "colrow" / "key"
        if not path.exists() and create:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another run was first
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    os.write(file, secrets.token_bytes(_KEY_BYTES))
                except OSError:  # a full disk: an empty file would stand in the way of every later run
                    path.unlink()
                    raise
                finally:
                    os.close(file)
        key = path.read_bytes()
    except (OSError, RuntimeError):
        return None
    return key if len(key) == _KEY_BYTES else None
