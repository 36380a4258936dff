"""Two hosts, which are network namespaces here, lose a process and the link between them, and go on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.distributed.hosts import CUT_AT, KILL_AT, TIMEOUT
from tests.callbacks.distributed.launch import HERE, ROOT, start

ENDS_WITHIN = TIMEOUT + 8
"""The time after the loss of the link, in seconds, within which each rank ends with an error: see docs/scaling.md."""
LONGEST = 240


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)


def do(*arguments: str) -> None:
    done = ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a pair of virtual devices. They are removed in any case."""
    name = f"et{uuid.uuid4().hex[:6]}"
    names = [f"{name}a", f"{name}b"]
    if shutil.which("ip") is None or ip("netns", "add", names[0]).returncode != 0:
        pytest.skip("network namespaces are not allowed here: `ip netns add` needs the rights of root")
    with ExitStack() as cleanup:
        cleanup.callback(ip, "netns", "del", names[0])
        do("netns", "add", names[1])
        cleanup.callback(ip, "netns", "del", names[1])
        if ip(
            "link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1]
        ).returncode:
            pytest.skip("virtual network devices are not allowed here: `ip link add ... type veth` fails")
        for index, host in enumerate(names):
            do("-n", host, "address", "add", f"10.213.7.{index + 1}/24", "dev", host)
            do("-n", host, "link", "set", host, "up")
            do("-n", host, "link", "set", "lo", "up")
        yield names


class Torchruns:
    """One torchrun on each host.

    Args:
        hosts: The hosts.
        folder: The folder that both see.
        kind: ``"ddp"`` or ``"fsdp"``.
        restarts: How often torchrun starts the processes again.
    """

    def __init__(self, hosts: list[str], folder: Path, kind: str, restarts: int) -> None:
        self.logs = [folder / f"torchrun-{index}-{time.time()}.log" for index in range(2)]
        self.processes = []
        for index, (host, log) in enumerate(zip(hosts, self.logs, strict=True)):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "GLOO_SOCKET_IFNAME": host,
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            }
            options = [
                "--nnodes=2",
                "--nproc-per-node=1",
                f"--max-restarts={restarts}",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=10.213.7.1:29500",
                "--rdzv-id=run",
                f"--rdzv-conf=is_host={index == 0},join_timeout=120,read_timeout=10",
                f"--local-addr=10.213.7.{index + 1}",
            ]
            command = [sys.executable, "-m", "torch.distributed.run", *options, str(HERE / "hosts.py"), str(folder), kind]
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", host, *command],
                        env=environment,
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                    )
                )

    def wait(self) -> list[int]:
        return [process.wait(LONGEST) for process in self.processes]

    def text(self) -> str:
        return "\n".join(log.read_text()[-6000:] for log in self.logs)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its processes
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def errors(folder: Path, rank: int) -> list[tuple[float, str]]:
    """Return the errors of a rank, with their times."""
    paths = folder.glob(f"error-{rank}-*.txt")
    return sorted((float(path.stem.split("-")[2]), path.read_text()) for path in paths)


def wait_for(path: Path, *, seconds: float = LONGEST) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} does not come"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_hosts_lose_a_process_and_the_link_and_end_with_the_same_bits(hosts: list[str], tmp_path: Path, kind: str) -> None:
    calm, folder = tmp_path / "calm", tmp_path / "disturbed"
    calm.mkdir()
    folder.mkdir()
    start(HERE / "hosts.py", calm, kind)
    (folder / "kill").touch()
    (folder / "cut").touch()
    with ExitStack() as cleanup:
        runs = Torchruns(hosts, folder, kind, restarts=1)
        cleanup.callback(runs.end)
        # The first loss: torchrun starts the processes of both hosts again.
        wait_for(folder / "cut.taken")
        assert (folder / "kill.taken").exists()
        # torchrun may end the other process before it has an error.
        assert all("Rank 1 is gone" in text for _, text in errors(folder, 0)), runs.text()
        # The second: the link is down for longer than the timeout.
        lost = time.time()
        do("-n", hosts[0], "link", "set", hosts[0], "down")
        (folder / "down").touch()
        end = time.monotonic() + ENDS_WITHIN + 10
        while time.monotonic() < end and not all(any(at > lost for at, _ in errors(folder, rank)) for rank in (0, 1)):
            time.sleep(0.05)
        for rank in (0, 1):
            after = [each for each in errors(folder, rank) if each[0] > lost]
            assert len(after) == 1, runs.text()
            ((at, text),) = after
            assert f"Rank {1 - rank} is gone" in text
            assert at - lost < ENDS_WITHIN
        do("-n", hosts[0], "link", "set", hosts[0], "up")
        runs.end()
        again = Torchruns(hosts, folder, kind, restarts=0)
        cleanup.callback(again.end)
        assert again.wait() == [0, 0], again.text()
    for rank in (0, 1):
        expected: Any = torch.load(calm / f"{rank}.pt", weights_only=False)
        result: Any = torch.load(folder / f"{rank}.pt", weights_only=False)
        assert result["trained"][0] in (CUT_AT, CUT_AT - 1) and expected["trained"][0] == 0 < KILL_AT
        assert all(torch.equal(tensor, expected["weights"][name]) for name, tensor in result["weights"].items())
