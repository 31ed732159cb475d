"""`bimode up` and `bimode down`: Prefect's server, a worker and the teacher on this machine."""

from __future__ import annotations

from flows.commands.options import ConfigOption, examples, say, user_errors

UP_EXAMPLES = examples("bimode up --config sampleworld/demo.yaml")
DOWN_EXAMPLES = examples("bimode down")


def up(config: ConfigOption) -> None:
    """Start Prefect's server, the deployments, a worker and the teacher on this machine, as far as they do not run."""
    from flows import stack  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        info = stack.up(config, report=say)
    print(f"Prefect UI: {info.api_url.removesuffix('/api')}")


def down() -> None:
    """Stop everything that `bimode up` started on this machine; all data stays."""
    from flows import stack  # noqa: PLC0415 - Prefect takes seconds to import

    with user_errors():
        stack.down(report=say)
