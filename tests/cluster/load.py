"""Streams with a known outcome: whatever happens to the cluster, each must yield the tokens it yields in peace."""

import concurrent.futures
import json
import os
import pathlib
import re
import time

STREAMS = int(os.environ.get("HERD_TEST_STREAMS", "40"))
TOKENS = 200
STALL_MAX_S = 10  # a bound against hanging, not a claim of speed; those are in bench/results


class Load:
    def __init__(self, cluster, model="toy-maverick", streams=STREAMS, tokens=TOKENS):
        self.cluster, self.model, self.streams, self.tokens = cluster, model, streams, tokens
        self.pool = concurrent.futures.ThreadPoolExecutor(streams)
        self.expected = [text for text, _ in self.pool.map(self.stream, range(streams))]

    def stream(self, seed):
        """The text of one seeded stream, and its longest gap between two pieces."""
        pieces, gap, last = [], 0.0, None
        chunks = self.cluster.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": f"Tell a long story about Carlos and number {seed}."}],
            max_tokens=self.tokens,
            temperature=0.7,
            seed=seed,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in chunks:
            now = time.monotonic()
            gap = max(gap, now - last) if last else 0.0
            last = now
            if chunk.choices and chunk.choices[0].delta.content:
                pieces.append(chunk.choices[0].delta.content)
        return "".join(pieces), gap

    def during(self, action):
        """Runs all streams, calls `action` when they are on their way, and checks every one of them. Returns their longest gaps."""
        running = self.on_their_way()
        action()
        return self.checked(running)

    def checked(self, running):
        """Waits for the streams and checks every one of them. Returns their longest gaps."""
        results = [stream.result(120) for stream in running]  # raises what a lost stream raised
        different = [seed for seed, (text, _) in enumerate(results) if text != self.expected[seed]]
        assert not different, f"streams {different} differ"
        gaps = sorted(gap for _, gap in results)
        assert gaps[-1] < STALL_MAX_S, f"a stream stood still for {gaps[-1]:.1f} s"
        return gaps

    def on_their_way(self):
        """All streams, running. A machine that is busy with other things may let nobody look before they end; then once more."""
        for _ in range(5):
            running = [self.pool.submit(self.stream, seed) for seed in range(self.streams)]

            def have_started():
                ended = [stream.result() for stream in running if stream.done()]  # raises what a lost stream raised
                return len(ended) == len(running) or self.cluster.router()["streams"] > self.streams // 2

            self.until(have_started, "the streams start")
            time.sleep(0.3)
            if not all(stream.done() for stream in running):
                return running
            self.checked(running)
        raise AssertionError("the streams end before anything happens")

    @staticmethod
    def until(is_so, what, limit_s=30):
        deadline = time.monotonic() + limit_s
        while not is_so():
            assert time.monotonic() < deadline, f"never: {what}"
            time.sleep(0.02)

    def status(self):
        return json.loads(self.cluster.get("/status"))

    def serving(self):
        return [member for member in self.status().get("members", []) if member["state"] == "serving"]

    def counter(self, name):
        """A counter of the router's metrics."""
        lines = [line.split() for line in self.cluster.get("/metrics").splitlines()]
        return next((int(line[1]) for line in lines if line and line[0] == name), 0)

    def until_serving(self, workers):
        self.until(lambda: len(self.serving()) == workers, f"{workers} workers serve")

    def coordinators(self):
        """What --coordinator takes: all of them, since any may lead when it matters."""
        return ",".join(coordinator["url"] for coordinator in self.status()["coordinators"])

    def pid(self, role):
        """The last pid that `herd up` printed for a role."""
        self.cluster.log.flush()
        log = pathlib.Path(self.cluster.log.name).read_text(errors="replace")
        return int(re.findall(rf"^{role}: pid (\d+)$", log, re.MULTILINE)[-1])
