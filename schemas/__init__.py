"""What every part speaks: samples, requests, replies, verdicts, fates, corpus rows, the template, the configuration.

The lowest layer: it imports no other package of the project.
"""
