"""LLMForLastTokenRanking: a decoder that scores a text by the hidden state of its last token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma2PreTrainedModel,
    Gemma3PreTrainedModel,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaPreTrainedModel,
    MistralConfig,
    MistralPreTrainedModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2PreTrainedModel,
    Qwen3Config,
    Qwen3PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_disranker.data.templates import TEACHER_TEMPLATES
from hf_disranker.models.checkpoint import (
    HUB_OPTIONS,
    RankerConfigMixin,
    RankerOutput,
    adapter_base,
    check_vocabulary,
    load_config,
)
from hf_disranker.models.hub import RankerHubMixin
from hf_disranker.models.pooling import last_token

PAD_TOKEN = "<|pad|>"
LABEL_EXPECTATION = "label_expectation"


class TeacherConfigMixin(RankerConfigMixin):
    """What the configs of all teacher families share."""

    role = "teacher"
    head = "last_token"
    default_templates = TEACHER_TEMPLATES

    @classmethod
    def architecture_of(cls, head: str) -> str | None:
        """As in `RankerConfigMixin`; a teacher by label expectation is a causal language model on disk."""
        if head == LABEL_EXPECTATION:
            return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[cls.stock.model_type]
        return super().architecture_of(head)


class DisRankerLlamaConfig(TeacherConfigMixin, LlamaConfig):
    """The config of a marked Llama checkpoint.

    Its stock kin: [meta-llama/Llama-2-7b-hf](https://huggingface.co/meta-llama/Llama-2-7b-hf).
    """

    model_type = "llama"
    stock = LlamaConfig
    architecture = "LlamaForSequenceClassification"


class DisRankerQwen2Config(TeacherConfigMixin, Qwen2Config):
    """The config of a marked Qwen2 checkpoint.

    Its stock kin: [Qwen/Qwen2-7B](https://huggingface.co/Qwen/Qwen2-7B).
    """

    model_type = "qwen2"
    stock = Qwen2Config
    architecture = "Qwen2ForSequenceClassification"


class DisRankerQwen3Config(TeacherConfigMixin, Qwen3Config):
    """The config of a marked Qwen3 checkpoint.

    Its stock kin: [Qwen/Qwen3-8B](https://huggingface.co/Qwen/Qwen3-8B).
    """

    model_type = "qwen3"
    stock = Qwen3Config
    architecture = "Qwen3ForSequenceClassification"


class DisRankerMistralConfig(TeacherConfigMixin, MistralConfig):
    """The config of a marked Mistral checkpoint.

    Its stock kin: [mistralai/Mistral-7B-v0.1](https://huggingface.co/mistralai/Mistral-7B-v0.1).
    """

    model_type = "mistral"
    stock = MistralConfig
    architecture = "MistralForSequenceClassification"


class DisRankerGemma2Config(TeacherConfigMixin, Gemma2Config):
    """The config of a marked Gemma 2 checkpoint.

    Its stock kin: [google/gemma-2-9b](https://huggingface.co/google/gemma-2-9b).
    """

    model_type = "gemma2"
    stock = Gemma2Config
    architecture = "Gemma2ForSequenceClassification"


class DisRankerGemma3Config(TeacherConfigMixin, Gemma3TextConfig):
    """The config of a marked Gemma 3 checkpoint, the text model.

    Its stock kin: [google/gemma-3-1b-pt](https://huggingface.co/google/gemma-3-1b-pt).
    """

    model_type = "gemma3_text"
    stock = Gemma3TextConfig
    architecture = "Gemma3TextForSequenceClassification"


class LLMForLastTokenRanking(RankerHubMixin, PreTrainedModel):
    """A decoder whose last token's hidden state, times one row of weights, is the score of the text.

    It reads one text that holds the query and then the document (`config.templates`); the tokenizer ends it with the
    end-of-sequence token, which has seen all the others. On disk it is the stock `<Family>ForSequenceClassification`.
    With a config of `expect_labels` the score is the expected grade over label tokens instead, sum of grade times
    probability, and the checkpoint the stock `<Family>ForCausalLM`; it must be loaded by this class or `AutoModel`.
    `from_pretrained` and `from_config` give the class of the checkpoint's family; a causal language model is taken as
    well, its score row is then new.

    Args:
        config: a config of a known family, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: PreTrainedConfig) -> None:
        was_marked = isinstance(config, self.config_class)
        config = self.config_class.mark(config)
        super().__init__(config)
        self.was_marked = was_marked
        # The stock config: Auto classes would answer the marked one with this very class.
        self.model = AutoModel.from_config(_stock_config(config))
        if config.disranker["head"] == LABEL_EXPECTATION:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        else:
            self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a folder of LoRA weights gives their base model with the adapter on it.

        Raises:
            OSError: neither a folder nor on the Hub, or the weights are pickles, or cut off.
            ValueError: the checkpoint is of a family that is not known, or lacks more than its head.
        """
        name = pretrained_model_name_or_path
        if cls is not LLMForLastTokenRanking:
            return super().from_pretrained(name, *args, **kwargs)
        hub_options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        config = kwargs.get("config") or load_config(adapter_base(name) or name, **hub_options)
        return _family(config).from_pretrained(name, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> LLMForLastTokenRanking:
        """A teacher with random weights; raises ValueError for a family that is not known."""
        return _family(config)(config)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the decoder."""
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RankerOutput | tuple[Tensor, ...]:
        """Score each row by its last real token.

        Args:
            input_ids: shape (rows, tokens).
            attention_mask: 1 for real tokens, shape (rows, tokens); padding may stand left or right.
            position_ids: as in the backbone.
            inputs_embeds: in place of `input_ids`, shape (rows, tokens, size).
            labels: scores to learn, shape (rows,); the loss is then the mean squared error, as in the stock classes.
            return_dict: False gives the tuple (logits,), or (loss, logits) with labels.
            kwargs: go to the backbone; `use_cache` is off unless it is given.

        Returns:
            Logits of shape (rows, 1) and `scores` of shape (rows,), fp32.
        """
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{"use_cache": False} | kwargs,
        )
        logits = self.head_logits(last_token(output.last_hidden_state, attention_mask))
        loss = None if labels is None else nn.functional.mse_loss(logits.flatten().float(), labels.flatten().float())
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return RankerOutput(loss, logits, hidden_states=output.hidden_states, attentions=output.attentions)

    def head_logits(self, state: Tensor) -> Tensor:
        """What the head makes of the last tokens' hidden states, shape (rows, size): logits of shape (rows, 1)."""
        return self._expected_grade(state) if hasattr(self, "lm_head") else self.score(state)

    def _expected_grade(self, state: Tensor) -> Tensor:
        """Mean grade under the probabilities of the label tokens, shape (rows, 1), fp32."""
        marker = self.config.disranker
        # fp32 throughout: in bf16 near grades would tie.
        logits = nn.functional.linear(state.float(), self.lm_head.weight[marker["label_tokens"]].float())
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = cap * (logits / cap).tanh()
        grades = torch.tensor(marker["grades"], dtype=torch.float32, device=logits.device)
        return (logits.softmax(dim=1) @ grades).unsqueeze(1)


class LlamaForLastTokenRanking(LLMForLastTokenRanking, LlamaPreTrainedModel):
    """The teacher on Llama."""

    config_class = DisRankerLlamaConfig


class Qwen2ForLastTokenRanking(LLMForLastTokenRanking, Qwen2PreTrainedModel):
    """The teacher on Qwen2."""

    config_class = DisRankerQwen2Config


class Qwen3ForLastTokenRanking(LLMForLastTokenRanking, Qwen3PreTrainedModel):
    """The teacher on Qwen3."""

    config_class = DisRankerQwen3Config


class MistralForLastTokenRanking(LLMForLastTokenRanking, MistralPreTrainedModel):
    """The teacher on Mistral."""

    config_class = DisRankerMistralConfig


class Gemma2ForLastTokenRanking(LLMForLastTokenRanking, Gemma2PreTrainedModel):
    """The teacher on Gemma 2."""

    config_class = DisRankerGemma2Config


class Gemma3ForLastTokenRanking(LLMForLastTokenRanking, Gemma3PreTrainedModel):
    """The teacher on the text model of Gemma 3."""

    config_class = DisRankerGemma3Config


FAMILIES = {
    family.config_class.model_type: family
    for family in (
        LlamaForLastTokenRanking,
        Qwen2ForLastTokenRanking,
        Qwen3ForLastTokenRanking,
        MistralForLastTokenRanking,
        Gemma2ForLastTokenRanking,
        Gemma3ForLastTokenRanking,
    )
}


def expect_labels(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], ending: str = " relevance:"
) -> PreTrainedConfig:
    """The config of a teacher that scores by the expected grade over label tokens.

    The same authors prefer this head to the last token in later work, for it is closer to what the model was
    pre-trained on. Give it to `LLMForLastTokenRanking.from_pretrained(..., config=config)`.

    Args:
        config: that of a causal language model.
        tokenizer: its tokenizer; it is prepared for the ending.
        labels: the word of each grade, from 0 up; each one token when it follows the ending.
        ending: what stands behind each text, also when the document is cut; the label would come next.

    Raises:
        ValueError: a label is not one token of its own.
    """
    before = tokenizer.encode(ending, add_special_tokens=False)
    behind = [tokenizer.encode(ending + label, add_special_tokens=False) for label in labels]
    tokens = [ids[-1] for ids in behind]
    if any(ids[:-1] != before for ids in behind) or len(set(tokens)) < len(labels):
        raise ValueError(f"Each of the labels {list(labels)} must be one token behind {ending!r}; choose other words.")
    config = _family(config).config_class.mark(config)
    marker = {"label_tokens": tokens, "grades": list(range(len(labels))), "ending": ending}
    config.disranker |= {"head": LABEL_EXPECTATION} | marker
    prepare_tokenizer(tokenizer, ending)
    return config


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, ending: str | None = None) -> PreTrainedTokenizerBase:
    """Let a decoder's tokenizer end every text with its end-of-sequence token, and pad with another one.

    The tokenizer itself puts the token on: in the text it would be lost to truncation. A padding id that is also
    the end-of-sequence id would make stock loaders read the token before it. Works in place and only once; the
    vocabulary may grow by the padding token, for which `fit_embeddings` makes room in the model.

    Args:
        tokenizer: the model's.
        ending: text to end with in place of the end-of-sequence token.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token, or no fast implementation.
    """
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__}: a teacher needs a fast tokenizer with an end-of-sequence token."
        )
    if ending is not None:
        _end_with(tokenizer, tokenizer.encode(ending, add_special_tokens=False))
    elif tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        backend, eos = tokenizer.backend_tokenizer, tokenizer.eos_token
        last = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
        before = [backend.post_processor] if backend.post_processor is not None else []
        backend.post_processor = processors.Sequence([*before, last])
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


@torch.no_grad()
def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give each token of a prepared tokenizer its row of a decoder's embeddings, and the model its padding id.

    New rows are zero, so that a checkpoint has the same weights on every machine: padding is masked, its row
    not trained. Works in place; a decoder of any head will do.

    Raises:
        ValueError: the tokenizer is not the one that the model was trained with.
    """
    check_vocabulary(model, tokenizer)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = 0
    model.config.pad_token_id = tokenizer.pad_token_id
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id  # the row of this token is not trained


def _end_with(tokenizer: PreTrainedTokenizerBase, ending: list[int]) -> None:
    """Let every text end with the given tokens, in place of what the tokenizer puts behind it."""
    whole, text = tokenizer("a")["input_ids"], tokenizer.encode("a", add_special_tokens=False)
    if whole[-len(ending) :] != ending:
        start = next(whole[:at] for at in range(len(whole)) if whole[at : at + len(text)] == text)
        parts = {name: ids for name, ids in (("START", start), ("ENDING", ending)) if ids}
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="START $A ENDING" if start else "$A ENDING",
            special_tokens=[
                {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in parts.items()
            ],
        )


def _family(config: PreTrainedConfig) -> type[LLMForLastTokenRanking]:
    if config.model_type not in FAMILIES:
        raise ValueError(f"A {config.model_type} model cannot be a teacher; known families: {', '.join(FAMILIES)}.")
    return FAMILIES[config.model_type]


def _stock_config(config: Any) -> PreTrainedConfig:
    """A copy that the Auto classes take for a stock config."""
    stock = copy.deepcopy(config)
    stock.__class__ = config.stock
    return stock
