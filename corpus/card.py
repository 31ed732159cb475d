"""The dataset card: README.md of a version, which people read and `datasets` takes the configurations from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from corpus.report import TOPIC_NAMES, percent, plain_text, whole
from corpus.tally import CorpusTally
from corpus.writer import corpus_features
from schemas.fates import StageCount
from schemas.template import render_completion

DATA_FILES: Mapping[str, str] = {
    "all": "data/*/*.parquet",
    "think": "data/think/*.parquet",
    "direct": "data/direct/*.parquet",
}
"""The configurations of `datasets.load_dataset` and their files; "all" is the default one."""

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_LARGER_SIZES = ((10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
_MARKUP = re.compile(r"([\\`*_\[\]<>|&#~])")
_NAME_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class CardInputs:
    """What a card is made of. licence: as configured. recipe: digest. teacher, reasoner: model names, "" where none."""

    name: str
    version: str
    created: str
    licence: str
    recipe: str
    teacher: str
    reasoner: str
    stages: Mapping[str, StageCount]
    tally: CorpusTally


def build_card(inputs: CardInputs) -> str:
    """Returns the text of README.md: YAML front matter, then Markdown. Names that came from data are escaped."""
    environment = Environment(  # noqa: S701 - Markdown, not HTML; names are escaped by the filter "name"
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"whole": whole, "percent": percent, "name": escaped_name}
    body = environment.get_template("card.md.jinja").render(
        card=inputs,
        tally=inputs.tally,
        topic_names=TOPIC_NAMES,
        rows_in=next((count.num_in for count in inputs.stages.values()), 0),
        dropped=sum(count.num_dropped for count in inputs.stages.values()),
        quarantined=sum(count.num_quarantined for count in inputs.stages.values()),
        think_example=render_completion("7", "The red cell shows 3 and the blue one 4. 3 + 4 = 7."),
        direct_example=render_completion("7"),
    )
    return f"---\n{_front_matter(inputs)}\n---\n\n{body.strip()}\n"


def size_category(num_rows: int) -> str:
    """Returns the Hub's name for a number of rows."""
    return next((name for limit, name in (*_SIZES, *_LARGER_SIZES) if num_rows < limit), "1B<n<10B")


def escaped_name(name: str) -> str:
    """Returns a name from data as one line of Markdown without markup of its own."""
    return _MARKUP.sub(r"\\\1", _one_line(name))


def _one_line(name: str) -> str:
    return " ".join(plain_text(name, _NAME_CHARACTERS).text.split())


def _front_matter(inputs: CardInputs) -> str:
    data = DatasetCardData(
        license=_one_line(inputs.licence),  # A line "---" would end the front matter.
        pretty_name=_one_line(f"{inputs.name} {inputs.version}"),
        task_categories=["image-text-to-text", "visual-question-answering"],
        size_categories=[size_category(inputs.tally.rows.total)],
        tags=["multimodal", "reasoning", "auto-thinking", "bi-mode", "r-4b", "sft", "trl"],
        configs=[
            {
                "config_name": name,
                "data_files": [{"split": "train", "path": path}],
                **({"default": True} if name == "all" else {}),
            }
            for name, path in DATA_FILES.items()
        ],
    )
    features = corpus_features()
    infos = {name: DatasetInfo(features=features, config_name=name) for name in DATA_FILES}
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return data.to_yaml().strip()
