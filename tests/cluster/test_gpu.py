"""GPUs, as far as a process can tell: CUDA's driver is a stand-in that runs the kernels on the CPU, and fails when it is told to.

What the true driver may do at any time, a cluster must live with: a kernel that goes wrong and spoils its context, one that
never ends, memory that is refused. And whoever starts herd on a GPU that will not do must read why.
"""

import os
import pathlib
import signal
import subprocess
import threading

import pytest

from load import Load
from server import BINARY, MODEL_DIR, ROOT, Server

WORKERS = 3
# An emulated step takes a tenth of it, on a slow machine a half; a hang is noticed after that.
LIMIT_S = 4


@pytest.fixture(scope="session")
def search_path():
    """Where the stand-in lies."""
    done = subprocess.run(["cargo", "xtask", "gpu-stand-in"], cwd=ROOT, check=True, timeout=600, text=True, stdout=subprocess.PIPE)
    name, _, path = done.stdout.strip().partition("=")
    assert name == "LD_LIBRARY_PATH"
    return path


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Compiled kernels are kept there."""
    return tmp_path_factory.mktemp("kernels") / "cache"


def environment(search_path, **device):
    settings = ",".join(f"{name}={value}" for name, value in device.items())
    return {**os.environ, "LD_LIBRARY_PATH": search_path, "HERD_STAND_IN": settings}


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ({"devices": 0}, "CUDA's driver sees no GPU: `nvidia-smi -L` should name one"),
        ({"version": 12090}, "the CUDA driver supports CUDA 12.9, herd needs 13.0 or newer: update NVIDIA's driver"),
        ({"capability": 75}, "cuda:0 has compute capability 7.5, herd needs 8.0 or newer"),
        ({"shared": 99 << 10}, "cuda:0 gives a block 101376 bytes of shared memory, herd needs 114688"),
        ({"memory_mib": 8}, "the model does not fit this machine: 7.2 MiB for weights and KV cache are too few"),
    ],
)
def test_gpu_that_will_not_do_is_refused_with_the_reason(search_path, kernels, device, words):
    command = [BINARY, "up", "--device", "cuda:0", "--model", MODEL_DIR, "--listen", "127.0.0.1:0", "--kernel-cache", kernels]
    done = subprocess.run(
        [str(part) for part in command], env=environment(search_path, **device), timeout=120, text=True, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "panicked" not in done.stderr


@pytest.fixture(scope="module")
def gpus(search_path, kernels, tmp_path_factory):
    """A cluster whose workers each have a GPU, streams with a known outcome, and the folder whose files make a GPU fail."""
    faults = tmp_path_factory.mktemp("faults")
    device = {name: faults / name for name in ("faults", "hangs", "refuses")}
    flags = ("--processes", "--workers", str(WORKERS), "--device", "cuda:0", "--kernel-cache", str(kernels))
    flags += ("--gpu-limit-s", str(LIMIT_S), "--sequences", "8", "--rebalance-s", "0")
    with Server(*flags, environment=environment(search_path, memory_mib=1024, **device)) as running:
        load = Load(running, streams=4, tokens=40)
        load.until_serving(WORKERS)
        yield load, faults
    # Also what was said on the way out.
    wrong = [line for line in log_of(load).splitlines() if any(word in line for word in WRONG)]
    assert not wrong, wrong


# Faults that nobody planted: of a kernel, of how the driver is called, of herd.
WRONG = ("panicked", "stand-in for CUDA's driver", "emulated kernel", "SIGSEGV", "SIGABRT")


def log_of(load):
    load.cluster.log.flush()
    return pathlib.Path(load.cluster.log.name).read_text(errors="replace")


def ends(load):
    """How workers ended so far."""
    return [line.partition(" ended: ")[2] for line in log_of(load).splitlines() if line.startswith("worker ") and " ended: " in line]


def strike(load, fault):
    """A GPU fails while streams run, which do not notice. What the log says from then on."""
    load.until_serving(WORKERS)
    before = len(log_of(load))

    def once_all_have_copies():
        load.until(lambda: all(0 < member["backup_tokens"] for member in load.serving()), "every worker keeps copies of KV rows")
        fault.touch()

    load.during(once_all_have_copies)
    assert not fault.exists(), "no GPU was struck"
    return lambda: log_of(load)[before:]


def test_workers_serve_from_gpus(gpus):
    load, _ = gpus
    assert all("sm_90a" in member["device"] for member in load.serving()), load.serving()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("faults", "herd: the worker ended: CUDA: a kernel: an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS)"),
        ("hangs", f"herd: the worker ended: cuda:0 has not finished within {LIMIT_S} s what it was given"),
    ],
)
def test_process_whose_gpu_is_spoilt_ends_and_is_started_again_and_no_stream_notices(gpus, fault, words):
    load, faults = gpus
    before, restored = ends(load), load.counter("herd_tokens_restored_total")
    log = strike(load, faults / fault)
    load.until(lambda: len(ends(load)) > len(before), "the process ends")
    load.until_serving(WORKERS)
    assert ends(load) == [*before, "exit status: 1"]
    assert words in log()
    assert load.counter("herd_tokens_restored_total") > restored, "its sequences go on from copies of their KV rows"


def test_refused_memory_ends_no_process_and_no_stream(gpus):
    load, faults = gpus
    before = ends(load)
    log = strike(load, faults / "refuses")
    assert "no device memory for the" in log()
    assert ends(load) == before
    assert len(load.serving()) == WORKERS


def test_memory_that_is_refused_again_and_again_while_a_worker_is_lost_costs_no_stream(gpus):
    load, faults = gpus
    load.until_serving(WORKERS)
    before, at = ends(load), len(log_of(load))
    over = threading.Event()

    def refuse():
        while not over.wait(0.1):
            (faults / "refuses").touch()

    def act():
        refusing = threading.Thread(target=refuse, daemon=True)
        refusing.start()
        try:
            os.kill(load.serving()[0]["pid"], signal.SIGKILL)
            over.wait(4)
        finally:
            over.set()
            refusing.join()
            (faults / "refuses").unlink(missing_ok=True)

    load.during(act)
    load.until_serving(WORKERS)
    # In a step, in a view change, or while a worker starts, which then ends and is started again.
    assert "no device memory for the" in log_of(load)[at:]
    since = ends(load)[len(before) :]
    assert since[0].startswith("signal: 9") and set(since[1:]) <= {"exit status: 1"}, since
