"""The models of a fit, and responses that they are given: what is loaded and encoded before anything is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.directions.positions import Positions, join_positions, read_positions
from reward_models.directions.reward import CountedReward, ModelReward, TextPrompt, read_reward
from reward_models.directions.settings import DirectionScript
from vgf_llm.console.progress import working
from vgf_llm.data.dialogue import PromptText
from vgf_llm.data.encoding import encode_prompts, encode_response
from vgf_llm.errors import DataError
from vgf_llm.machine.device import resolve_device
from vgf_llm.models.architecture import input_table
from vgf_llm.models.base import LoadedBase, load_base, tokenizer_of
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses

_PROMPTS_A_BATCH = 16


@dataclass(frozen=True)
class Ground:
    """The models of a fit.

    Attributes:
        base: The base model.
        reference: Its distribution.
        reward: What is fitted.
        gold: A second reward that fidelity is stated to; None for none.
    """

    base: LoadedBase
    reference: TorchReference
    reward: CountedReward
    gold: CountedReward | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return self.base.tokenizer

    @property
    def table_VD(self) -> Tensor:
        """The base model's input embeddings."""
        return input_table(self.reference.model)

    def encode(self, prompts: Sequence[PromptText], source: str = "") -> list[TextPrompt]:
        """Encode prompts and keep their texts, which functions read.

        Raises:
            DataError: Naming a prompt that is empty or too long.
        """
        new_tokens = self.reference.sampling.max_new_tokens
        encoded = encode_prompts(
            self.tokenizer, prompts, self.base.rows, self.base.max_positions, new_tokens, source=source
        )
        return [TextPrompt(ids, text) for ids, text in zip(encoded, prompts, strict=True)]


def load_ground(script: DirectionScript, sampling: SamplingSettings) -> Ground:
    """Load base model and rewards.

    Raises:
        VGFError: One of them cannot be loaded.
    """
    tokenizer, device = tokenizer_of(script), resolve_device(script.device)
    with working(f"loading the reward {script.reward}"):
        reward = read_reward(script.reward, tokenizer, device, script.reward_outputs or None)
        gold = None if script.gold is None else read_reward(script.gold, tokenizer, device)
    with working(f"loading the base model {script.model_name_or_path}"):
        base = load_base(script, tokenizer, device)
    tables = [len(one.value.embedding_table_VD) for one in (reward, gold) if isinstance(one, ModelReward)]
    base = base.within(min(tables)) if tables else base
    reference = TorchReference(base.lm, sampling, base.eos_ids, base.pad_id, base.vocabulary)
    return Ground(base, reference, reward, gold)


def check_usable(positions: Positions, source: str) -> Tensor:
    """Refuse responses that nothing can be learned from, before the reward is asked.

    Args:
        positions: Responses with their shortlists.
        source: The prompts' file, for the message.

    Returns:
        Whether a prompt's responses have a token that could be replaced, bool [B].

    Raises:
        DataError: No prompt's responses do.
    """
    is_other_BNTK = positions.candidates_BNTK != positions.responses.tokens_BNT.unsqueeze(-1)
    usable_B = is_other_BNTK.flatten(1).any(-1)
    if not usable_B.any():
        text_BN = positions.responses.movable_BNT.any(-1)
        raise DataError(
            f"{source}: no response of the base has a token that could be replaced ({int((~text_BN).sum())} of "
            f"{text_BN.numel()} responses are empty); raise max_new_tokens, responses or top_p, or give other "
            "prompts"
        )
    return usable_B


def read_guided(ground: Ground, guided: Sequence[PromptText], shortlist: int) -> Positions:
    """Look up what stands before the tokens of given responses, one to each prompt.

    Args:
        ground: Models.
        guided: Prompts with a column ``response``; longer ones are cut to ``max_new_tokens``.
        shortlist: As for `sample_positions`.

    Raises:
        DataError: A row has no response, or one without tokens.
    """
    reference, parts = ground.reference, []
    encoded = ground.encode(guided, source=" of the guided responses")
    longest = reference.sampling.max_new_tokens
    rows = [encode_response(ground.tokenizer, text.columns["response"], eos=False)[:longest] for text in guided]
    for number, ids in enumerate(rows):
        if not ids or max(ids) >= ground.base.rows:
            raise DataError(
                f"guided: response {number} has no tokens, or one without a row in the base's table; drop it"
            )
    for start in range(0, len(rows), _PROMPTS_A_BATCH):
        batch = rows[start : start + _PROMPTS_A_BATCH]
        width = max(map(len, batch))
        tokens_B1T = torch.tensor([[ids + [reference.pad_id] * (width - len(ids))] for ids in batch])
        mask_B1T = torch.tensor([[[True] * len(ids) + [False] * (width - len(ids))] for ids in batch])
        device, group = reference.device, encoded[start : start + _PROMPTS_A_BATCH]
        responses = Responses(
            list(group), tokens_B1T.to(device), mask_B1T.to(device), reference.eos_ids, reference.pad_id
        )
        parts.append(read_positions(reference, responses, shortlist))
    return join_positions(parts)
