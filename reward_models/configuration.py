"""Configuration of a reward model: the cut decoder's own, and what its heads read."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import num_layers

POOLINGS = ("last", "mean")


class RewardModelConfig(PreTrainedConfig):
    """Configuration of a `RewardModel`.

    Attributes:
        body_config: configuration of the truncated decoder, as a dict with its `model_type`.
        pooling: "last" attended token, or "mean" over the attended response tokens.
        base_name: name or folder of the causal LM that the body was cut from.
        train_embeddings: whether training may move the input embeddings (off: the table stays the base model's).
        input_skip: whether the head also reads the mean of the response's input embeddings.
        pad_token_id: any valid id; padding is never attended to.
        embedding_width: of the input table, where the body's own configuration has another hidden size.
        output_width: of what the body returns, where it is not the body's hidden size.
        base_weights: mark of the base's weights that the body was cut from (`vgf_llm.runs.provenance`).
        closing: ids that take the place of a response's EOS, or follow a response without one, before it is read.
            None: responses are read as they are.
        end_ids: ids that count as an EOS there.
        objectives: names of the outputs, one each; empty: a single output without a name.
    """

    model_type = "vgf_reward"

    def __init__(
        self,
        body_config: dict[str, Any] | None = None,
        pooling: str = "last",
        base_name: str = "",
        train_embeddings: bool = False,
        input_skip: bool = False,
        pad_token_id: int | None = None,
        embedding_width: int | None = None,
        output_width: int | None = None,
        base_weights: str | None = None,
        closing: list[int] | None = None,
        end_ids: list[int] | None = None,
        objectives: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the fields; raises ValueError on an unknown pooling."""
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.body_config = body_config
        self.pooling = pooling
        self.base_name = base_name
        self.train_embeddings = train_embeddings
        self.input_skip = input_skip
        self.embedding_width = embedding_width
        self.output_width = output_width
        self.base_weights = base_weights
        self.closing, self.end_ids = closing, end_ids
        self.objectives = list(objectives or [])
        super().__init__(**{"pad_token_id": pad_token_id, **kwargs})

    def build_body_config(self) -> PreTrainedConfig:
        """Return the decoder's own configuration object."""
        if not self.body_config:
            raise ModelError("the reward model's config.json has no body_config; was it written by this package?")
        fields = copy.deepcopy(self.body_config)
        model_type = fields.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ModelError(f"the body's model_type {model_type!r} is not known to this version of transformers")
        try:
            config = CONFIG_MAPPING[model_type].from_dict(fields)
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(f"the configuration of {model_type!r} cannot be cut or read: {error}") from error
        if self.body_config.get("layer_types"):  # some configurations insist on a kind of last layer
            config.layer_types = list(self.body_config["layer_types"])
        return config

    @property
    def num_layers(self) -> int:
        """Decoder layers kept."""
        return num_layers(self.build_body_config())

    def check_one_output(self) -> None:
        """Refuse a model with several outputs where one score is read.

        Raises:
            ModelError: naming the objectives.
        """
        if len(self.objectives) > 1:
            raise ModelError(
                f"this reward model has an output per objective ({', '.join(self.objectives)}); load it with "
                "`load_reward_model` and the weights of its `outputs`, which makes them one score"
            )
