"""Settings that one run has otherwise than its configuration file: the form of Prefect's UI, and its validation.

`RunOverrides` is made of the configuration model, so that the form's names, types, limits and descriptions are those of
`schemas.config` and cannot go stale. It has no defaults: what is left out stays as the file says. It holds what one may
want to try in a run (labels, checks, limits). Left out on purpose: sources, teachers and places, which belong into a
file, and settings that take more than one type, for which forms have no field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
)
from pydantic.fields import FieldInfo

from schemas.config import RunConfig
from schemas.settings import wrong_settings

SETTINGS = ("max_quarantine_share", "seed", "parallel_shards")
SECTIONS = ("duplicates", "routing", "difficulty", "performance", "verification", "reasoning", "direct")
_PLAIN = (bool, int, float, str)


class Overrides(BaseModel):
    """Some settings of a section, or of the whole configuration; None leaves what the file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Returns what is given, without empty parts: what Prefect keeps of a run is what was chosen."""
        return {name: value for name, value in serialize(self).items() if value is not None and value != {}}


def parse_overrides(raw: Mapping[str, Any]) -> Overrides:
    """Returns the overrides of a plain mapping. Raises ConfigError: a setting is unknown or has a wrong value."""
    try:
        return RunOverrides.model_validate(raw)
    except ValidationError as error:
        raise wrong_settings("overrides", error) from None  # its own message shows values


def overridden(config: RunConfig, overrides: Overrides) -> RunConfig:
    """Returns the configuration with the given settings in place of its own, checked as a whole.

    Raises ConfigError: the settings do not fit together, e.g. fixed waves with fewer samples than `num_samples`.
    """
    given = overrides.model_dump()
    if not given:
        return config
    try:
        return RunConfig.model_validate(_merged(config.model_dump(), given))
    except ValidationError as error:
        raise wrong_settings(f"the configuration with {', '.join(described(given))}", error) from None


def described(given: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yields each given setting by its dotted name, with its value."""
    for name, value in given.items():
        if isinstance(value, dict):
            yield from described(value, f"{before}{name}.")
        else:
            yield f"{before}{name} = {value!r}"


def _merged(settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in given.items():
        merged[name] = _merged(merged[name], value) if isinstance(value, dict) else value
    return merged


def _section(name: str) -> Any:
    """Returns the field of a section, all of whose settings may be left out."""
    section = RunConfig.model_fields[name].annotation
    assert isinstance(section, type) and issubclass(section, BaseModel), f"{name} is no section"
    fields = {key: _setting(field) for key, field in section.model_fields.items() if _has_one_plain_type(field)}
    title, text = f"{section.__name__.removesuffix('Config')}Overrides", (section.__doc__ or "").strip()
    model = create_model(title, __base__=Overrides, __doc__=text, **fields)
    return model | None, Field(None, title=name.capitalize(), description=text, json_schema_extra=_with_one_type)


def _setting(field: FieldInfo) -> Any:
    """Returns a field of the same type, limits and description that may be left out, and then is None."""
    default = field.get_default(call_default_factory=True)
    shown = "nothing" if default in (None, []) else str(default).lower() if isinstance(default, bool) else default
    text = f"{field.description} Left empty: what the file says, else {shown}."
    kept: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    extra = _as_choice if field.annotation is bool else _with_one_type
    return kept | None, Field(None, description=text, json_schema_extra=extra)


def _has_one_plain_type(field: FieldInfo) -> bool:
    """Returns whether forms have a field for a setting: a number, a text, a choice, or a list of those."""
    kind: Any = field.annotation
    if get_origin(kind) is list:
        [kind] = get_args(kind)
        kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return kind in _PLAIN or get_origin(kind) is Literal


def _with_one_type(schema: dict[str, Any]) -> None:
    """Takes None and the default out of a JSON schema.

    A form would offer None as a second type, and fill the default in and send it as if someone had chosen it.
    """
    del schema["default"]
    [kind] = [kind for kind in schema.pop("anyOf") if kind != {"type": "null"}]
    schema.update(kind)


def _as_choice(schema: dict[str, Any]) -> None:
    """Makes a form offer true and false to choose from: its switch would show a setting that is left out as off."""
    _with_one_type(schema)
    del schema["type"]
    schema["enum"] = [True, False]


if TYPE_CHECKING:
    RunOverrides = Overrides
else:
    RunOverrides = create_model(
        "RunOverrides",
        __base__=Overrides,
        __doc__="Settings for this run alone, in place of those of the configuration file.",
        **{name: _setting(RunConfig.model_fields[name]) for name in SETTINGS},
        **{name: _section(name) for name in SECTIONS},
    )
