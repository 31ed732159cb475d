"""A run's configuration with its places made absolute, and where its versions lie.

Here and not beside the flow, as commands that only look at a run need no Prefect, which takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corpus.places import is_address
from flows.stack import project_folder
from schemas.addresses import holds_credentials
from schemas.config import RunConfig, ServeConfig, SourceConfig, load_config
from schemas.errors import ConfigError


def load_run(config: str, *, teacher_url: str | None = None, workdir: str | None = None) -> RunConfig:
    """Returns the configuration of a file, with its addresses made absolute and overrides applied.

    Raises ConfigError.
    """
    home = project_folder().resolve()
    path = Path(config)
    loaded = load_config(path if path.is_absolute() or path.exists() else home / path)
    for name in (workdir, loaded.workdir):
        if name is not None and is_address(name):
            raise ConfigError(
                f"workdir {name!r} is an address; it must be a folder on a disk, as replies are appended and flushed "
                "one by one. Name the address as corpus.folder: versions are sent there"
            )
    teacher = loaded.teacher.model_copy(update={"url": teacher_url}) if teacher_url else loaded.teacher
    _check_addresses(loaded.model_copy(update={"teacher": teacher}))
    return loaded.model_copy(
        update={
            "teacher": teacher,
            "serve": None if teacher_url else _serve_section(loaded.serve, home),
            "sources": _placed(loaded.sources, home),
            "decontamination": loaded.decontamination.model_copy(
                update={"benchmarks": _placed(loaded.decontamination.benchmarks, home)}
            ),
            "workdir": _absolute(workdir or loaded.workdir, home),
            "corpus": loaded.corpus.model_copy(update={"folder": _absolute(loaded.corpus.folder, home)}),
        }
    )


def _check_addresses(config: RunConfig) -> None:
    """Raises ConfigError: an address holds credentials. Addresses are shown in logs, reports and manifests."""
    endpoints = {"teacher": config.teacher, "reasoner": config.reasoner_endpoint}
    endpoints |= {f"difficulty.panel.{index}": endpoint for index, endpoint in enumerate(config.difficulty.panel)}
    addresses = {f"{name}.url": [endpoint.url, *endpoint.more_urls] for name, endpoint in endpoints.items()}
    addresses["corpus.folder"] = [config.corpus.folder or ""]
    for source in [*config.sources, *config.decontamination.benchmarks]:
        addresses[f"the path or image_root of {source.name}"] = [source.path, source.image_root or ""]
    for name, values in addresses.items():
        if any(holds_credentials(value) for value in values):
            raise ConfigError(
                f"{name} holds credentials inside an address, where logs and reports would show them; they come from "
                "the environment (AWS_ACCESS_KEY_ID, ..., or the variable that api_key_env names)"
            )


def _serve_section(serve: ServeConfig | None, home: Path) -> ServeConfig | None:
    """Returns how vLLM is started. A model path that is no folder here is a name on the hub."""
    if serve is None or serve.model_path is None or not (home / serve.model_path).exists():
        return serve
    return serve.model_copy(update={"model_path": str(home / serve.model_path)})


def _placed(sources: Sequence[SourceConfig], home: Path) -> list[SourceConfig]:
    """Returns sources whose addresses are absolute."""
    return [
        source.model_copy(update={"path": _source_path(source, home), "image_root": _absolute(source.image_root, home)})
        for source in sources
    ]


def _source_path(source: SourceConfig, home: Path) -> str | None:
    """Returns where a source lies. A `datasets` source that is no folder here is a name on the hub."""
    is_hub_name = source.format == "datasets" and not (home / source.path).exists()
    return source.path if is_hub_name else _absolute(source.path, home)


def _absolute(path: str | None, home: Path) -> str | None:
    """Returns a local path made absolute from the project folder; addresses with a protocol stay as they are."""
    return path if path is None or "://" in path else str(home / path)


def corpus_folder(config: RunConfig) -> Path:
    """Returns the folder on the disk that holds the versions: where an address is configured, what is sent there."""
    folder = config.corpus.folder
    return Path(config.workdir) / "corpus" if folder is None or is_address(folder) else Path(folder)


def corpus_address(config: RunConfig) -> str | None:
    """Returns where versions are sent, None if they stay on the disk."""
    folder = config.corpus.folder
    return folder if folder is not None and is_address(folder) else None
