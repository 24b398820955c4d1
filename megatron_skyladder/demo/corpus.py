"""A corpus of real documents that every machine with CPython has: its standard library.

One document a documentation topic (``help("for")`` and its like) and one a source file, in an order
that depends on nothing but their names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_skyladder.files import whole

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every topic and source file of the running Python."""
    from pydoc_data import topics

    for name, text in topics.topics.items():
        yield f"topic/{name}", text
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT.intersection(parts):
            yield "source/" + "/".join(parts), path.read_text(encoding="utf-8", errors="replace")


def write_corpus(path: Path) -> int:
    """Write the documents as JSON lines, shuffled by a hash of their names; return their number.

    The same Python version gives the same file everywhere, so that the last documents can be held
    out for validation.
    """
    shuffled = sorted(documents(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
    with whole(path) as partial, partial.open("w", encoding="utf-8") as out:
        for name, text in shuffled:
            out.write(json.dumps({"name": name, "text": text}) + "\n")
    return len(shuffled)


def train_tokenizer(corpus: Path, folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer and save it as Hugging Face's loaders expect it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with corpus.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
