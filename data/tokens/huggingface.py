"""What Hugging Face's AutoTokenizer needs beside tokenizer.json: the tokens that start and end a text, the template."""

from typing import Any

from data.chat.conversation import ASSISTANT, BOS
from data.chat.template import CHAT_TEMPLATE


def tokenizer_config(sequence_len: int) -> dict[str, Any]:
    """tokenizer_config.json. AutoTokenizer then gives the ids that Tokenizer gives, and apply_chat_template render's.

    Other than here, special tokens are read out of text there, unless split_special_tokens is set or, with
    conversations, sanitize_control_tokens. Padding by <|bos|> costs no training on the end of a turn.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": ASSISTANT[1],
        "pad_token": BOS,
        "model_max_length": sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
