"""Asking the teacher: the durable reply journal, the client that fills it, and vLLM started beside us.

Left out on purpose: prompts and what replies mean (`judges`), and any choice of what to ask (`flows`).
"""
