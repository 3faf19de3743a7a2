# SPDX-License-Identifier: Apache-2.0
"""The pool file's keys for clients, for looking and for changing, and which models may be added over HTTP.

    api_key: ${POOL_API_KEY}        # clients
    view_key: ${POOL_VIEW_KEY}      # looks at /v1/pool/, changes nothing
    admin_key: ${POOL_ADMIN_KEY}    # adds and removes models
    admin_models: listed            # which ones: those below admin_roots, with flags that run and read nothing
    admin_roots: [/models, Qwen]    # folders, and owners on the Hugging Face hub

Imports neither vllm nor ray.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated

from tokenpool import settings, units
from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.sections import Written

MIN_KEY_CHARS = 16
"""Fewer can be guessed; `tokenpool key new` makes keys of 46."""

_REFERENCE = re.compile(r"\$\{(\w+)\}")
_PATH_STARTS = ("/", "./", "../", "~")


def check_key(key: str, setting: str | None = None) -> None:
    """Refuse a key that cannot be sent, or that is short; the message does not show it."""
    good = bool(key) and key.isprintable() and key == key.strip()
    check_setting(good, setting, "a key is empty, unprintable or has spaces at an end: correct it")
    problem = f"a key has {len(key)} characters: give {MIN_KEY_CHARS} or more, `tokenpool key new` makes one"
    check_setting(len(key) >= MIN_KEY_CHARS, setting, problem)


def check_access(keys: Mapping[str, Iterable[str]]) -> None:
    """Refuse bad keys, and keys that look and change; `keys` are by the name of their setting."""
    for setting, own in keys.items():
        for key in own:
            check_key(key, setting)
    problem = "a key is in admin_key already: who only looks needs a key of its own"
    check_setting(set(keys["view_key"]).isdisjoint(keys["admin_key"]), "view_key", problem)


def expand_key(text: str, key: str | None = None) -> str:
    """`units.expand_env` for a key: the variables that it names are kept from engine hosts."""
    settings.SECRETS.update(_REFERENCE.findall(text))
    return units.expand_env(text, key)


def _read_keys(value: object) -> tuple[str, ...]:
    return tuple(expand_key(key) for key in units.parse_texts(value, "put a key of digits in quotes"))


def _read_roots(value: object, folder: str) -> tuple[str, ...]:
    roots = [value] if isinstance(value, str) else value
    if not isinstance(roots, list) or not all(isinstance(root, str) and root.strip() for root in roots):
        raise ConfigError("expected a list of folders, such as /models, and of owners on the Hugging Face hub")
    return tuple(map(partial(_root, folder=folder), roots))


def _root(root: str, folder: str) -> str:
    if is_path(root):
        return os.path.abspath(os.path.join(folder, os.path.expanduser(root)))
    good = re.fullmatch(r"[A-Za-z0-9][\w.-]*/?", root) is not None
    check_setting(good, None, f"{show(root)} is neither a folder, such as /models, nor an owner, such as Qwen")
    return root.rstrip("/")


def is_path(model: str) -> bool:
    """Whether vLLM takes a text for a path of this machine, whatever is there, and not for a name on the hub."""
    return model.startswith(_PATH_STARTS)


TEXTS = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}
Keys = Annotated[tuple[str, ...], Written(_read_keys, "key or keys", TEXTS)]
"""One key or a list of keys, `${NAME}` allowed."""
Roots = Annotated[tuple[str, ...], Written(_read_roots, "text or texts", TEXTS, in_folder=True)]
"""Folders, relative ones starting at the pool file's, and owners on the hub."""
