"""Ctrl-C in a terminal reaches every process of the cluster at once; running requests must still end well."""

import os
import signal
import threading
import time

from server import Server


def test_ctrl_c_lets_running_requests_end():
    server = Server("--processes", "--workers", "2")
    try:
        server.wait_until_healthy()
        outcome = []

        def ask():
            chunks = server.client.chat.completions.create(
                model="toy-maverick",
                messages=[{"role": "user", "content": "Tell a long story about Carlos."}],
                max_tokens=900,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            outcome.append([chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1])

        client = threading.Thread(target=ask)
        client.start()
        while server.router()["streams"] == 0:
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGINT)
        client.join(60)
        assert outcome == ["length"], server.log_tail()
        assert server.ended() == 0
    finally:
        server.kill()


def test_ctrl_c_before_the_cluster_serves_stops_it():
    server = Server("--processes", "--workers", "2")
    try:
        while "router: pid" not in server.log_tail():
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.ended() == 0
    finally:
        server.kill()
