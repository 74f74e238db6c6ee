"""Facts of the machine under the names that records have."""

from __future__ import annotations

import os

import pytest
import torch

from vgf_llm.machine import facts as module
from vgf_llm.machine.facts import device_facts, facts, hardware


def test_records_keep_their_keys():
    assert list(hardware()) == ["cpu", "cores", "threads", "gpu", "python", "torch"]
    assert hardware()["cores"] == os.cpu_count() and hardware()["threads"] == torch.get_num_threads()
    assert list(device_facts("cpu", ("cores", "load_average"))) == ["device", "cores", "load_average"]
    assert device_facts("cpu", ())["device"].startswith("cpu: ")
    assert isinstance(facts("load_average")["load_average"], float)


def test_a_gpu_is_named_with_the_facts_that_go_with_it(monkeypatch):
    monkeypatch.setattr(module, "_gpu", lambda: "H200")
    assert device_facts("cuda:0", ("cores",), on_gpu=("threads",)) == {
        "device": "H200",
        "threads": torch.get_num_threads(),
    }


def test_an_unknown_fact_is_an_error():
    with pytest.raises(KeyError, match="speed"):
        facts("speed")
