from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.telemetry.secrets import MIN_CHARACTERS, REDACTED, Redactor, SecretFilter
from schemas.config import RunConfig, parse_config

PRINTABLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=MIN_CHARACTERS, max_size=60)


def config(**settings: object) -> RunConfig:
    source = {"name": "s", "format": "jsonl", "path": "s.jsonl"}
    return parse_config({"name": "c", "workdir": "w", "sources": [source], **settings})


@given(secret=PRINTABLE, before=st.text(max_size=20), after=st.text(max_size=20))
def test_a_known_secret_is_never_left_in_a_text(secret: str, before: str, after: str) -> None:
    text = Redactor([secret]).text(before + secret + after)
    assert secret not in text.replace(REDACTED, "\0")


@given(secret=PRINTABLE, name=st.text(max_size=5))
def test_a_secret_is_found_wherever_a_value_holds_it(secret: str, name: str) -> None:
    value = {secret: [{name: (f"x{secret}y", {secret}, ValueError(secret))}], "n": 3, "f": float("inf")}
    assert secret not in repr(Redactor([secret]).value(value)).replace(REDACTED, "\0")


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer {}",
        "{{'Authorization': 'Bearer {}'}}",
        '{{"authorization": "Basic {}"}}',
        '"{{\\"Authorization\\": \\"Bearer {}\\"}}"',
        "authorization={}",
        "sent bearer {} to it",
        "api_key={}",
        "X-API-Key: {}",
        "https://host/v1?api_key={}&model=m",
        "password: '{}'",
        "postgresql+asyncpg://prefect:{}@db:5432/prefect",
        "redis://:{}@cache",
    ],
)
def test_a_secret_that_nobody_knows_is_told_by_how_it_is_written(text: str) -> None:
    assert "Tr0ub4dor-3" not in Redactor().text(text.format("Tr0ub4dor-3"))


@pytest.mark.parametrize("key", ["sk-proj-0123456789abcdef", "hf_0123456789abcdefXYZ", "ghp_0123456789abcdefghijkl"])
def test_keys_of_well_known_services_are_told_by_their_form(key: str) -> None:
    assert key not in Redactor().text(f"refused {key}")


@pytest.mark.parametrize(
    "text",
    [
        "12 rows in 3 shards, 40 tokens/s",
        "http://127.0.0.1:8000/v1 does not answer",
        "the key is in the environment variable BIMODE_API_KEY",
        "a basic question: why is it blue?",
        "mail@example.org",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert Redactor(["Tr0ub4dor-3"]).text(text) == text


def test_secrets_are_those_of_the_variables_that_endpoints_name_and_of_all_called_like_one() -> None:
    run = config(
        teacher={"api_key_env": "LEFT"},
        reasoner={"api_key_env": "RIGHT"},
        difficulty={"panel": [{"model": "m", "api_key_env": "THIRD"}]},
    )
    environment = {
        "LEFT": "left-value",
        "RIGHT": " right-value ",
        "THIRD": "third-value",
        "AWS_SECRET_ACCESS_KEY": "aws-value",
        "HF_TOKEN": "hub-value",
        "PREFECT_SERVER_API_AUTH_STRING": "admin:prefect-value",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-team=first-value,x-other=second-value",
        "HOME": "/home/someone",
        "SHORT_TOKEN": "row",
    }
    text = " ".join([*environment.values(), "first-value"])
    redacted = Redactor.of(run, environment).text(text)
    assert not [value for value in environment.values() if "value" in value and value.strip() in redacted]
    assert "first-value" not in redacted and "second-value" not in redacted
    assert "/home/someone" in redacted and "row" in redacted


def test_a_record_is_redacted_with_its_arguments_and_its_exception() -> None:
    try:
        raise RuntimeError("refused: Tr0ub4dor-3")
    except RuntimeError as error:
        record = logging.LogRecord(
            "a", logging.ERROR, "f", 1, "with %s", ("Tr0ub4dor-3",), (RuntimeError, error, error.__traceback__)
        )
    assert SecretFilter(Redactor(["Tr0ub4dor-3"])).filter(record)
    text = logging.Formatter("%(message)s").format(record)
    assert "Tr0ub4dor-3" not in text and text.startswith(f"with {REDACTED}\nTraceback") and "RuntimeError" in text


def test_a_record_whose_arguments_do_not_fit_is_redacted_and_passed_on() -> None:
    record = logging.LogRecord("a", logging.ERROR, "f", 1, "%d Tr0ub4dor-3", ("x", "y"), None)
    assert SecretFilter(Redactor(["Tr0ub4dor-3"])).filter(record)
    assert "Tr0ub4dor-3" not in str(record.msg)
