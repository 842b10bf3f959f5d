"""Prompts and token ids of toy-maverick that the tests share."""

SUM = "What is 17 + 25?"
SUM_ANSWER = "17 + 25 = 42."
# The ids of chat_text(SUM) behind <|begin_of_text|>, which tokenizer.json's post-processor adds.
SUM_IDS = [2000, 2005, 634, 2006, 365, 352, 286, 220, 16, 22, 284, 220, 17, 20, 30, 2008, 2005, 633, 2006, 365]
STORY = "Tell a long story about Carlos, Ivan, an apple and the school."
# Outside the model's world: it has no sure answer, so that samples differ.
WILD = "Sing me something about rivers and trains, please."

# Ids of models/toy-maverick/tokenizer.json.
EOT = 2008
DIGIT_ZERO = 15
PERIOD = 13


def digit(number):
    """The token of one digit; digits are never merged."""
    return DIGIT_ZERO + number


def chat_text(content):
    """What the chat template makes of one user message, without the first token: the tokenizer puts it before plain prompts."""
    return (
        "<|header_start|>user<|header_end|>\n\n"
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
