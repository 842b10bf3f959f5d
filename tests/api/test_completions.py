"""Plain completions and the model list."""

import math

from prompts import SUM, SUM_ANSWER, SUM_IDS, WILD, chat_text


def test_models_lists_the_served_one(client, model):
    listed = client.models.list()
    assert listed.object == "list"
    assert [(entry.object, entry.id) for entry in listed.data] == [("model", model)]
    assert model == "toy-maverick"
    assert client.models.retrieve(model).id == model


def test_text_continues(complete):
    reply = complete(chat_text(SUM), max_tokens=30)
    assert reply.object == "text_completion"
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (SUM_ANSWER, "stop")


def test_token_ids_are_a_prompt(complete):
    reply = complete(SUM_IDS, max_tokens=30)
    assert reply.choices[0].text == SUM_ANSWER
    assert reply.usage.prompt_tokens == len(SUM_IDS)


def test_a_list_of_prompts_gives_a_choice_each(complete):
    prompts = [chat_text(SUM), chat_text("2 + 4 = ?")]
    reply = complete(prompts, max_tokens=30)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert [choice.text for choice in reply.choices] == [SUM_ANSWER, "2 + 4 = 6."]
    both = [complete(prompt, max_tokens=30).usage.prompt_tokens for prompt in prompts]
    assert reply.usage.prompt_tokens == sum(both)


def test_a_list_of_token_lists_gives_a_choice_each(complete):
    reply = complete([SUM_IDS, SUM_IDS], max_tokens=30)
    assert [choice.text for choice in reply.choices] == [SUM_ANSWER, SUM_ANSWER]


def test_several_choices_of_several_prompts_are_ordered_by_prompt(complete):
    options = {"max_tokens": 12, "temperature": 1.5, "seed": 5, "extra_body": {"ignore_eos": True}}
    prompts = [chat_text(WILD), chat_text(SUM)]
    reply = complete(prompts, n=2, **options)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == complete(prompts[0], **options).choices[0].text
    assert reply.choices[0].text != reply.choices[1].text


def test_echo_repeats_the_prompt(complete):
    prompt = "The capital of France is"
    plain = complete(prompt, max_tokens=6).choices[0].text
    assert complete(prompt, max_tokens=6, echo=True).choices[0].text == prompt + plain


def test_logprobs_have_the_legacy_shape(complete):
    choice = complete(chat_text(SUM), max_tokens=30, logprobs=3).choices[0]
    lists = choice.logprobs
    assert "".join(lists.tokens).startswith(SUM_ANSWER)
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset)
    for token, value, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs):
        assert math.isclose(max(top.values()), value, abs_tol=1e-6) and token in top
    assert lists.text_offset == sorted(lists.text_offset)


def test_a_completion_streams(complete):
    chunks = list(complete(chat_text(SUM), max_tokens=30, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == SUM_ANSWER
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]


def test_stop_strings_cut_a_completion(complete):
    assert complete(chat_text(SUM), max_tokens=30, stop=" =").choices[0].text == "17 + 25"
