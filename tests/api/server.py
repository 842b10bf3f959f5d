"""A real `herd up` as a child process on a free port, stopped with SIGINT and its exit code checked."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

import openai

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL_DIR = ROOT / "models" / "toy-maverick"
BINARY = pathlib.Path(os.environ.get("HERD_TEST_BINARY", ROOT / "target" / "debug" / "herd"))

START_MAX_S = 60  # a debug binary on two shared cores needs about 5
STOP_MAX_S = 20  # open streams are ended, workers joined
REQUEST_MAX_S = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """Use as a context manager: leaving it stops the process, whatever happened inside."""

    def __init__(self, *arguments, environment=None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.NamedTemporaryFile(prefix="herd-up-", suffix=".log", mode="w+", encoding="utf-8", errors="replace")
        command = [str(BINARY), "up", "--listen", f"127.0.0.1:{self.port}", *arguments]
        # Its own session, so that the whole group can be ended and a Ctrl-C of pytest does not reach it first.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_MAX_S)

    def __enter__(self):
        try:
            self.wait_until_healthy()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind, error, trace):
        try:
            code = self.interrupt()
        finally:
            self.kill()
        if kind is None:
            assert code == 0, f"herd up ended with {code} after SIGINT\n{self.log_tail()}"

    def wait_until_healthy(self):
        deadline = time.monotonic() + START_MAX_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"herd up ended with {self.process.returncode} before it was healthy\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as reply:
                    if reply.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.05)
        raise RuntimeError(f"herd up was not healthy within {START_MAX_S} s\n{self.log_tail()}")

    def interrupt(self):
        """The exit code after SIGINT; an error if it does not end in time."""
        if self.process.poll() is not None:
            raise RuntimeError(f"herd up had already ended with {self.process.returncode}\n{self.log_tail()}")
        self.process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self):
        """Its exit code; an error if it does not end in time."""
        try:
            return self.process.wait(STOP_MAX_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"herd up was still running {STOP_MAX_S} s after it was told to end\n{self.log_tail()}") from None

    def kill(self):
        """Ends the process group of this server, if anything of it is left."""
        self.client.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(STOP_MAX_S)

    def log_tail(self):
        self.log.flush()
        return pathlib.Path(self.log.name).read_text(errors="replace")[-4000:]

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return reply.read().decode()

    def router(self):
        """The router's part of the status: its `streams` and `queued` sequences."""
        return json.loads(self.get("/status"))["router"]

    def wait_until_idle(self, limit_s):
        """Fails if streams or queued requests are left after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while True:
            router = self.router()
            if router["streams"] == 0 and router["queued"] == 0:
                return
            assert time.monotonic() < deadline, f"still {router} after {limit_s} s"
            time.sleep(0.02)

    def post(self, path, body, content_type="application/json"):
        """(status, parsed body, headers) of a request that the client library would refuse to send."""
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": content_type}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_MAX_S) as reply:
                return reply.status, json.loads(reply.read()), reply.headers
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()), error.headers
