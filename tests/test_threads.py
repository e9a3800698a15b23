"""The cores that other programs leave free, against hand-counted ones."""

import os
import subprocess
import sys
import time

import pytest
import torch

from runtime import threads
from runtime.threads import STAT, FreeCores, Look, busy_seconds, free_cores, look, own_cores

HUNDREDTHS = pytest.mark.skipif(not STAT.exists(), reason="this system has no /proc/stat")


@HUNDREDTHS
def test_work_is_all_but_idling_and_waiting_on_these_cores():
    tick = os.sysconf("SC_CLK_TCK")
    #        user nice system idle iowait irq softirq stolen guest guest_nice
    stat = f"""cpu  9 9 9 9 9 9 9 9 9 9
cpu0 {2 * tick} {3 * tick} {5 * tick} 700 1100 {13 * tick} {17 * tick} {19 * tick} 23 29
cpu1 {31 * tick} 0 0 37 41 0 0 0 0 0
cpu10 {43 * tick} 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""
    assert busy_seconds(stat, {0}) == 2 + 3 + 5 + 13 + 17 + 19
    assert busy_seconds(stat, {0, 1}) == 59 + 31, "cpu10 is another core"
    assert busy_seconds(stat, {10}) == 43


@pytest.mark.parametrize(
    "cores, everyone, own, free",
    [
        (2, 20.0, 20.0, 2),  # this process alone
        (2, 20.0, 13.3, 1),  # three threads on two cores: one of them is another program's
        (2, 13.0, 10.0, 2),  # a browser takes a third of a core
        (2, 20.0, 5.0, 1),  # others would take all
        (8, 80.0, 55.0, 6),  # 2.5 cores go to others: to the even number, 5.5 -> 6
        (8, 0.0, 0.0, 8),
    ],
)
def test_what_others_worked_in_ten_seconds_is_not_free(cores, everyone, own, free):
    before = Look(clock=7.0, everyone=100.0, own=11.0)
    after = Look(clock=17.0, everyone=100.0 + everyone, own=11.0 + own)
    assert free_cores(before, after, cores) == free


@HUNDREDTHS
def test_another_program_is_seen_in_the_system_s_own_count():
    before = look(own_cores())
    program = "import time\nbegan = time.process_time()\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    after = look(own_cores())
    others = (after.everyone - before.everyone) - (after.own - before.own)
    assert others > 0.4, "half a second of work, counted in hundredths"


@pytest.mark.parametrize(
    "text, count",
    [("150000 100000", 1), ("250000 100000", 2), ("20000 100000", 1), ("max 100000", 7), (None, 7)],
)
def test_a_containers_quota_is_no_more_cores_than_it_pays_for(tmp_path, monkeypatch, text, count):
    monkeypatch.setattr(threads, "own_cores", lambda: set(range(7)))
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    if text:
        (tmp_path / "cpu.max").write_text(text + "\n")
    assert threads.core_count() == count


def test_a_number_that_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        free = FreeCores(torch.device("cpu"))
        time.sleep(1.1)
        free.take()
        assert not free.chooses and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@HUNDREDTHS
@pytest.mark.parametrize("beside", [{"workers": 2}, {"compiled": True}])
def test_what_looks_like_another_program_and_compiled_code_keep_their_threads(beside, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert FreeCores(torch.device("cpu")).chooses
    assert not FreeCores(torch.device("cpu"), **beside).chooses
