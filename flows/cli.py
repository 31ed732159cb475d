"""The command line `bimode`.

bimode plan --rows N --gpus K             say what a curation will take, and what breaks first
bimode curate --config my.yaml            curate a corpus
bimode curate --config my.yaml --dry-run  say what would be asked, and what it would cost
bimode summary --config my.yaml           show where the corpus is and what is in it
bimode show ID --config my.yaml           show everything known of one row
bimode report --config my.yaml            make the report of a version anew
bimode relabel --config my.yaml --set …   label again by other settings, from stored replies
bimode versions --config my.yaml          list the versions, what each added and who pins it
bimode diff v0001 v0002 --config my.yaml  show what changed between two versions
bimode validate --config my.yaml          say whether a version is complete and right
bimode pin v0002 --config my.yaml         keep a version
bimode unpin v0002 --config my.yaml       keep it no longer
bimode collect --config my.yaml --keep 7  remove old versions
bimode export FORMAT --config my.yaml …   write the corpus for another trainer
bimode annotate --config my.yaml …        draw a sample for people to mark
bimode agreement --config my.yaml FILE    read their marks and say how far the judges agree
bimode notify                             have Prefect tell you of runs that fail, and the like
bimode train --config my.yaml             train on a corpus: annealing, BPO, evaluation
bimode pool status                        show who holds the GPUs and who waits; create the work pool
bimode watch                              start a run that crashed once more, and keep Prefect's database small
bimode prune                              remove old runs and lost workers from Prefect's database
bimode up --config my.yaml                start Prefect's server, a worker and the teacher on this machine
bimode down                               stop what `up` started

Every command has examples below its --help. Exit status: 0 done; 2 wrong use; other values by kind of error, see
schemas/errors.py.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from flows.commands import (
    agreement,
    annotate,
    curate,
    diff,
    export,
    notify,
    plan,
    pool,
    prune,
    relabel,
    report,
    show,
    stack,
    summary,
    train,
    validate,
    versions,
    watch,
)

_HELP = (__doc__ or "").replace("\n\n", "\n\n\b\n", 1)
"""The \\b tells click to keep the lines of the examples as they are."""

COMMANDS: dict[Callable[..., None], str] = {
    plan.plan: plan.EXAMPLES,
    curate.curate: curate.EXAMPLES,
    summary.summary: summary.EXAMPLES,
    show.show: show.EXAMPLES,
    report.report: report.EXAMPLES,
    relabel.relabel: relabel.EXAMPLES,
    versions.versions: versions.EXAMPLES,
    diff.diff: diff.EXAMPLES,
    validate.validate: validate.EXAMPLES,
    versions.pin: versions.PIN_EXAMPLES,
    versions.unpin: versions.UNPIN_EXAMPLES,
    versions.collect: versions.COLLECT_EXAMPLES,
    export.export: export.EXAMPLES,
    annotate.annotate: annotate.EXAMPLES,
    agreement.agreement: agreement.EXAMPLES,
    train.train: train.EXAMPLES,
    notify.notify: notify.EXAMPLES,
    watch.watch: watch.EXAMPLES,
    prune.prune: prune.EXAMPLES,
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
app.add_typer(pool.app)


def main() -> None:
    """Entry point of the `bimode` command."""
    app()


if __name__ == "__main__":
    main()
