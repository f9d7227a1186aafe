"""Text for calibration and evaluation: files or known data sets → token ids.

    corpus = read_corpus(CorpusOptions(files=(Path("notes.jsonl"),), samples=64), tokenizer)

Needs no torch; the tokenizer is one of transformers.
"""

from corda_convert.corpus.options import CorpusOptions
from corda_convert.corpus.reading import Corpus, Document, read_corpus, read_documents, read_samples, read_stream

__all__ = ["Corpus", "CorpusOptions", "Document", "read_corpus", "read_documents", "read_samples", "read_stream"]
