"""What is watched of a run and where it goes, from the environment: Prefect's workers start our code, not a command.

Traces have the standard variables of OpenTelemetry (`flows.telemetry.tracing`). docs/observability.md shows all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from schemas.settings import wrong_settings

_PORTS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def _ports(given: Any) -> Any:
    """Returns the ports of "9464" or "9464-9471". Raises ValueError."""
    if not isinstance(given, str):
        return given
    found = _PORTS.fullmatch(given.strip())
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last < 2**16:
        raise ValueError("must be a port (9464) or a range of ports (9464-9471)")
    return tuple(range(first, last + 1))


def _in_lower_case(given: Any) -> Any:
    return given.strip().lower() if isinstance(given, str) else given


class TelemetrySettings(BaseModel):
    """Each setting is the environment variable BIMODE_ with its name in capitals. An empty one counts as not set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_format: Annotated[Literal["text", "json"], BeforeValidator(_in_lower_case)] = Field(
        "text", description="`json` writes one JSON object a line instead of Prefect's text."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Lowest level of the pipeline's own messages."
    )
    log_file: Path | None = Field(
        None, description="File of the JSON lines, relative to the work folder; without one they go to stderr."
    )
    metrics_port: Annotated[tuple[int, ...], BeforeValidator(_ports)] = Field(
        (), description="Port of /metrics, or a range of which each process takes the first that is free."
    )
    metrics_host: str = Field("127.0.0.1", description="Interface on which /metrics listens; 0.0.0.0 is all of them.")
    metrics_folder: Path | None = Field(
        None, description="Folder of node_exporter's textfile collector: what became of the last run is written there."
    )
    trace_calls: float = Field(0.01, ge=0, le=1, description="Share of the calls to the teacher that get a span.")

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> TelemetrySettings:
        """Returns the settings of the environment. Raises ConfigError: naming the variable and its value."""
        variables = {f"BIMODE_{name.upper()}": name for name in cls.model_fields}
        given = {name: environment[variable] for variable, name in variables.items() if environment.get(variable)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            names = ", ".join(f"BIMODE_{str(problem['loc'][0]).upper()}" for problem in error.errors())
            raise wrong_settings(f"the environment ({names})", error) from None  # its own message shows values
