# SPDX-License-Identifier: Apache-2.0
"""What tiny checkpoints have beside their weights: a tokenizer, and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenpool.demo.tiny_multimodal import Processing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
MAX_POSITION = 2048

_MARKER = "tokenpool_tiny.json"
FORMAT = 2  # raise when a change of this file changes the bytes written: old directories are then made anew
_SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")
NUM_SPECIAL_TOKENS = len(_SPECIAL_TOKENS)
"""They have the lowest ids."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Enough distinct pairs for 512 - 256 - 3 merges.
_CORPUS = """
The quick brown fox jumps over the lazy dog, and the dog does not mind.
Hello world, this is a small language model.
A pool of machines serves many models at once: each request waits for its turn, each turn makes a few tokens.
user: What is the weather like in the mountains today?
assistant: It is cold, bright and windy; take a warm coat.
system: You are a helpful assistant. Answer the question with short and simple words, then stop.
When one model rests, its memory goes to another; when it wakes, the weights come back from the host.
Numbers such as 1, 2, 3, 10, 42 and 100 appear here too, with a date like 2024 and a price like 19.99 dollars.
def main(argument): return [value for value in range(argument) if value % 2 == 0]
People write letters, read books, cook dinner, travel by train and tell their children stories about the sea.
""".strip().splitlines()


def write_beside(base: Path, directory: Path, what: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory with something for the tiny model in `base`, as `make_tiny_model` fills one."""
    marker = {"format": FORMAT, **what, "base": json.loads((base / _MARKER).read_text())}
    write_once(directory, marker, write)


def make_tokenizer(more: Processing | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly VOCAB_SIZE entries: every model token has a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    assert bpe.get_vocab_size() == VOCAB_SIZE, bpe.get_vocab_size()
    bos, eos, unk = _SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, unk_token=unk, model_max_length=MAX_POSITION
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    if more is not None:
        tokenizer.add_tokens(list(more.tokens), special_tokens=True)
        tokenizer.chat_template = more.chat_template or _CHAT_TEMPLATE
    return tokenizer


def write_once(directory: Path, marker: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Fill a sibling directory, then rename it into place; the marker tells what a directory holds."""
    if _is_complete(directory, marker):
        return
    if directory.exists():
        if any(directory.iterdir()) and not (directory / _MARKER).exists():
            raise FileExistsError(f"{directory} holds other files; give an empty or a new directory")
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(directory) as scratch:
        write(scratch)
        (scratch / _MARKER).write_text(json.dumps(marker) + "\n")
        try:
            os.rename(scratch, directory)
        except OSError:
            if not _is_complete(directory, marker):  # else another process was faster: same bytes
                raise


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_complete(directory: Path, marker: dict[str, Any]) -> bool:
    path = directory / _MARKER
    return path.is_file() and json.loads(path.read_text()) == marker
