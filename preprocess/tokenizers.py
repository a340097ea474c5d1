"""Tokenizers: raw bytes, a folder or file, or a name on the hub; all as Hugging Face fast tokenizers.

Notable: what a tokenizer is, is said by its identity (``datamodules.tokenizer_identity``), not by its name or place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from datamodules.tokenizer_identity import canonical_backend as canonical_backend
from datamodules.tokenizer_identity import tokenizer_identity as tokenizer_identity

if TYPE_CHECKING:
    # Importing transformers takes seconds, and encoding processes import this module without needing it.
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PADDING, LANDMARK = SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|landmark|>")
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
BYTES = "bytes"


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer.

    Args:
        name: ``"bytes"``, a tokenizer folder, a ``tokenizer.json`` file or a hub name.

    Raises:
        FileNotFoundError: nothing of that name here or on the hub.
        ValueError: it has no fast form, or its file is damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    if str(name) == BYTES:
        return byte_tokenizer()
    if path.is_file():
        return _from_file(path)
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        return _from_file(path / "tokenizer.json")
    looks_like_path = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if looks_like_path and not path.exists():
        raise FileNotFoundError(f"no tokenizer at {name}: give a folder, a tokenizer.json, a hub name or bytes")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # a damaged folder ends in any kind of error
        if path.is_dir():
            raise ValueError(f"{path} is not a whole tokenizer folder ({error})") from error
        raise FileNotFoundError(
            f"no tokenizer {name}: neither a folder, a tokenizer.json nor a name that the hub answers to; try bytes or "
            "bpe:4096"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer {name} has no fast form (tokenizer.json): choose another")
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer without a vocabulary file: byte b is id b, then the special tokens 256, 257, 258."""
    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in _byte_symbols().items()}, merges=[]))
    set_byte_level(backend)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return wrap(backend)


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a tokenizer made here its Hugging Face form."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        extra_special_tokens=[LANDMARK],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save as a Hugging Face tokenizer folder."""
    tokenizer.save_pretrained(str(folder))


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: a tokenizer folder holds one")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({error})") from error
    from transformers import PreTrainedTokenizerFast

    roles: dict[str, Any] = {}
    end = next((token for token in KNOWN_ENDS if backend.token_to_id(token) is not None), None)
    if end is not None:
        roles["eos_token"] = end
    if backend.token_to_id(PADDING) is not None:
        roles["pad_token"] = PADDING
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def set_byte_level(backend: Tokenizer) -> None:
    """Give a tokenizer GPT-2's pre-tokenisation, which loses nothing."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()


def _byte_symbols() -> dict[int, str]:
    """Printable stand-ins of the bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
