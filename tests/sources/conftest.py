"""What the tests of sources share: writing small sources, and reading them whole."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from schemas.config import RunConfig, parse_config
from schemas.fates import Fate
from schemas.samples import Sample
from sources import ImageStore, Unit, plan_units, read_unit


def png(colour: str = "red", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Outcome:
    units: list[Unit]
    samples: list[Sample]
    fates: list[Fate]

    @property
    def reasons(self) -> list[str]:
        return [fate.reason for fate in self.fates]


@dataclass(frozen=True)
class Bench:
    """A folder to write sources in, and the reading of them."""

    folder: Path

    def lines(self, *rows: object, name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    def config(self, path: object, *, shard_rows: int = 1000, stored_as: str = "jsonl", **settings: Any) -> RunConfig:
        source = {"name": "s", "format": stored_as, "path": str(path), **settings}
        return parse_config({"sources": [source], "shard_rows": shard_rows, "images": {"max_pixels": 10_000}})

    def read(self, path: object, **settings: Any) -> Outcome:
        config = self.config(path, **settings)
        store = ImageStore(self.folder / ".images", config.images)
        units = plan_units(config)
        samples: list[Sample] = []
        fates: list[Fate] = []
        for unit in units:
            assert Unit.from_record(json.loads(json.dumps(unit.to_record()))) == unit
            kept, bad = read_unit(unit, config, store)
            assert len(kept) + len(bad) == unit.num_rows
            samples += kept
            fates += bad
        return Outcome(units, samples, fates)

    def only(self, row: object, **columns: str) -> Sample | str:
        """Returns the sample of a row that stands beside a sound one, or the reason why it is none."""
        sound = {"question": "sound", **{name.partition(".")[0]: None for name in columns.values()}}
        outcome = self.read(self.lines(sound, row), columns=columns)
        return outcome.samples[1] if len(outcome.samples) == 2 else outcome.reasons[0]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return png
