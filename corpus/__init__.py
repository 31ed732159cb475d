"""The product: shards with images inside, versions with manifests, the dataset card and the report.

Left out on purpose: deciding anything about a row. What arrives here is labelled; it is written, counted and shown.
"""
