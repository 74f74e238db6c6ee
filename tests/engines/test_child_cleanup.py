"""What is left of a process that was killed: nothing that it had a cleanup for."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vgf_llm.engines.child_cleanup import ChildCleanup

PARENT = """
import subprocess, time
from vgf_llm.engines.child_cleanup import ChildCleanup
child = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL)
cleanup = ChildCleanup([child.pid])
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_a_parent_that_is_killed(sent):
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert not gone(child, 0.3)
    parent.send_signal(sent)
    parent.wait(10)
    assert gone(child, 10)


def test_a_cleanup_that_is_dismissed_lets_a_process_be():
    child = subprocess.Popen(["sleep", "60"])
    ChildCleanup([child.pid]).dismiss()
    assert not gone(child.pid, 0.3)
    child.kill()
    child.wait()
    ChildCleanup([]).dismiss()
