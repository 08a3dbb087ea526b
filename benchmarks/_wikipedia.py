"""The English Wikipedia articles of benchmarks/data as text and as tokens, for training and for validation."""

import json
import lzma
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from _common import DATA
from _models import sequence_losses
from coopq.core.files import atomic_file

_ARTICLES, _HELD_OUT = DATA / "wikipedia-en-2015.txt.xz", DATA / "wikipedia-held-out.jsonl"
_END = "<|endoftext|>"


@dataclass(frozen=True)
class TokenisedArticles:
    """Articles as tokens; the token 0 ends each article.

    Attributes:
        train: Tokens to train on, shape (n_tokens,).
        windows: The held-out articles in windows, shape (n_windows, length); an incomplete last window is dropped.
        bytes_per_token: Bytes of text that a token of the held-out articles stands for.
        tokenizer: The tokenizer in the form of transformers.
    """

    train: npt.NDArray[np.uint16]
    windows: npt.NDArray[np.int64]
    bytes_per_token: float
    tokenizer: Any

    def scores(self, model: Any, windows: npt.NDArray[np.int64]) -> dict[str, float]:
        """Nats per token, perplexity and bits per byte of a model on windows."""
        nll = float(sequence_losses(model, windows).mean())
        return {"nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / math.log(2) / self.bytes_per_token}


def held_out_articles() -> list[str]:
    """The articles that no model of benchmarks/data is trained on."""
    return [json.loads(line)["text"] for line in _HELD_OUT.read_text(encoding="utf-8").splitlines()]


def in_form_of_wikitext(text: str) -> str:
    """A text with the spaces that WikiText-2 has around punctuation."""
    text = re.sub(r"(\d)([,.])(?=\d)", r"\1 @\2@ ", text)
    text = re.sub(r"(\w)-(?=\w)", r"\1 @-@ ", text)
    return re.sub(" +", " ", re.sub(r"([^\w\s@-])", r" \1 ", text))


def tokenised_articles(work: Path, vocabulary: int, every: int, length: int) -> TokenisedArticles:
    """The articles as tokens; the first call trains the tokenizer and keeps the tokens.

    Args:
        work: Folder that keeps tokenizer and tokens.
        vocabulary: Number of tokens of the tokenizer.
        every: Distance between articles that are trained on, in the order of the text.
        length: Tokens of a window.
    """
    work.mkdir(parents=True, exist_ok=True)
    validation = work / "validation.npy"
    if not validation.exists():  # written last
        _tokenise(work, vocabulary, every)
    file = str(work / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=_END, model_max_length=length)
    held_out = np.load(validation).astype(np.int64)
    n_bytes = len(tokenizer.decode(held_out, skip_special_tokens=True).encode())
    windows = held_out[: len(held_out) // length * length].reshape(-1, length)
    return TokenisedArticles(np.load(work / "train.npy"), windows, n_bytes / len(held_out), tokenizer)


def _tokenise(work: Path, vocabulary: int, every: int) -> None:
    """Train the tokenizer, unless there is one, and write the tokens of both parts of the text."""
    validation = held_out_articles()
    articles = lzma.decompress(_ARTICLES.read_bytes()).decode().split("\n\n\n")[::every]
    training = [article for article in articles if article not in set(validation)]
    if not (work / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(training, trainer)
        with atomic_file(work / "tokenizer.json") as path:
            tokenizer.save(str(path))
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    for name, part in ("train", training), ("validation", validation):
        ids = [token for encoding in tokenizer.encode_batch_fast(part) for token in (*encoding.ids, 0)]
        print(f"{name}: {len(part)} articles, {len(ids):,} tokens", flush=True)
        with atomic_file(work / f"{name}.npy") as path, path.open("wb") as handle:
            np.save(handle, np.array(ids, dtype=np.uint16))
