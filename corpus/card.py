"""The dataset card: README.md of a version, which people read and `datasets` takes the configurations from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from corpus.report import TOPIC_NAMES, percent, plain_text, whole
from corpus.tally import CorpusTally
from corpus.versions import VersionChange
from corpus.writer import ShardInfo, corpus_features
from schemas.fates import StageCount
from schemas.template import render_completion
from schemas.verdicts import Mode

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
_LOGGED_VERSIONS = 30
"""Lines of the change log that the card shows; the manifest has them all."""


@dataclass(frozen=True, slots=True)
class ModeSize:
    """The rows of one mode, and the bytes of their files."""

    num_rows: int
    num_bytes: int

    def __add__(self, other: ModeSize) -> ModeSize:
        return ModeSize(self.num_rows + other.num_rows, self.num_bytes + other.num_bytes)


def mode_sizes(shards: Iterable[ShardInfo]) -> dict[str, ModeSize]:
    """Returns the size of each mode of a corpus. A shard holds rows of one mode."""
    sizes = {str(mode): ModeSize(0, 0) for mode in Mode}
    for shard in shards:
        mode = Mode.THINK if shard.num_think else Mode.DIRECT
        sizes[mode] += ModeSize(shard.num_rows, shard.num_bytes)
    return sizes


@dataclass(frozen=True, slots=True)
class CardInputs:
    """What a card is made of.

    licence: as configured. recipe: digest. teacher, reasoner: model names, "" where none. sizes: by mode. `datasets`
    keeps what it loaded under a key of the card and the folder's name alone, and without sizes would go on giving out
    the version that `latest` meant yesterday. history: the change log, oldest first, this version last.
    """

    name: str
    version: str
    created: str
    licence: str
    recipe: str
    teacher: str
    reasoner: str
    stages: Mapping[str, StageCount]
    tally: CorpusTally
    sizes: Mapping[str, ModeSize]
    history: Sequence[VersionChange] = ()


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
        changes=list(reversed(inputs.history))[:_LOGGED_VERSIONS],
        num_earlier=max(0, len(inputs.history) - _LOGGED_VERSIONS),
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
    infos = {name: _dataset_info(name, inputs.sizes) for name in DATA_FILES}
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return data.to_yaml().strip()


def _dataset_info(name: str, sizes: Mapping[str, ModeSize]) -> DatasetInfo:
    """Returns the columns and the size of a configuration; of one without rows, which has no split, the columns."""
    size = sum((size for mode, size in sizes.items() if name in ("all", mode)), ModeSize(0, 0))
    info = DatasetInfo(features=corpus_features(), config_name=name)
    if size.num_rows:
        info.splits = SplitDict()
        info.splits.add(SplitInfo("train", size.num_bytes, size.num_rows))
        info.download_size = info.dataset_size = size.num_bytes
    return info
