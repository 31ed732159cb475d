from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor

from schemas.errors import TrainingError
from schemas.template import ThinkingMode
from training.rollouts import forced_prefix, group_modes

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    return AutoProcessor.from_pretrained(small_model).tokenizer


@pytest.mark.parametrize(
    ("mode", "tokens", "mask"),
    [
        (ThinkingMode.LONG, ["<think>", "\n"], (0, 1)),
        (ThinkingMode.SHORT, ["<think>", "\n\n", "</think>"], (0, 1, 0)),
        (ThinkingMode.AUTO, ["<think>"], (0,)),
    ],
)
def test_of_a_forced_prefix_only_the_choice_carries_loss(
    tokenizer: Any, mode: ThinkingMode, tokens: list[str], mask: tuple[int, ...]
) -> None:
    prefix = forced_prefix(tokenizer, mode)
    assert [tokenizer.decode([token]) for token in prefix.token_ids] == tokens
    assert prefix.loss_mask == mask


@pytest.mark.parametrize("mode", list(ThinkingMode))
def test_with_the_choice_masked_no_forced_token_carries_loss(tokenizer: Any, mode: ThinkingMode) -> None:
    assert not any(forced_prefix(tokenizer, mode, choice_has_loss=False).loss_mask)


def test_a_group_is_g_thinking_then_g_direct_completions() -> None:
    long, short = ThinkingMode.LONG, ThinkingMode.SHORT
    assert group_modes(0, 8, 2) == [long, long, short, short, long, long, short, short]


@given(half=st.integers(1, 5), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_processes_that_share_a_batch_agree_on_its_modes(half: int, sizes: list[int]) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    shared = [mode for start, size in zip(starts, sizes, strict=True) for mode in group_modes(start, size, half)]
    assert shared == group_modes(0, sum(sizes), half)


class ForeignTokenizer:
    """A tokenizer by its words; what `special` names is stripped when decoding."""

    def __init__(self, pieces: dict[str, list[int]], special: tuple[int, ...] = ()) -> None:
        self.pieces, self.special = pieces, special

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.pieces[text]

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        names = {tuple(ids): text for text, ids in self.pieces.items()}
        return "" if set(ids) & set(self.special) else names[tuple(ids)]


def test_a_model_without_think_tokens_is_refused() -> None:
    with pytest.raises(TrainingError, match="anneal it first"):
        forced_prefix(ForeignTokenizer({"<think>": [1, 2, 3], "</think>": [4]}), ThinkingMode.LONG)


def test_think_tokens_that_decoding_strips_are_refused() -> None:
    with pytest.raises(TrainingError, match="ordinary token"):
        forced_prefix(ForeignTokenizer({"<think>": [1], "</think>": [2]}, special=(1, 2)), ThinkingMode.LONG)


def test_a_tokenizer_whose_choice_is_two_tokens_is_refused() -> None:
    pieces = {"<think>": [1], "</think>": [2], "<think>\n\n</think>": [1, 3, 3, 2]}
    with pytest.raises(TrainingError, match="not one token"):
        forced_prefix(ForeignTokenizer(pieces), ThinkingMode.SHORT)
