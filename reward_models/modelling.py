"""Reward model: the first layers of a causal LM's decoder, its final norm, and a scalar linear head.

    r(x, y) = w . pool(h_1 .. h_T) + v . mean(u_1 .. u_T) + b,   h = norm(body(x, y)), pooled over attended tokens

in float32. The second term is the optional input skip: it reads the mean of the response's own input embeddings (in
root mean squares of the table), so a part of the reward is linear in the particles and its gradient holds between
tokens.

Departs from transformers' sequence classification: pooling goes by the attention mask and never by the pad token's id
(so pad == eos, left padding and batch size change nothing), prompts are run once for any number of responses, and
responses may be token ids or embeddings, with gradients to the embeddings. Nothing of vocabulary size is ever
computed. The body is causal, so one forward holds the score of every prefix of a response: the token-level value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reward_models.body import (
    body_attention,
    check_cut,
    copy_weights,
    parameters_on_meta,
    share_weights,
    truncated_config,
    weight_shape,
)
from reward_models.configuration import RewardModelConfig
from reward_models.pooling import check_pooled, close_responses, pool_last, pool_mean, prompt_end, running_mean
from vgf_llm.data.encoding import EncodedPrompt, encode_prompt
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import check_config, input_table, text_config
from vgf_llm.models.attention import settle_attention
from vgf_llm.models.prefix import PromptPrefix, compute_prefix, forward_with_prefix, positions_from_mask
from vgf_llm.models.probe import check_decoder
from vgf_llm.models.whole import loaded_whole
from vgf_llm.runs.provenance import model_mark


class RewardModel(PreTrainedModel):
    """Scalar reward of (prompt, response); see the module's first lines."""

    config_class = RewardModelConfig
    base_model_prefix = "body"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _keep_in_fp32_modules_strict = {"head", "skip_head"}

    def __init__(self, config: RewardModelConfig) -> None:
        """Build an untrained model; `from_base` and `from_pretrained` are the usual ways in."""
        super().__init__(config)
        body_config = config.build_body_config()
        check_config(body_config, config.base_name)
        self.body = AutoModel.from_config(
            body_config, attn_implementation=body_attention(config._attn_implementation, body_config)
        )
        embedding_width = config.embedding_width or body_config.hidden_size
        outputs = max(1, len(config.objectives))
        self.head = nn.Linear(config.output_width or body_config.hidden_size, outputs)
        self.skip_head = nn.Linear(embedding_width, outputs, bias=False) if config.input_skip else None
        self._scale: float | None = None
        self.own_tokenizer: Any = None  # of a classifier whose template is not the base's
        self.reward_outputs: dict[str, float] = {}  # weights of the outputs that were folded into one
        self.post_init()
        self.unfreeze()

    @classmethod
    @loaded_whole()
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does (which makes every parameter trainable), then hold the embeddings again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        settle_attention(model.body)
        model.unfreeze()
        return loaded

    @classmethod
    @loaded_whole()
    def from_base(
        cls,
        base: str | PreTrainedModel,
        num_layers: int | None = None,
        dtype: torch.dtype = torch.float32,
        pooling: str = "last",
        train_embeddings: bool = False,
        input_skip: bool = False,
        seed: int = 0,
        share: bool = False,
        objectives: Sequence[str] = (),
    ) -> RewardModel:
        """Cut a reward model from a causal LM; the head starts at N(0, 1 / (D + 1)), bias 0.

        Args:
            base: a causal LM (left as it is), or what `vgf_llm.models.loading.load_causal_lm` takes.
            num_layers: decoder layers kept, from the first; None keeps all.
            dtype: of the body (`share`: the base's own); the head is float32.
            pooling: "last" or "mean" (over the response).
            train_embeddings: whether training may move the input embeddings.
            input_skip: whether the head also reads the mean of the response's input embeddings (starts at zero).
            seed: of the head's initial weights.
            share: hold the base's own, frozen parameters in place of copies (a LoRA is to go around it).
            objectives: names of the outputs; empty: one output, without a name.

        Raises:
            ModelError: num_layers is out of range, the base cannot be loaded, its architecture is not supported, its
                first layers do not answer as they do in the base, or it is to be shared and trains.
        """
        if isinstance(base, str):
            from vgf_llm.models.loading import load_causal_lm

            base_name, base = base, load_causal_lm(base, dtype=dtype)
        else:
            base_name = str(base.config._name_or_path or base.name_or_path)
            check_config(base.config, base_name)
        output: Any = base.get_output_embeddings()
        config = RewardModelConfig(
            body_config=truncated_config(base.config, num_layers),
            pooling=pooling,
            base_name=base_name,
            train_embeddings=train_embeddings,
            input_skip=input_skip,
            pad_token_id=getattr(text_config(base.config), "pad_token_id", None),
            embedding_width=weight_shape(input_table(base))[-1],
            output_width=None if output is None else weight_shape(output.weight)[-1],
            objectives=list(objectives),
        )
        with parameters_on_meta() if share else contextlib.nullcontext():
            model = cls(config)
        if share:
            share_weights(model.body, base)
            for head in filter(None, (model.head, model.skip_head)):
                head.to_empty(device=base.device)
        else:
            copy_weights(model.body, base, dtype)
        model.body.to(base.device)
        for head in filter(None, (model.head, model.skip_head)):
            head.to(base.device)
        settle_attention(model.body)
        check_cut(model.body, base, base_name)
        check_decoder(model.body, base_name)
        model.config.base_weights = model_mark(model.body)
        width = model.head.in_features
        noise_D = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model.head.weight.copy_(noise_D[None] / (width + 1) ** 0.5)
            model.head.bias.zero_()
            if model.skip_head is not None:
                model.skip_head.weight.zero_()
        ready: RewardModel = model.eval()
        return ready

    def _init_weights(self, module: nn.Module) -> None:
        """The body initialises itself; only the heads are ours."""
        if module is self.skip_head:
            nn.init.zeros_(module.weight)
        if module is self.head:
            nn.init.normal_(module.weight, std=(module.in_features + 1) ** -0.5)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding module."""
        module: nn.Module = self.body.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embedding module."""
        self.body.set_input_embeddings(value)

    @property
    def embedding_table_VD(self) -> Tensor:
        """Input embeddings of all tokens as `embed` returns them, [V, D], detached."""
        module = self.get_input_embeddings()
        table = input_table(self)
        if type(module) is nn.Embedding:
            return table.detach()
        with torch.no_grad():  # some scale what they look up, rounded in a way of their own
            return self.embed(torch.arange(len(table), device=table.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids [...] in the input table: [..., D]."""
        embeddings: Tensor = self.get_input_embeddings()(tokens)
        return embeddings

    @property
    def embedding_width(self) -> int:
        """Width of the input table, D of the particles; not always that of the hidden states."""
        return int(self.config.embedding_width or self.config.build_body_config().hidden_size)

    def freeze(self) -> RewardModel:
        """Eval mode, and no parameter requires a gradient: backward then goes to the inputs only."""
        self.eval().requires_grad_(False)
        return self

    def unfreeze(self) -> RewardModel:
        """Make the parameters trainable, the input embeddings only if the configuration says so."""
        self.requires_grad_(True)
        self.get_input_embeddings().requires_grad_(self.config.train_embeddings)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        response_mask: Tensor | None = None,
        token_level: bool = False,
    ) -> Tensor:
        """Score whole sequences, prompt and response together, or every prefix of each response at once.

        Args:
            input_ids: [R, S] token ids, padded on either side; or give `inputs_embeds` [R, S, D].
            attention_mask: [R, S], 1 where a token stands; None: everywhere.
            inputs_embeds: [R, S, D] in place of `input_ids`.
            response_mask: [R, S], 1 where a response token stands; ignored by pooling "last" without a skip, unless
                `token_level`.
            token_level: return values_RS in place of rewards_R. A response token holds the reward of the response cut
                after it (the last one that of the whole), the token before the first one the value of the prompt alone
                (the head on that token's hidden state, no skip), any other column 0.

        Returns:
            rewards_R ([R, K] of K objectives) or values_RS (`pooling.prefix_columns` lines them up by prefix), float32.

        Raises:
            ModelError: there is no response_mask where one is needed, a row has nothing to pool, or `token_level` and a
                response has no prompt before it.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ModelError("forward needs input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        pools_response = self.config.pooling == "mean"
        if response_mask is None:
            if pools_response or self.config.input_skip or token_level:
                raise ModelError("this reward model pools over the response: pass response_mask to forward")
            response_mask = attention_mask  # which nothing below looks at
        hidden_RSD = self.body(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask),
            use_cache=False,
        ).last_hidden_state
        if token_level:
            return self._token_values(hidden_RSD, inputs_embeds, response_mask)
        rewards_R = self._read(self._pool(hidden_RSD, response_mask if pools_response else attention_mask))
        return rewards_R if self.skip_head is None else rewards_R + self._skip(inputs_embeds, response_mask)

    def _token_values(self, hidden_RSD: Tensor, u_RSD: Tensor, response_mask_RS: Tensor) -> Tensor:
        """Read the heads at every token and pool what they read; see `forward`."""
        self.config.check_one_output()
        mask_RS = response_mask_RS.bool()
        check_pooled(mask_RS)
        prompt_RS = prompt_end(mask_RS)
        alone = (~prompt_RS.any(dim=-1)).nonzero()
        if len(alone):
            raise ModelError(f"row {int(alone[0])} starts with its response; a token-level value needs a prompt")
        reads_RS = self._read(hidden_RSD.float().masked_fill(~(mask_RS | prompt_RS)[..., None], 0.0))
        values_RS = running_mean(reads_RS, mask_RS) if self.config.pooling == "mean" else reads_RS
        if self.skip_head is not None:
            values_RS = values_RS + running_mean(self._read_skip(u_RSD.float()), mask_RS)
        return values_RS.masked_fill(~mask_RS, 0.0) + reads_RS.masked_fill(~prompt_RS, 0.0)

    def prefix(self, prompts: Sequence[Sequence[int]]) -> PromptPrefix:
        """Run B prompts (token ids) once; the result serves any number of `score` calls.

        Raises:
            ModelError: the model has a template of its own, and a prompt does not say what it was made of.
        """
        if self.own_tokenizer is not None:
            prompts = [self._own_prompt(prompt) for prompt in prompts]
        return compute_prefix(self.body, prompts, self.config.pad_token_id or 0)

    def _own_prompt(self, prompt: Sequence[int]) -> Sequence[int]:
        """Encode a prompt under the model's own template."""
        if not isinstance(prompt, EncodedPrompt):
            raise ModelError(
                "this reward model reads prompts under its own chat template: give what `encode_prompt` returns"
            )
        return encode_prompt(self.own_tokenizer, prompt.prompt)

    def score(self, prefix: PromptPrefix, responses: Tensor, mask_BNT: Tensor) -> Tensor:
        """Score N responses to each of B prompts; equals `forward` on prompt + response.

        Args:
            prefix: of the B prompts, from `prefix`.
            responses: token ids [B, N, T] (scored without a graph), or embeddings [B, N, T, D] (differentiable).
            mask_BNT: bool, right padded; at least one token a response.

        Returns:
            values_BN, float32.

        Raises:
            ModelError: a response is empty, or the model has several objectives.
        """
        if responses.is_floating_point():
            return self.score_with_hidden(prefix, responses, mask_BNT)[0]
        with torch.no_grad():
            return self.score_with_hidden(prefix, self.embed(responses), mask_BNT)[0]

    def score_with_hidden(
        self, prefix: PromptPrefix, u_BNTD: Tensor, mask_BNT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score embeddings and return what the heads read, all of one forward pass.

        Args:
            prefix: of the B prompts, from `prefix`.
            u_BNTD: response embeddings (differentiable).
            mask_BNT: bool, right padded; at least one token a response.

        Returns:
            values_BN, float32; hidden_BNTD after the final norm (of no meaning at padding); and pooled_BND, float32,
            what `head` reads.

        Raises:
            ModelError: a response is empty, or the model has several objectives.
        """
        self.config.check_one_output()
        B, N, T = mask_BNT.shape
        mask_RT, u_RTD = mask_BNT.reshape(B * N, T), u_BNTD.reshape(B * N, T, -1)
        if self.config.closing is not None:
            u_RTD, mask_RT = self._closed(u_RTD, mask_RT.bool())
        hidden_RTD = forward_with_prefix(self.body, prefix.expand(N), u_RTD, mask_RT)
        pooled_RD = self._pool(hidden_RTD, mask_RT)
        values_R = self._read(pooled_RD)
        if self.skip_head is not None:
            values_R = values_R + self._skip(u_RTD, mask_RT)
        hidden_RTD = hidden_RTD[:, :T]
        return values_R.reshape(B, N), hidden_RTD.reshape(B, N, T, -1), pooled_RD.reshape(B, N, -1)

    def _closed(self, u_RTD: Tensor, mask_RT: Tensor) -> tuple[Tensor, Tensor]:
        """Put the closing's embeddings where each response's EOS stands, or after a response without one."""
        closing_CD, ends_ED = (
            self.embed(torch.tensor(ids or [], dtype=torch.long, device=u_RTD.device)).detach()
            for ids in (self.config.closing, self.config.end_ids)
        )
        return close_responses(u_RTD, mask_RT, closing_CD, ends_ED)

    def skip_gradient(self, mask_BNT: Tensor) -> Tensor:
        """Return the gradient of the input skip, v / (T rms), at every response token: [B, N, T, D], 0 without one."""
        mask_BNT1 = mask_BNT.bool().unsqueeze(-1).float()
        if self.skip_head is None:
            return mask_BNT1 * torch.zeros(self.embedding_width, device=mask_BNT.device)
        direction_D = self.skip_head.weight[0].detach() / self.table_scale
        return direction_D * mask_BNT1 / mask_BNT1.sum(dim=2, keepdim=True).clamp(min=1)

    def _pool(self, hidden_RTD: Tensor, mask_RT: Tensor) -> Tensor:
        """Pool by mask, in float32 whatever the autocast around it."""
        check_pooled(mask_RT)
        return (pool_last if self.config.pooling == "last" else pool_mean)(hidden_RTD, mask_RT)

    def read_tokens(self, hidden: Tensor, embeddings: Tensor, tokens: int) -> Tensor:
        """Return what the heads read at the last of ``tokens`` tokens, float32 [...], of [..., D].

        Under mean pooling a response's value is the mean of its tokens' reads; under last pooling a skip counts 1 / T.
        """
        self.config.check_one_output()
        reads, share = self._read(hidden.float()), 1 if self.config.pooling == "mean" else tokens
        return reads if self.skip_head is None else reads + self._read_skip(embeddings.float()) / share

    def _read(self, pooled: Tensor) -> Tensor:
        """Apply the head in float32 to [..., D]."""
        with torch.autocast(pooled.device.type, enabled=False):
            scores: Tensor = self.head(pooled.to(next(self.head.parameters()).dtype))
            return scores.squeeze(-1).float()

    def _skip(self, u_RTD: Tensor, mask_RT: Tensor) -> Tensor:
        """Read the mean input embedding of the response."""
        return self._read_skip(pool_mean(u_RTD, mask_RT))

    def _read_skip(self, u: Tensor) -> Tensor:
        """Apply the skip's head in float32 to embeddings [..., D], in root mean squares of the table."""
        assert self.skip_head is not None
        with torch.autocast(u.device.type, enabled=False):
            scores: Tensor = self.skip_head((u / self.table_scale).to(self.skip_head.weight.dtype))
            return scores.squeeze(-1).float()

    @property
    def table_scale(self) -> float:
        """Root mean square of the input table, read once: the table is frozen where a skip is of use."""
        if self._scale is None:
            self._scale = float(self.embedding_table_VD.float().square().mean().sqrt())
        return self._scale


CONFIG_MAPPING.register(RewardModelConfig.model_type, RewardModelConfig, exist_ok=True)
AutoModel.register(RewardModelConfig, RewardModel, exist_ok=True)
