# SPDX-License-Identifier: Apache-2.0
"""The name of what a model's host copy holds: equal for equal bytes only, in whatever process of the node.

Of files it takes what the kernel says: device, inode, size, and the times of the last write and of the last change of
the inode, which nobody can set back. So a file that is written to, or another one that is put in its place, is another
content, even if size and time of writing are kept; and nothing has to be read. A file that was only touched or moved is
taken for another one, too: its weights are read once more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import vllm
from huggingface_hub import snapshot_download
from vllm.config import VllmConfig

import tokenpool

_FORMATS = ("auto", "hf", "safetensors")
"""Values of --load-format that read the usual weight files."""
_MOST_FILES = 4096


def checkpoint_state(config: VllmConfig) -> list[tuple[str, list[int]]]:
    """What tells one state of the checkpoint's files from another; empty if they are not found on this machine."""
    try:
        return list(_files(_folder_of(config)))
    except (OSError, ValueError):  # also what huggingface_hub raises for what was never downloaded
        return []


def content_key(config: VllmConfig) -> str | None:
    """The name of the content, 64 hexadecimal digits; None for a model whose copy is not shared.

    These are models of several ranks, quantised ones, those with adapters or a draft model, those whose files are not
    found, and those whose config holds what has no words in JSON, as that of a model's own code may.
    """
    model, load = config.model_config, config.load_config
    ranks = config.parallel_config.world_size
    if ranks > 1 or model.quantization is not None or config.speculative_config is not None:
        return None
    if config.lora_config is not None or load.load_format not in _FORMATS:
        return None
    if not (files := checkpoint_state(config)):
        return None
    try:
        words = model.hf_config.to_json_string()
    except (TypeError, ValueError):
        return None
    facts = {
        "files": files,
        "config": words,
        "model": [str(model.dtype), model.max_model_len, model.revision, model.compute_hash()],
        "load": [load.load_format, sorted(load.ignore_patterns or ()), _plain(load.model_loader_extra_config)],
        "ranks": [0, ranks],
        "device": config.device_config.device_type,
        "code": [tokenpool.__version__, vllm.__version__, torch.__version__, _own_code()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _folder_of(config: VllmConfig) -> Path:
    """Where the checkpoint lies; raises OSError, ValueError if it does not lie on this machine yet."""
    model = config.model_config.model
    if os.path.isdir(model):
        return Path(model)
    folder = config.load_config.download_dir
    return Path(
        snapshot_download(model, revision=config.model_config.revision, cache_dir=folder, local_files_only=True)
    )


def _files(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Path in the folder, and what tells one state of a file from another; hidden ones are left out."""
    count = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(place, name)
            found = path.stat()
            count += 1
            if count > _MOST_FILES:
                raise ValueError(f"{folder} has more than {_MOST_FILES} files")
            told = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            yield str(path.relative_to(folder)), told


@cache
def _own_code() -> str:
    """Digest of what of ours may change the bytes of weights: patches, and how they are loaded and laid out."""
    here = Path(__file__).parent
    files = [*here.glob("*.py"), *(Path(__file__).parents[2] / "memory").glob("weight_*.py")]
    from tokenpool import patches

    files += Path(patches.__file__).parent.glob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()
