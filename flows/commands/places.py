"""Where the versions lie that a command looks at: options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError

OptionalConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The run configuration, a YAML file; its corpus folder is looked at.")
]
CorpusOption = Annotated[
    str | None, typer.Option("--corpus", help="The corpus folder, or an address such as s3://bucket/corpus.")
]


def versions_folder(config: Path | None, corpus: str | None) -> str | Path | None:
    """Returns the corpus folder, or the address, that the options name; None if they name none.

    Raises ConfigError: both are given, or the configuration is wrong.
    """
    from flows.run_config import corpus_folder, load_run  # noqa: PLC0415 - takes a second to import

    if config is not None and corpus is not None:
        raise ConfigError("--config and --corpus both name a corpus folder: leave one out")
    return corpus if config is None else corpus_folder(load_run(str(config)))
