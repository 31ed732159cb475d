"""The dataset card: valid metadata, and text that data cannot break out of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml
from datasets import Features
from huggingface_hub import DatasetCard

from corpus.card import CardInputs, ModeSize, build_card, escaped_name, size_category
from corpus.tally import CorpusTally, ModeCount, SourceLicence
from corpus.writer import corpus_features
from schemas.fates import StageCount


def card(**changes: Any) -> str:
    values: dict[str, Any] = {
        "name": "demo",
        "version": "v0001",
        "created": "2026-01-01T00:00:00Z",
        "licence": "other",
        "recipe": "abc",
        "teacher": "Qwen/Qwen2.5-VL-32B-Instruct",
        "reasoner": "",
        "stages": {"sources": StageCount(10, 8, Counter(a=1), Counter(b=1))},
        "tally": CorpusTally(
            rows=ModeCount(2, 6),
            by_topic={"math": ModeCount(2, 6)},
            licences=(SourceLicence("gsm8k", "MIT", 8),),
        ),
        "sizes": {"think": ModeSize(2, 700), "direct": ModeSize(6, 1300)},
    }
    return build_card(CardInputs(**{**values, **changes}))


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_front_matter_names_configurations_features_and_licence() -> None:
    data = front_matter(card())
    assert (data["license"], data["size_categories"]) == ("other", ["n<1K"])
    assert [(c["config_name"], c["data_files"][0]["path"], c.get("default")) for c in data["configs"]] == [
        ("all", "data/*/*.parquet", True),
        ("think", "data/think/*.parquet", None),
        ("direct", "data/direct/*.parquet", None),
    ]
    assert [info["config_name"] for info in data["dataset_info"]] == ["all", "direct", "think"]
    for info in data["dataset_info"]:
        assert Features._from_yaml_list(info["features"]) == corpus_features()


def test_the_hub_s_own_reader_accepts_the_card() -> None:
    assert DatasetCard(card()).data.license == "other"


def test_the_card_tells_counts_template_and_licences() -> None:
    text = card()
    assert "10 rows were read; 1 were dropped by the recipe, 1 quarantined by\nerrors, and 8 are here" in text
    assert "| Math and K12 | 6 | 2 | 8 | 25.0 % |" in text
    assert "| gsm8k | MIT | 8 |" in text
    assert "<think>\n\n</think>7\n```" in text
    assert 'load_dataset("path/to/this/folder", "all", split="train")' in text


def test_names_from_data_cannot_break_table_or_metadata() -> None:
    hostile = "a|b\n---\nlicense: x\n<img src=x> [l](javascript:x) `c` \x1b\ud800"
    text = card(
        name=hostile,
        teacher=hostile,
        licence="no\n---\nx: y",
        tally=CorpusTally(rows=ModeCount(0, 1), licences=(SourceLicence(hostile, hostile, 1),)),
    )
    text.encode("utf-8")
    assert front_matter(text)["license"] == "no --- x: y"
    body = text.split("\n---\n", 1)[1]
    assert "<img" not in body.replace("\\<img", "")
    row = next(line for line in text.splitlines() if line.endswith(" 1 |") and "javascript" in line)
    assert row.count("|") - row.count("\\|") == 4


def test_an_empty_corpus_has_a_card() -> None:
    assert "0 questions" in card(stages={}, tally=CorpusTally(), sizes={})


@pytest.mark.parametrize(
    ("num_rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (16_370_000, "10M<n<100M"), (2 * 10**9, "1B<n<10B")],
)
def test_sizes_are_the_hub_s_categories(num_rows: int, category: str) -> None:
    assert size_category(num_rows) == category


def test_a_name_is_one_line_without_markup() -> None:
    assert escaped_name("a_b|c\nd") == r"a\_b\|c d"
    assert len(escaped_name("x" * 10_000)) == 121


def test_the_card_tells_the_size_of_each_configuration() -> None:
    infos = {info["config_name"]: info for info in front_matter(card())["dataset_info"]}
    assert infos["all"]["splits"] == [{"name": "train", "num_bytes": 2000, "num_examples": 8}]
    assert infos["think"]["splits"] == [{"name": "train", "num_bytes": 700, "num_examples": 2}]
    assert (infos["direct"]["download_size"], infos["direct"]["dataset_size"]) == (1300, 1300)
    assert "splits" not in front_matter(card(sizes={}))["dataset_info"][0]
