"""Chat completions: meaning, streaming, sampling, stopping, log probabilities."""

import math

import pytest

from prompts import EOT, PERIOD, STORY, SUM, SUM_ANSWER, SUM_IDS, WILD, chat_text, digit, text_of

LENGTH = {"ignore_eos": True, "min_tokens": 40}


def test_a_sum_is_answered(ask):
    reply = ask(SUM)
    assert reply.object == "chat.completion"
    assert len(reply.choices) == 1
    choice = reply.choices[0]
    assert (choice.index, choice.message.role, choice.message.content, choice.finish_reason) == (0, "assistant", SUM_ANSWER, "stop")


def test_several_turns_are_understood(client, model):
    messages = [
        {"role": "user", "content": "Add 59 and 28."},
        {"role": "assistant", "content": "59 + 28 = 87."},
        {"role": "user", "content": "Now: Add a title in <<double angular brackets>>."},
        {"role": "assistant", "content": "<<Sum>>\n\n59 + 28 = 87."},
        {"role": "user", "content": "Now: Do not use any commas."},
    ]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
    assert reply.choices[0].message.content == "<<Sum>>\n\n59 + 28 = 87."


def test_content_parts_of_text_are_one_message(client, model):
    parts = [{"type": "text", "text": SUM}]
    reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": parts}], temperature=0)
    assert reply.choices[0].message.content == SUM_ANSWER


@pytest.mark.parametrize("content", [SUM, STORY, 'How do you say "fish" in Russian?', "Count from 40 to 42."])
def test_streaming_equals_plain(ask, content):
    plain = ask(content).choices[0]
    text, reason = text_of(ask(content, stream=True))
    assert (text, reason) == (plain.message.content, plain.finish_reason)


def test_a_stream_comes_in_pieces_with_one_id(ask):
    chunks = list(ask(STORY, stream=True))
    assert len(chunks) > 20, "the whole answer came at once"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["stop"]


def test_include_usage_adds_one_last_chunk(ask):
    plain = ask(SUM).usage
    chunks = list(ask(SUM, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.total_tokens == plain.total_tokens
    assert chunks[-1].usage.completion_tokens == plain.completion_tokens


def test_usage_counts_tokens(ask, complete):
    usage = ask(SUM).usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens == len(SUM_IDS)
    # "17 + 25 = 42." has 11 tokens (digits are never merged); the end of turn may be counted as well.
    assert usage.completion_tokens in (11, 12)
    # The same prompt as text has the same length, and a longer question has more.
    assert complete(chat_text(SUM), max_tokens=1).usage.prompt_tokens == usage.prompt_tokens
    assert ask(SUM + " Add a title in <<double angular brackets>>.").usage.prompt_tokens > usage.prompt_tokens
    assert ask(SUM, max_tokens=3).usage.completion_tokens == 3


def test_max_tokens_ends_with_length(ask):
    whole = ask(STORY).choices[0].message.content
    for name in ("max_tokens", "max_completion_tokens"):
        choice = ask(STORY, **{name: 12}).choices[0]
        assert choice.finish_reason == "length"
        assert whole.startswith(choice.message.content) and choice.message.content not in ("", whole)


def test_ignore_eos_and_min_tokens_go_past_the_end(ask):
    reply = ask(SUM, max_tokens=40, extra_body={"ignore_eos": True})
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (40, "length")
    assert reply.choices[0].message.content.startswith(SUM_ANSWER)
    reply = ask(SUM, max_tokens=60, extra_body={"min_tokens": 30})
    assert reply.usage.completion_tokens >= 30


def test_logprobs_have_the_asked_shape(ask):
    choice = ask(SUM, logprobs=True, top_logprobs=5).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries).startswith(SUM_ANSWER)
    for entry in entries:
        assert entry.logprob <= 0
        top = entry.top_logprobs
        assert len(top) == 5
        values = [other.logprob for other in top]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-4
        # Greedy: the chosen token is the likeliest.
        assert (entry.token, entry.logprob) == (top[0].token, top[0].logprob)
        assert bytes(entry.bytes or []).decode("utf-8", "replace") == entry.token or "\ufffd" in entry.token


def test_logprobs_of_a_sure_token_dominate(ask):
    entries = ask(SUM, logprobs=True, top_logprobs=20).choices[0].logprobs.content
    for entry in entries[:8]:
        assert 0.98 <= sum(math.exp(other.logprob) for other in entry.top_logprobs) <= 1 + 1e-4


def test_logprobs_without_top_have_no_alternatives(ask):
    entries = ask(SUM, logprobs=True).choices[0].logprobs.content
    assert entries and all(entry.top_logprobs == [] for entry in entries)
    assert ask(SUM).choices[0].logprobs is None


def test_streamed_logprobs_equal_plain(ask):
    plain = ask(SUM, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in ask(SUM, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [(entry.token, entry.logprob) for entry in streamed] == [(entry.token, entry.logprob) for entry in plain]


def test_choices_are_numbered_and_the_first_is_that_of_one(ask):
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 40, "extra_body": LENGTH}
    one = ask(WILD, **options).choices[0].message.content
    three = ask(WILD, n=3, **options).choices
    assert [choice.index for choice in three] == [0, 1, 2]
    texts = [choice.message.content for choice in three]
    assert texts[0] == one
    assert len(set(texts)) == 3, "the choices are copies of each other"


def test_streamed_choices_equal_plain(ask):
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 40, "n": 3, "extra_body": LENGTH}
    plain = [choice.message.content for choice in ask(WILD, **options).choices]
    texts = [""] * 3
    for chunk in ask(WILD, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == plain


def test_a_seed_repeats_and_another_seed_differs(ask):
    def sample(seed):
        return ask(WILD, temperature=1, seed=seed, max_tokens=60, extra_body=LENGTH).choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(8)}) >= 7


def test_without_a_seed_samples_differ(ask):
    texts = {ask(WILD, temperature=1.5, max_tokens=60, extra_body=LENGTH).choices[0].message.content for _ in range(4)}
    assert len(texts) > 1


def test_a_tiny_top_p_or_top_k_one_is_greedy(ask):
    greedy = ask(SUM).choices[0].message.content
    assert ask(SUM, temperature=1.5, top_p=1e-6, seed=3).choices[0].message.content == greedy
    assert ask(SUM, temperature=1.5, seed=3, extra_body={"top_k": 1}).choices[0].message.content == greedy


@pytest.mark.parametrize(
    "stop, want",
    [
        ("=", "17 + 25 "),
        (["nothing", "="], "17 + 25 "),
        ("= 42", "17 + 25 "),  # Spans tokens: digits are never merged.
        ("5 = 4", "17 + 2"),
        (["= 42", "25"], "17 + "),  # The earlier occurrence wins, not the earlier entry.
    ],
)
def test_stop_strings_cut_before_the_match(ask, stop, want):
    plain = ask(SUM, stop=stop).choices[0]
    assert (plain.message.content, plain.finish_reason) == (want, "stop")
    assert text_of(ask(SUM, stop=stop, stream=True)) == (want, "stop")


def test_a_stop_string_that_only_begins_is_not_swallowed(ask):
    # "42.X" matches up to its last character: the held-back text must come out at the end.
    assert ask(SUM, stop="42.X").choices[0].message.content == SUM_ANSWER
    assert text_of(ask(SUM, stop="42.X", stream=True)) == (SUM_ANSWER, "stop")


def test_stop_token_ids_end_the_answer(ask):
    choice = ask(SUM, extra_body={"stop_token_ids": [digit(4)]}).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content.rstrip(" ") == "17 + 25 ="


def test_logit_bias_forbids_and_forces(ask):
    forced = ask(SUM, max_tokens=5, logit_bias={str(digit(9)): 100}).choices[0]
    assert (forced.message.content, forced.finish_reason) == ("99999", "length")
    # Another token may hold a period too; the forbidden one must not be chosen.
    answer = ask(SUM, logit_bias={str(PERIOD): -100}, max_tokens=30, logprobs=True).choices[0]
    tokens = [entry.token for entry in answer.logprobs.content]
    assert tokens and "." not in tokens
    assert "." in [entry.token for entry in ask(SUM, logprobs=True).choices[0].logprobs.content]


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}])
def test_penalties_change_a_repetitive_answer(complete, penalty):
    options = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
    prompt = "1 1 1 1 1 1"
    plain = complete(prompt, **options).choices[0].text
    assert complete(prompt, **options, **penalty).choices[0].text != plain


def test_zero_penalties_change_nothing(ask):
    assert ask(SUM, presence_penalty=0, frequency_penalty=0).choices[0].message.content == SUM_ANSWER
