"""The command line as its user sees it: what is documented, what --help says, how errors end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flows import cli

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
NAMES = [command.__name__.replace("_", "-") for command in cli.COMMANDS]


def help_of(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", NAMES)
def test_a_command_is_in_the_readme_and_in_the_overview(name: str) -> None:
    assert f"bimode {name}" in README, f"the README does not say what `bimode {name}` is for"
    assert re.search(rf"^ *bimode {name}\b.+  +\w", cli.__doc__ or "", re.MULTILINE), f"flows/cli.py leaves {name} out"


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_help_options_with_help_and_examples_that_it_takes(name: str) -> None:
    text = help_of(name)
    assert re.search(r"Examples?:\n", text)
    examples = re.findall(rf"^ +bimode {name}\b(.*)$", text, re.MULTILINE)
    assert examples, f"no example shows bimode {name}"
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    assert command.help
    options = {option for parameter in command.params for option in parameter.opts}
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.param_type_name == "argument", parameter.name
    used = {option for example in examples for option in re.findall(r"(?<!\S)(--[\w-]+)", example)}
    assert used <= options, f"the examples use options that do not exist: {used - options}"


def test_each_group_of_commands_is_documented_too() -> None:
    groups = {group.typer_instance.info.name: group.typer_instance for group in cli.app.registered_groups}
    for name, group in groups.items():
        assert f"bimode {name}" in README
        assert re.search(rf"^ *bimode {name}\b.+  +\w", cli.__doc__ or "", re.MULTILINE)
        assert re.findall(rf"^ +bimode {name} \w+", help_of(str(name)), re.MULTILINE), "examples"
        for command in group.registered_commands:
            assert help_of(str(name), str(command.name or command.callback.__name__))  # type: ignore[union-attr]


def test_the_overview_keeps_its_lines() -> None:
    text = help_of()
    for line in re.findall(r"^bimode .+$", cli.__doc__ or "", re.MULTILINE):
        assert line in text


def test_an_unknown_command_or_option_is_wrong_use() -> None:
    assert CliRunner().invoke(cli.app, ["curat"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["curate", "--confg", "x"]).exit_code == 2


def test_an_error_meant_for_the_user_has_no_traceback_and_its_own_status(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["summary", "--config", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
