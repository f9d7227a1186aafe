"""A record → its text, or the messages that a chat template renders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corda_convert.corpus.records import Record, kind_of
from corda_convert.errors import MalformedFile, UnsupportedInput, some

Messages = list[dict[str, str]]

_MESSAGE_FIELDS = ("messages", "conversations", "conversation")
_TURN_FIELDS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "answer"),
    ("problem", "solution"),
)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEMPLATE_PART = re.compile(r"\{\{|\}\}|\\n|\\t|\{([^{}]*)\}")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LITERALS = {"{{": "{", "}}": "}", r"\n": "\n", r"\t": "\t"}


@dataclass(frozen=True, slots=True)
class Renderer:
    """Makes text of records.

    Attributes:
        fields: names or templates (`CorpusOptions.field`); empty means `text`, and with `chat` the first that is there of
            `messages`, `conversations`, `prompt` and `completion`, `instruction` and `response`, and the like.
        chat: whether the tokenizer's chat template makes the text.
    """

    tokenizer: Any
    fields: tuple[str, ...] = ()
    chat: bool = False

    def text(self, record: Record) -> str:
        """The record's text. Raises `MalformedFile` naming the fields that are missing, or what a template refuses."""
        if self.chat:
            text = self._chat_text(record)
        elif isinstance(record.value, str):
            text = record.value
        else:
            text = "\n".join(_filled(field, record) for field in self.fields or ("text",))
        if not text.isascii() and (half := _LONE_SURROGATE.search(text)):
            raise MalformedFile(f"{record.place}: \\u{ord(half[0]):04x} is half of a character, so this is no text.")
        return text

    def token_ids(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokens of a text; a chat template has written its own special tokens, so none are added to these."""
        ids = self.tokenizer(text, add_special_tokens=special_tokens and not self.chat, verbose=False)["input_ids"]
        return list(ids)

    def _chat_text(self, record: Record) -> str:
        messages = messages_of(record, self.fields)
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise UnsupportedInput(
                "The model's tokenizer has no chat template.",
                next_step='Leave --chat out and say how a record reads: --field "Question: {question} Answer: {answer}"',
            )
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except ImportError:
            raise UnsupportedInput(
                "Chat templates need jinja2.", next_step="Install it with: pip install jinja2"
            ) from None
        except Exception as error:  # a template raises what it likes, in jinja2's classes and others
            raise MalformedFile(f"{record.place}: the chat template refuses these messages: {error}.") from None
        return str(rendered)


def field_problem(field: str) -> str | None:
    """What is wrong with a name or template of `CorpusOptions.field`, or None."""
    if "{" not in field:
        return None if field.strip() else "it is empty"
    if any(part[1] is not None and not part[1].strip() for part in _TEMPLATE_PART.finditer(field)):
        return "braces without a name of a field in them"
    rest = _TEMPLATE_PART.sub("", field)
    return "a brace without its other half; {{ and }} stand for braces themselves" if set("{}") & set(rest) else None


def messages_of(record: Record, fields: Sequence[str] = ()) -> Messages:
    """The turns of a record, as chat templates take them.

    Raises `MalformedFile` naming what the record has instead.
    """
    value = record.value
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if len(fields) == 2:
        return _turns(_filled(fields[0], record), _filled(fields[1], record), record)
    if fields:
        return _listed(_value_at(fields[0], record), record)
    for name in _MESSAGE_FIELDS:
        if isinstance(value.get(name), Sequence) and not isinstance(value.get(name), str):
            return _listed(value[name], record)
    for first, second in _TURN_FIELDS:
        if first in value and second in value:
            return _turns(value[first], value[second], record)
    raise MalformedFile(
        f"{record.place} has no turns of a conversation. Its fields: {some(value)}.",
        next_step="Name them: --field MESSAGES, or --field QUESTION --field ANSWER.",
    )


def _turns(first: Any, second: Any, record: Record) -> Messages:
    """Two turns of a record, either of them text or a list of messages; `input` goes below an instruction."""
    value = record.value
    turns: Messages = []
    if isinstance(value, Mapping) and isinstance(value.get("system"), str) and value["system"]:
        turns.append({"role": "system", "content": value["system"]})
    for role, content in (("user", first), ("assistant", second)):
        if isinstance(content, str):
            turns.append({"role": role, "content": content})
        else:
            turns += _listed(content, record)
    extra = value.get("input") if isinstance(value, Mapping) and first == value.get("instruction") else None
    if isinstance(extra, str) and extra:
        turns[-2]["content"] += f"\n\n{extra}"
    return turns


def _listed(value: Any, record: Record) -> Messages:
    """Messages as `role` and `content`, as `from` and `value`, or as pairs of `human` and `assistant`."""
    turns: Messages = []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise MalformedFile(
            f"{record.place}: messages are a list, not {kind_of(value)}.",
            next_step="Name the field that holds messages, or two fields: --field QUESTION --field ANSWER.",
        )
    for message in value:
        found = message if isinstance(message, Mapping) else {}
        if "content" in found and "role" in found:
            turns.append({"role": str(found["role"]), "content": _content(found["content"], record)})
        elif "from" in found and "value" in found:
            role = _ROLES.get(str(found["from"]), str(found["from"]))
            turns.append({"role": role, "content": _content(found["value"], record)})
        elif pair := [key for key in ("human", "user", "gpt", "assistant") if key in found]:
            turns += [{"role": _ROLES[key], "content": _content(found[key], record)} for key in pair]
        else:
            raise MalformedFile(f"{record.place}: a message has neither `role` and `content` nor `from` and `value`.")
    if not turns:
        raise MalformedFile(f"{record.place} has no message.")
    return turns


def _content(content: Any, record: Record) -> str:
    """A message's text, also where it stands in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    ):
        return "".join(str(part.get("text", "")) for part in content)
    raise MalformedFile(f"{record.place}: a message's content is no text, but {kind_of(content)}.")


def _filled(field: str, record: Record) -> str:
    """A field's text, or a template with its fields filled in."""
    if "{" not in field:
        return _text_at(field, record)

    def fill(part: re.Match[str]) -> str:
        return _LITERALS[part[0]] if part[1] is None else _text_at(part[1].strip(), record)

    return _TEMPLATE_PART.sub(fill, field)


def _without_fields(record: Record) -> str:
    return "It has none." if isinstance(record.value, Mapping) else "It is plain text."


def _text_at(name: str, record: Record) -> str:
    value = _value_at(name, record)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        has_parts = isinstance(value, list | dict)
        inner = f"{name}.0" if isinstance(value, list) else f"{name}.NAME"
        raise MalformedFile(
            f"{record.place}: {name} is no text, but {kind_of(value)}.",
            next_step=f"Dots lead into it: --field {inner}" if has_parts else None,
        )
    return str(value)


def _value_at(name: str, record: Record) -> Any:
    """What stands in a field; dots lead into objects and lists."""
    value: Any = record.value
    if isinstance(value, Mapping) and name in value:
        return value[name]
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            fields = list(record.value) if isinstance(record.value, Mapping) else []
            raise MalformedFile(
                f"{record.place} has no field {name}. "
                + (f"It has: {some(fields, most=10)}." if fields else _without_fields(record)),
                next_step="Name the fields with --field, or write a template: "
                f'--field "{" ".join(f"{{{field}}}" for field in fields[:2]) or "{text}"}"',
            )
    return value
