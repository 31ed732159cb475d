"""`bimode export`: a corpus version in the format of another trainer, on a disk or an object store."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.options import JsonOption, examples, print_json, say, user_errors
from schemas.errors import ConfigError
from schemas.verdicts import Mode

if TYPE_CHECKING:
    from corpus.exports import Exported

EXAMPLES = examples(
    "bimode export llama-factory --config my.yaml --output exports/llama-factory",
    "bimode export ms-swift --corpus runs/demo/corpus/v0001 --output exports/ms-swift",
    "bimode export llava --corpus runs/demo/corpus --mode think --output exports/llava",
    "bimode export webdataset --corpus s3://bucket/corpus --output s3://bucket/shards --shard-rows 5000",
)

_SECONDS_BETWEEN_LINES = 5.0
_NAME_CHARACTERS = 120


class Kind(StrEnum):
    """The formats by the names that the command line knows."""

    LLAVA = "llava"
    LLAMA_FACTORY = "llama-factory"
    MS_SWIFT = "ms-swift"
    WEBDATASET = "webdataset"


class ModeChoice(StrEnum):
    ALL = "all"
    THINK = "think"
    DIRECT = "direct"


def export(
    kind: Annotated[Kind, typer.Argument(metavar="FORMAT", help="llava, llama-factory, ms-swift or webdataset.")],
    output: Annotated[str, typer.Option(help="An empty folder, or an address such as s3://bucket/folder.")],
    config: Annotated[
        Path | None, typer.Option("--config", help="The run configuration whose newest corpus is exported.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Or a corpus folder, one of its versions, or the address of either.")
    ] = None,
    mode: Annotated[ModeChoice, typer.Option(help="Export the rows of one mode alone.")] = ModeChoice.ALL,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a file. By default all in one file; 1,000 in a webdataset's tar."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the export that is in the folder; never anything else.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a corpus in the format of another trainer.

    TRL and `datasets` need no export: a corpus version is Parquet that both load as it is.

    Rows that a format cannot hold are counted and named in `left_out.jsonl`. An interrupted export has no
    `export.json`; the same command starts it again. Credentials of an object store come from the environment.
    """
    from corpus.exports import FORMATS, export_corpus, open_version  # noqa: PLC0415 - takes seconds to import

    with user_errors():
        version = open_version(_corpus(config, corpus))
        exported = export_corpus(
            version,
            FORMATS[kind],
            output,
            modes=tuple(Mode) if mode is ModeChoice.ALL else (Mode(mode),),
            shard_rows=shard_rows,
            overwrite=overwrite,
            progress=_Progress().show,
        )
        if as_json:
            print_json({"folder": exported.folder, "is_new": exported.is_new, **exported.to_record()})
        else:
            print(_text(exported))


def _corpus(config: Path | None, corpus: str | None) -> str:
    if (config is None) == (corpus is None):
        raise ConfigError("say what to export: either --config my.yaml or --corpus FOLDER")
    if corpus is not None:
        return corpus
    from flows.run_config import corpus_address, corpus_folder, load_run  # noqa: PLC0415

    settings = load_run(str(config))
    return corpus_address(settings) or str(corpus_folder(settings))


class _Progress:
    """Says every few seconds how far an export is, and when it has all rows."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def show(self, num_done: int, num_rows: int) -> None:
        now = time.monotonic()
        if num_done < num_rows and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = num_done / max(now - self._began, 1e-3)
        say(f"{num_done:,} of {num_rows:,} rows ({num_done / num_rows:.0%}), {rate:,.0f} rows/s")


def _text(exported: Exported) -> str:
    from corpus.shown_text import plain_text  # noqa: PLC0415

    corpus = plain_text(exported.corpus, _NAME_CHARACTERS).text
    lines = [
        f"export         {exported.folder}" + ("" if exported.is_new else " (was there already)"),
        f"rows           {exported.num_rows:,} of {corpus} {exported.version}, {exported.num_think:,} of them thinking",
    ]
    if exported.num_several or exported.num_text_only:
        lines.append(f"images         {exported.num_several:,} rows have several, {exported.num_text_only:,} none")
    if exported.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in exported.left_out.items())
        lines.append(f"left out       {reasons}; named in left_out.jsonl")
    return "\n".join([*lines, "how to train   README.md in the export"])
