"""The exported chat template, run as the tools that read it do, and a tokenizer whose tokens can be read."""

from typing import Any, ClassVar

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.chat.template import chat_template
from data.tokens.tokenizer import SPECIAL_TOKENS

START, END = "\ue000", "\ue001"  # around what {% generation %} marks


class Letters:
    """A tokenizer whose tokens are characters, so that examples can be read."""

    special: ClassVar = {name: 0x110000 + i for i, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def show(self, ids: list[int]) -> list[str]:
        names = {token: name for name, token in self.special.items()}
        return [names.get(token) or chr(token) for token in ids]


letters = Letters()


class Generation(Extension):
    """The tag {% generation %} of transformers: here it shows where it begins and ends."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{START}{caller()}{END}"


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def from_template(
    messages: list[dict[str, Any]], prompt: bool = False, trim: bool = True, **given: Any
) -> tuple[str, list[bool]]:
    """What the template writes, and of each character whether it is marked; trim: with the block trimming that
    transformers switches on; given: further variables. Raises TemplateError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=trim, lstrip_blocks=trim, keep_trailing_newline=True, extensions=[Generation]
    )
    environment.globals["raise_exception"] = refuse
    written = environment.from_string(chat_template()).render(messages=messages, add_generation_prompt=prompt, **given)
    text, marked, inside = [], [], False
    for character in written:
        if character in (START, END):
            inside = character == START
        else:
            text.append(character)
            marked.append(inside)
    return "".join(text), marked


def mask_of(tokenizer: Letters, ids: list[int], mask: list[int]) -> list[bool]:
    """A mask of tokens as one of the characters that they are shown as."""
    return [bool(trained) for name, trained in zip(tokenizer.show(ids), mask) for _ in name]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}
