"""Runs `herd chaos` with a scenario against a cluster, and reads its report."""

import json
import pathlib
import re
import subprocess

from server import BINARY


def links(server):
    """Where the links of a cluster with --allow-chaos take rules; `herd up` prints it."""
    server.log.flush()
    return re.search(r"^links: (\S+)$", pathlib.Path(server.log.name).read_text(errors="replace"), re.MULTILINE)[1]


class Run:
    """One round of a scenario. `fault` is the text of its faults."""

    def __init__(self, server, folder, *faults, with_links=True, tokens=120):
        scenario = folder / "scenario.toml"
        blocks = "".join(f"\n[[faults]]\n{fault}\n" for fault in faults)
        scenario.write_text(f"seed = 5\nstreams = 12\ntokens = {tokens}\nrecovery_max_s = 20\n{blocks}")
        command = [str(BINARY), "--log", "error", "chaos", str(scenario), "--url", server.url, "--report", str(folder)]
        if with_links:
            command += ["--links", links(server)]
        self.done = subprocess.run(command, timeout=120, text=True, capture_output=True)
        report = folder / "report.json"
        self.report = json.loads(report.read_text()) if report.exists() else None

    @property
    def round(self):
        return self.report["by_round"][0]

    @property
    def causes(self):
        return [change["cause"] for change in self.round["changes"]]

    def check(self):
        """Nothing was lost or changed, and every invariant held."""
        assert self.done.returncode == 0, self.done.stderr
        assert (self.report["lost"], self.report["different"], self.report["broken"]) == (0, 0, [])
        invariants = self.report["invariants"]
        assert [i["id"] for i in invariants] == ["I1, I2", "I3", "I4", "I5", "I6", "I7", "I8"]
        assert all(i["held"] for i in invariants), invariants
        assert self.round["faults"], "nothing was struck"
        return self
