"""Exports read by the tools they are for: LLaMA-Factory and ms-swift load one with their own code and train on it.

python -m benchmarks.loaders                 needs the two environments; `python -m benchmarks.loaders --help`
"""
