import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from transformers import AutoTokenizer

from coopq.core.errors import CalibrationError, OptionError
from coopq.core.specs import TextSpec
from coopq.model.texts import HeldOut, TokenSet, calibration_set, fitting_set
from tests.conftest import STORIES


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(STORIES)


def with_bos(tokenizer: Any) -> bool:
    return bool(tokenizer.encode("a")[0] == tokenizer.bos_token_id)


def test_the_packaged_sample_gives_whole_windows_of_single_documents(tokenizer: Any) -> None:
    tokens = calibration_set(TextSpec(tokens=6 * 96, sequence_length=96, seed=1), tokenizer)
    assert tokens.tokens.shape == (6, 96)
    assert tokens.n_scored == 6 * 95
    assert tokens.bos == with_bos(tokenizer)
    content = tokens.tokens[:, 1:] if tokens.bos else tokens.tokens
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not specials & set(content.flatten().tolist()), "nothing but text, but for a stated BOS"
    assert len(np.unique(content, axis=0)) == 6, "no window twice"


def test_the_seed_decides_and_the_fingerprint_tells(tokenizer: Any) -> None:
    first, same, other = (
        calibration_set(TextSpec(tokens=4 * 32, sequence_length=32, seed=seed), tokenizer) for seed in (0, 0, 1)
    )
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert TokenSet(first.tokens.reshape(2, 64), "c4", True).fingerprint != first.fingerprint


def test_weights_are_fitted_to_what_searches_do_not_see(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(number) for number in range(400)))
    length = 20 + with_bos(tokenizer)
    windows = len(tokenizer.encode(path.read_text(), add_special_tokens=False)) // 20
    text = TextSpec(str(path), tokens=4 * length, sequence_length=length, seed=3, fit_tokens=5 * length)
    seen, fitted = (draw(text, tokenizer).tokens for draw in (calibration_set, fitting_set))
    assert fitted.shape == (5, length)
    assert len(np.unique(np.concatenate([seen, fitted]), axis=0)) == 9
    left = fitting_set(replace(text, fit_tokens=None), tokenizer).tokens
    assert left.shape == (windows - 4, length), "what the text has left"
    np.testing.assert_array_equal(left[:5], fitted)
    with pytest.raises(CalibrationError, match=f"and {windows + 1} are needed, 1 of them to fit weights to; use fewer"):
        fitting_set(replace(text, tokens=windows * length, fit_tokens=None), tokenizer)


def test_as_many_as_make_32768_tokens_unless_told(tokenizer: Any) -> None:
    assert fitting_set(TextSpec(tokens=3 * 128, sequence_length=128), tokenizer).tokens.shape == (256, 128)


def test_windows_do_not_overlap_and_cover_a_text_file(tmp_path: Path, tokenizer: Any) -> None:
    text = "Lily went to the park and saw a big dog. " * 40
    path = tmp_path / "text.txt"
    path.write_text(text)
    whole = tokenizer.encode(text, add_special_tokens=False)
    length = 20 + with_bos(tokenizer)
    n = len(whole) // 20
    tokens = calibration_set(TextSpec(str(path), n * length, length), tokenizer).tokens[:, -20:]
    expected = [whole[i * 20 : (i + 1) * 20] for i in range(n)]
    assert sorted(tokens.tolist()) == sorted(expected)
    with pytest.raises(CalibrationError, match=f"gives {n} sequences of {length} tokens, and {n + 1} are needed"):
        calibration_set(TextSpec(str(path), (n + 1) * length, length), tokenizer)


def test_sequences_never_cross_documents(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": word * 30}) + "\n" for word in ("cat ", "dog ")) + "\n")
    sequences = calibration_set(TextSpec(str(path), 4 * 12, 12), tokenizer).tokens[:, 1:]
    decoded = [tokenizer.decode(row) for row in sequences]
    assert all(("cat" in text) != ("dog" in text) for text in decoded)


def test_a_bos_token_opens_each_sequence_only_where_the_tokenizer_does_so_itself(tokenizer: Any) -> None:
    class Plain:
        """The same tokenizer without a BOS."""

        bos_token_id = tokenizer.bos_token_id

        def encode(self, text: str, **_: Any) -> Any:
            return tokenizer.encode(text, add_special_tokens=False)

    tokens = calibration_set(TextSpec(tokens=3 * 16, sequence_length=16), Plain())
    assert not tokens.bos
    assert tokens.tokens.shape == (3, 16)
    assert tokenizer.bos_token_id not in tokens.tokens
    assert "BOS" not in tokens.describe()


def test_what_looks_like_a_special_token_stays_text(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.txt"
    path.write_text("The tags <s> and </s> are text here. " * 10)
    tokens = calibration_set(TextSpec(str(path), 2 * 24, 24), tokenizer)
    content = tokens.tokens[:, 1:] if tokens.bos else tokens.tokens
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(content.flatten().tolist())


def test_jsonl_is_cut_at_line_feeds_alone(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"text": "One.\u2028Two.\u0085" * 30}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert calibration_set(TextSpec(str(path), 2 * 16, 16), tokenizer).tokens.shape == (2, 16)
    path.write_text('{"text": null}\n')
    with pytest.raises(CalibrationError, match="line 1"):
        calibration_set(TextSpec(str(path), 2 * 16, 16), tokenizer)


def test_a_hub_data_set(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": f"Tom has {n} red cars. " * 9}) + "\n" for n in range(9))
    )
    text = TextSpec(f"hub:{tmp_path}", tokens=4 * 16, sequence_length=16)
    assert calibration_set(text, tokenizer).tokens.shape == (4, 16)


def test_a_hub_data_set_whose_text_is_no_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": ["a turn", "another"]}) + "\n")
    text = TextSpec(f"hub:{tmp_path}", tokens=4 * 16, sequence_length=16)
    with pytest.raises(CalibrationError, match="column 'text' holds list, not strings"):
        calibration_set(text, tokenizer)


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"tokens": 4, "sequence_length": 1}, {"tokens": 100}, {"fit_tokens": 0}]
)
def test_nothing_to_score_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"tokens = |sequence-length = "):
        TextSpec(**options)


def test_a_held_out_text_may_lie_in_the_home_folder(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("Lily went to the park. " * 20)
    assert len(HeldOut(16, source="~/text.txt").windows(tokenizer).tokens) > 1


def test_wikitext2_is_one_text_in_windows(tokenizer: Any) -> None:
    whole = HeldOut(256).windows(tokenizer)
    few = HeldOut(256, max_tokens=1100).windows(tokenizer)
    assert few.tokens.shape == (4, 256)
    assert np.array_equal(few.tokens, whole.tokens[:4])
    assert len(whole.tokens) > 1500
    assert "Robert Boulter" in tokenizer.decode(few.tokens[0])
    assert whole.describe().startswith(f"{len(whole.tokens)} x 256 tokens of WikiText-2 test")
    with pytest.raises(CalibrationError, match="no window of 256 tokens fits into 100 tokens"):
        HeldOut(256, max_tokens=100).windows(tokenizer)
    for length, tokens, wrong in ((0, None, "scored"), (1, None, "scored"), (16, 0, "into 0"), (16, -5, "into -5")):
        with pytest.raises(CalibrationError, match=wrong):
            HeldOut(length, max_tokens=tokens).windows(tokenizer)
