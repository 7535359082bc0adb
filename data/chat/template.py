"""The chat template of exported tokenizers: data.chat.conversation.render in Jinja, with checks of its own.

Besides our own messages, template.jinja accepts what clients of other tools send: content as a list of text parts, for
every role, and calls of the calculator as `tool_calls` and `role: tool`, which become parts of one assistant turn.
Everything else is refused by raise_exception, so that nothing is rendered as something that the model never saw in
training. `tools` may name only the calculator, and is not rendered: the model knows its tool.

OpenAI's clients send the arguments of a call as JSON text, which Jinja cannot parse: the text is split at its quotation
marks, and refused if anything but these is escaped in it.

vLLM passes parts on unchanged to a template with a loop over message['content'], and joins them by newlines for others.

{% generation %} marks what a model is trained to write, for transformers' masks. It is written without dashes, because
older versions of Hugging Face's JavaScript implementation know only that form. It cannot be used in a macro, whose
output does not appear where transformers counts from.
"""

from pathlib import Path
from typing import Any

from data.chat.conversation import ASSISTANT, BOS


def chat_template() -> str:
    return Path(__file__).with_suffix(".jinja").read_text("utf-8")


def tokenizer_config(sequence_len: int) -> dict[str, Any]:
    """tokenizer_config.json. AutoTokenizer then gives the ids that Tokenizer gives, and apply_chat_template render's.

    Unlike here, special tokens are read out of text there, unless split_special_tokens is set or, with conversations,
    sanitize_control_tokens. Padding by <|bos|> does not affect training on the end of a turn.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": ASSISTANT[1],
        "pad_token": BOS,
        "model_max_length": sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(),
    }
