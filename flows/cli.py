"""The command line `bimode`.

bimode curate --config my.yaml            curate a corpus
bimode curate --config my.yaml --dry-run  say what would be asked, and what it would cost
bimode summary --config my.yaml           show where the corpus is and what is in it
bimode train --config my.yaml             train on a corpus: annealing, BPO, evaluation
bimode up --config my.yaml                start Prefect's server, a worker and the teacher on this machine
bimode down                               stop what `up` started

Every command has examples below its --help. Exit status: 0 done; 2 wrong use; other values by kind of error, see
schemas/errors.py.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from flows.commands import curate, stack, summary, train

_HELP = (__doc__ or "").replace("\n\n", "\n\n\b\n", 1)
"""The \\b tells click to keep the lines of the examples as they are."""

COMMANDS: dict[Callable[..., None], str] = {
    curate.curate: curate.EXAMPLES,
    summary.summary: summary.EXAMPLES,
    train.train: train.EXAMPLES,
    stack.up: stack.UP_EXAMPLES,
    stack.down: stack.DOWN_EXAMPLES,
}
"""Every command and the examples below its help, in the order of the help."""

app = typer.Typer(
    name="bimode",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command, _examples in COMMANDS.items():
    app.command(epilog=_examples)(_command)


def main() -> None:
    """Entry point of the `bimode` command."""
    app()


if __name__ == "__main__":
    main()
