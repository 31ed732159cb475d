"""What a curation will take before there is data for it: calls, tokens, hours, storage, money; and what breaks first.

`bimode curate --dry-run` counts what a given set of rows would ask. This package needs a number of rows and of GPUs
alone: shares and lengths are assumptions with a source each (`assumptions`), or measured on a finished run
(`measured`); speed is a roofline of the GPUs (`gpus`). Everything uncertain is a range.
"""
