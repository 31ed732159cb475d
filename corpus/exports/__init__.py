"""Exports: a corpus version in the formats that other trainers read, on a local disk or an object store."""

from corpus.exports.export import Exported, export_corpus
from corpus.exports.formats import FORMATS
from corpus.exports.rows import CorpusVersion, open_version

__all__ = ["FORMATS", "CorpusVersion", "Exported", "export_corpus", "open_version"]
