"""Offline tokenizers for the tiny models: a WordLevel one and a byte-level BPE one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CORPUS = """
A user shows a picture and asks the assistant to describe what it contains, object by object.
The picture shows a red square, a green circle and a blue triangle on a white background.
How many yellow stars are there in the first image? There are three stars above the line.
Read the table out row by row, then read the chart and name its largest and smallest bar.
Please answer with a JSON object such as {"color": "red", "count": 3, "shape": "square"}.
Compare both pictures: which colours appear in the first one but not in the second one?
What is written on the sign? Transcribe the text exactly, with its punctuation and digits.
0123456789 10 20 30 40 50 60 70 80 90 100 200 500 1000 + - * / = < > ( ) [ ] { } : ; , . ! ?
"""


def word_level_tokenizer(vocab_size: int, special: Mapping[str, int]) -> Tokenizer:
    """Return a WordLevel tokenizer with words ``w0 .. wN`` and ``special`` tokens at given ids.

    Every id below ``vocab_size`` has a word, so any generated id can be decoded.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = {token_id: token for token, token_id in special.items()}
    vocab = {names.get(i, f"w{i}"): i for i in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


@lru_cache(maxsize=1)
def _trained_bpe_json(vocab_size: int, specials: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.strip().splitlines(), trainer)
    return str(tokenizer.to_str())


def byte_bpe_tokenizer(vocab_size: int, specials: tuple[str, ...]) -> Tokenizer:
    """Return a byte-level BPE tokenizer: ``specials`` come first, then 256 bytes, then merges.

    The result may hold fewer than ``vocab_size`` tokens (the corpus is small).
    """
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_trained_bpe_json(vocab_size, specials))


def fast_tokenizer(
    tokenizer: Tokenizer, eos: str, pad: str, bos: str | None, template: str
) -> PreTrainedTokenizerFast:
    """Wrap ``tokenizer`` for transformers; ``save_pretrained`` then writes all tokenizer files."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
