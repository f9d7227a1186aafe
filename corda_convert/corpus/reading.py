"""Records → samples of token ids, or one long stream of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from corda_convert.corpus.options import CorpusOptions
from corda_convert.corpus.presets import Preset, find_preset, read_preset
from corda_convert.corpus.records import Record, read_records, read_whole_text
from corda_convert.corpus.rendering import Renderer
from corda_convert.errors import MalformedFile, UnsupportedInput

_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Samples of text.

    Attributes:
        samples: the token ids of each, unpadded.
        description: what they are, for metadata: `notes.jsonl, 64 samples packed to 2048 tokens, seed 0`.
        warnings: what the user should know, a sentence each.
    """

    samples: list[list[int]]
    description: str
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return sum(map(len, self.samples))


@dataclass(frozen=True, slots=True)
class Document:
    """A record's tokens, and where it stands."""

    place: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Source:
    """All records of the options' files or preset, and how they become text."""

    name: str
    records: Sequence[Sequence[Record]]
    renderer: Renderer
    pack: bool

    def __len__(self) -> int:
        return sum(map(len, self.records))

    def at(self, number: int) -> Record:
        for records in self.records:
            if number < len(records):
                return records[number]
            number -= len(records)
        raise IndexError(number)

    def texts(self, order: Sequence[int]) -> Iterator[tuple[Record, str]]:
        """Records in this order, with their text; those without any are left out."""
        for number in order:
            record = self.at(number)
            text = self.renderer.text(record)
            if text.strip():
                yield record, text


def read_samples(options: CorpusOptions, tokenizer: Any) -> list[list[int]]:
    """The samples of `read_corpus`, for those who have no use for its warnings."""
    return read_corpus(options, tokenizer).samples


def read_corpus(options: CorpusOptions, tokenizer: Any) -> Corpus:
    """Samples for calibration, the same for the same options, files and tokenizer.

    Packed: records in an order that the seed decides, separated by a blank line (chats by nothing), are cut into samples of
    exactly `seq_len` tokens, each with the special tokens that the tokenizer puts around a text; what is left at the end is
    a shorter one, if samples are still wanted. Otherwise `samples` records chosen by the seed, in the order of the files.

    Raises a `CordaConvertError` for files that cannot be read, fields that are missing, or where there is no text at all.
    """
    options.check()
    source = _open(options, tokenizer)
    order = list(range(len(source)))
    random.Random(options.seed).shuffle(order)  # noqa: S311 - no secret depends on it
    samples = (_packed if source.pack else _chosen)(source, order, options)
    if not samples:
        raise _nothing(source)
    form = f"packed to {options.seq_len} tokens" if source.pack else f"of at most {options.seq_len} tokens"
    description = f"{source.name}, {len(samples)} samples {form}, seed {options.seed}"
    corpus = Corpus(samples, description)
    return Corpus(samples, description, tuple(_warnings(corpus, source, options)))


def read_documents(options: CorpusOptions, tokenizer: Any, *, evaluation: bool = False) -> Iterator[Document]:
    """Every record by itself, in the order of the files, with the tokenizer's special tokens, not cut."""
    options.check()
    source = _open(options, tokenizer, evaluation=evaluation, pieces=False)
    for record, text in source.texts(range(len(source))):
        yield Document(record.place, source.renderer.token_ids(text))


def read_stream(options: CorpusOptions, tokenizer: Any, *, evaluation: bool = False) -> list[int]:
    """All text as one stream of tokens, as perplexity is measured on: texts joined by blank lines (chats by nothing), then
    tokenized as one. A .txt file is taken as it stands, and blank records are kept, as is customary for wikitext2.

    With `evaluation`, a preset gives its part for evaluation instead of the one for calibration.
    """
    options.check()
    source = _open(options, tokenizer, evaluation=evaluation)
    texts: list[str] = []
    for place, records in enumerate(source.records):
        whole = None if options.chat or not options.files else read_whole_text(options.files[place])
        texts += [source.renderer.text(record) for record in records] if whole is None else [whole]
    joined = ("" if options.chat else _SEPARATOR).join(texts)
    if not joined.strip():
        raise _nothing(source)
    return source.renderer.token_ids(joined)


def _open(options: CorpusOptions, tokenizer: Any, *, evaluation: bool = False, pieces: bool | None = None) -> _Source:
    """Opens the files or the preset, without reading more than it must."""
    if options.preset is not None:
        preset = find_preset(options.preset)
        pack = preset.pack if options.pack is None else options.pack
        renderer = Renderer(tokenizer, _fields(preset, chat=options.chat), options.chat)
        return _Source(options.preset.lower(), [read_preset(options.preset, evaluation=evaluation)], renderer, pack)
    pack = True if options.pack is None else options.pack
    pieces = pack and not options.chat if pieces is None else pieces
    records = [read_records(file, pieces=pieces) for file in options.files]
    name = ", ".join(file.name for file in options.files)
    return _Source(name, records, Renderer(tokenizer, options.field, options.chat), pack)


def _fields(preset: Preset, *, chat: bool) -> tuple[str, ...]:
    """A preset's fields as `Renderer` takes them: instruction and response are parted by a blank line."""
    if chat and len(preset.fields) == 1:
        raise UnsupportedInput("This preset has no conversations.", next_step="Leave --chat out.")
    if chat or len(preset.fields) == 1:
        return preset.fields
    return (_SEPARATOR.join(f"{{{field}}}" for field in preset.fields),)


def _packed(source: _Source, order: Sequence[int], options: CorpusOptions) -> list[list[int]]:
    """Samples of exactly `seq_len` tokens, and the rest."""
    before, after = _special_tokens(source.renderer)
    room = options.seq_len - len(before) - len(after)
    if room < 1:
        raise UnsupportedInput(f"--seq-len {options.seq_len} has no room beside the tokenizer's special tokens.")
    samples: list[list[int]] = []
    waiting: list[int] = []
    separator = "" if options.chat else _SEPARATOR
    for place, (_, text) in enumerate(source.texts(order)):
        waiting += source.renderer.token_ids((separator if place else "") + text, special_tokens=False)
        start = 0
        while len(waiting) - start >= room and len(samples) < options.samples:
            samples.append([*before, *waiting[start : start + room], *after])
            start += room
        del waiting[:start]
        if len(samples) == options.samples:
            return samples
    return [*samples, [*before, *waiting, *after]] if waiting else samples


def _chosen(source: _Source, order: Sequence[int], options: CorpusOptions) -> list[list[int]]:
    """As many records as wanted, each cut off at `seq_len`, in the order of the files."""
    found: list[tuple[int, list[int]]] = []
    with_text = ((number, text) for number in order for _, text in source.texts([number]))
    for number, text in islice(with_text, options.samples):
        found.append((number, source.renderer.token_ids(text)[: options.seq_len]))
    return [ids for _, ids in sorted(found, key=lambda pair: pair[0]) if ids]


def _special_tokens(renderer: Renderer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text; nothing around chats, whose template does."""
    if renderer.chat:
        return [], []
    bare, whole = renderer.token_ids("a", special_tokens=False), renderer.token_ids("a")
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _nothing(source: _Source) -> MalformedFile:
    count = len(source)
    of_what = f"{count:,} records, all of them blank" if count else "no records"
    return MalformedFile(f"There is no text in {source.name}: {of_what}.")


def _warnings(corpus: Corpus, source: _Source, options: CorpusOptions) -> Iterator[str]:
    found, wanted = len(corpus.samples), options.samples
    if found < wanted:
        form = f"samples of {options.seq_len:,} tokens" if source.pack else "samples"
        yield (
            f"{source.name} gives {found:,} {form if found != 1 else form.replace('samples', 'sample', 1)}, "
            f"{corpus.tokens:,} tokens in all; {wanted:,} were asked for."
        )
