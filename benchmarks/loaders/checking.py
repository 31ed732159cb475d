"""Runs a tool's own loader on an export and compares what it made of each row with the corpus, byte for byte.

The tools and the project want different versions of the same libraries, and so do the tools of one another: each has
an environment of its own in .venv-loaders, built from the lock beside this file:

    python3.11 -m venv .venv-loaders/NAME
    .venv-loaders/NAME/bin/pip install --no-deps -r benchmarks/loaders/NAME.txt

Where plain torch is the CUDA build and there is no GPU, pass PyTorch's CPU index to pip.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corpus.exports import FORMATS, CorpusVersion, Exported, export_corpus
from corpus.exports.rows import ExportRow, read_rows
from schemas.verdicts import Mode

ROOT = Path(__file__).parents[2]
TOOLS = ("llama-factory", "ms-swift")
MODEL = ROOT / "sampleworld" / "teacher"
"""A small Qwen2.5-VL whose tokenizer has the think tags as tokens."""

_TURN_ENDS = "<|im_end|>\n"
_TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class LoaderRun:
    """What a loading script is told. data: the export's file of rows. options: further arguments of the tool.

    template: the tool's name of a chat template, None for that of Qwen2.5-VL. num_steps: of training, 0 for none.
    """

    model: str
    export: str
    data: str
    dataset: str
    output: str
    cache: str
    template: str | None = None
    num_steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadedRow:
    """A row as a tool gives it to the model. learned: the text under the loss. images: names of its files."""

    input: str
    learned: str
    images: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a tool made of an export. losses: of the training steps. version: of the tool."""

    version: str
    rows: tuple[LoadedRow, ...]
    losses: tuple[float, ...]


def why_missing(tool: str) -> str | None:
    """Returns why a tool cannot be run here; None if it can."""
    python = _python(tool)
    if python.exists():
        return None
    return f"no {python.relative_to(ROOT)}: benchmarks/loaders/checking.py says how to build this environment"


def load_export(
    tool: str,
    exported: Exported,
    folder: Path,
    *,
    num_steps: int = 0,
    template: str | None = None,
    options: dict[str, Any] | None = None,
) -> Loaded:
    """Returns what a tool makes of an export. folder: for what it writes.

    Raises RuntimeError: the tool failed; the message ends with the last lines it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings, result, log = folder / "settings.json", folder / "result.json", folder / "log.txt"
    run = LoaderRun(
        model=str(MODEL),
        export=exported.folder,
        data=f"{exported.folder}/{'train' if exported.shard_rows else exported.files[0].path}",
        dataset=_dataset_of(exported),
        output=str(folder / "output"),
        cache=str(folder / "cache"),
        template=template,
        num_steps=num_steps,
        options=options or {},
    )
    settings.write_text(json.dumps(asdict(run)))
    script = Path(__file__).parent / f"load_{tool.replace('-', '_')}.py"
    with log.open("wb") as output:
        process = subprocess.run(
            [_python(tool), script, settings, result],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(folder),
            cwd=folder,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    if process.returncode != 0:
        raise RuntimeError(f"{tool} failed with status {process.returncode}:\n{log.read_text()[-4000:]}")
    record = json.loads(result.read_text())
    rows = tuple(LoadedRow(row["input"], row["learned"], tuple(row["images"])) for row in record["rows"])
    return Loaded(record["version"], rows, tuple(record["losses"]))


def export_for(tool: str, version: CorpusVersion, folder: Path, *, shard_rows: int | None = None) -> Exported:
    return export_corpus(version, FORMATS[tool], folder, shard_rows=shard_rows)


def exported_rows(version: CorpusVersion, exported: Exported) -> list[ExportRow]:
    """Returns the rows of a version that are in an export of JSON Lines, in its order."""
    of_id = {row.id: row for row in read_rows(version, tuple(Mode))}
    texts = [(Path(exported.folder) / file.path).read_text(encoding="utf-8") for file in exported.files]
    return [of_id[json.loads(line)["id"]] for text in texts for line in text.split("\n")[:-1]]


def differences(rows: Sequence[ExportRow], loaded: Sequence[LoadedRow]) -> list[str]:
    """Returns one line for each row that a tool did not give to the model as it stands in the corpus.

    The loss must lie on the completion and the end of the turn, and on nothing else; the prompt must be the question
    with its images before it and no turn of a system.
    """
    problems = [] if len(rows) == len(loaded) else [f"{len(loaded)} rows were loaded, {len(rows)} were exported"]
    for row, found in zip(rows, loaded, strict=False):
        if found.learned != row.completion + _TURN_ENDS:
            problems.append(f"{row.id}: learns {found.learned!r} instead of {row.completion!r}")
        asked = "".join(part for part in row.prompt if part is not None)
        question = f"{asked}<|im_end|>\n<|im_start|>assistant\n{row.completion}{_TURN_ENDS}"
        if not found.input.endswith(question) or not found.input.startswith("<|im_start|>user\n"):
            problems.append(f"{row.id}: reads {found.input!r}")
        elif found.input.count("<|vision_start|>") != len(row.images) or len(found.images) != len(row.images):
            problems.append(f"{row.id}: sees other images than its {len(row.images)}")
    return problems


def _python(tool: str) -> Path:
    return ROOT / ".venv-loaders" / tool / "bin" / "python"


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "huggingface"),
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT / "teacher" / "cpu_site"),
    }


def _dataset_of(exported: Exported) -> str:
    info = Path(exported.folder) / "dataset_info.json"
    return str(next(iter(json.loads(info.read_text())))) if info.exists() else ""
