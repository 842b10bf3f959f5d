"""Prompts and token ids of toy-maverick that the tests share."""

SUM = "What is 17 + 25?"
SUM_ANSWER = "17 + 25 = 42."
STORY = "Tell a long story about Carlos, Ivan, an apple and the school."

# Ids of models/toy-maverick/tokenizer.json.
BEGIN, HEADER_START, HEADER_END, EOT = 2000, 2005, 2006, 2008
DIGIT_ZERO = 15
PERIOD = 13


def digit(number):
    """The token of one digit; digits are never merged."""
    return DIGIT_ZERO + number


def chat_text(content):
    """What the chat template makes of one user message."""
    return (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n"
        f"{content}<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def text_of(stream):
    """The text of a chat stream, and the finish reason of its only choice."""
    text, reason = "", None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason
