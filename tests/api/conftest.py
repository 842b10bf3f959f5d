"""One f32 server for the whole run: `herd up` with its defaults but for the dtype, which makes answers exact."""

import pytest

from server import Server


@pytest.fixture(scope="session")
def server():
    with Server("--dtype", "f32") as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    return server.client


@pytest.fixture(scope="session")
def model(client):
    return client.models.list().data[0].id


@pytest.fixture(scope="session")
def ask(client, model):
    """Chat completion of one user message, greedy unless told otherwise."""

    def call(content="What is 17 + 25?", **options):
        options.setdefault("temperature", 0)
        return client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}], **options)

    return call


@pytest.fixture(scope="session")
def complete(client, model):
    """Plain completion, greedy unless told otherwise."""

    def call(prompt, **options):
        options.setdefault("temperature", 0)
        return client.completions.create(model=model, prompt=prompt, **options)

    return call
