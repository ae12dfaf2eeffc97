"""LLMForLastTokenRanking: decoder that scores a text by the hidden state of its last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_disranker.models.checkpoint import LABEL_EXPECTATION, RankerOutput
from hf_disranker.models.checks import check_vocabulary
from hf_disranker.models.families import is_decoder
from hf_disranker.models.modeling import PreTrainedRanker, score_in_fp32
from hf_disranker.models.packing import install, parameters, plan

PAD_TOKEN = "<|pad|>"


class LLMForLastTokenRanking(PreTrainedRanker):
    """Decoder that scores a text by its last token's hidden state times one row of weights.

    It reads one text, query first and then the document (`config.marker.templates`); the tokenizer ends it with the
    end-of-sequence token, which attends to all others. On disk it is the stock `<Family>ForSequenceClassification`.
    With a config of `expect_labels` the score is the expected grade over label tokens, sum of grade times probability,
    and the checkpoint is the stock `<Family>ForCausalLM`; load it by this class or `AutoModel`.
    `from_pretrained` and `from_config` return the class of the checkpoint's family, `LlamaForLastTokenRanking` for
    instance; a causal language model is accepted and gets a new score row. A folder of LoRA weights loads as the base
    model with the adapter.

    Args:
        config: Config of a supported family, plain or of a marked checkpoint. A plain one is copied and marked.
    """

    role = "teacher"
    supports = staticmethod(is_decoder)
    kind = "decoder"
    suffix = "ForLastTokenRanking"
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        marked = self.config
        if not isinstance(getattr(self, "score", None), nn.Linear):
            raise ValueError(
                f"A {config.model_type} model cannot be a teacher: {marked.architecture} does not score the last "
                "token by one row of weights named score."
            )
        if marked.marker.head == LABEL_EXPECTATION:
            del self.score
            self.lm_head = nn.Linear(marked.hidden_size, marked.vocab_size, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
            self.post_init()
        else:
            self.score.register_forward_hook(score_in_fp32)
        install(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        groups: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> RankerOutput | tuple[Tensor, ...]:
        """Score each row by its last real token.

        Args:
            input_ids: Shape (rows, tokens).
            attention_mask: 1 for real tokens, shape (rows, tokens); padding may be left or right.
            labels: Target scores, shape (rows,); the loss is the mean squared error, as in the stock classes.
            return_dict: If False, return the tuple (logits,), or (loss, logits) with labels.
            groups: A key for each row, such as its query. The common prefix of neighbours with equal keys is
                computed once, if the model skips padding.
            kwargs: Passed to the decoder, such as `inputs_embeds`. By default `position_ids` count the real tokens of
                each row, and `use_cache` is off.

        Returns:
            Logits of shape (rows, 1), and `scores` of shape (rows,), fp32.
        """
        inputs = {"use_cache": False} | kwargs | {"input_ids": input_ids, "attention_mask": attention_mask}
        counted = inputs.get("position_ids") is None and "position_ids" in parameters(type(self.base_model).forward)
        if (packed := plan(self, inputs, "last", groups)) is not None:
            inputs["packed"] = packed
        elif counted and attention_mask is not None and attention_mask.dim() == 2:
            inputs["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.base_model(**inputs)
        state = last_token(output.last_hidden_state, attention_mask if packed is None else None)
        logits = self._expected_grade(state) if hasattr(self, "lm_head") else self.score(state)
        loss = None if labels is None else nn.functional.mse_loss(logits.flatten().float(), labels.flatten().float())
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return RankerOutput(loss, logits, hidden_states=output.hidden_states, attentions=output.attentions)

    def _expected_grade(self, state: Tensor) -> Tensor:
        """Mean grade under the probabilities of the label tokens, shape (rows, 1), fp32."""
        marker = self.config.marker
        with torch.autocast(state.device.type, enabled=False):  # in bf16 close grades would tie
            logits = nn.functional.linear(state.float(), self.lm_head.weight[marker.label_tokens].float())
            if cap := getattr(self.config, "final_logit_softcapping", None):
                logits = cap * (logits / cap).tanh()
            grades = torch.tensor(marker.grades, dtype=torch.float32, device=logits.device)
            return (logits.softmax(dim=1) @ grades).unsqueeze(1)


def __getattr__(name: str) -> Any:
    return LLMForLastTokenRanking.generated(name)


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the hidden state of each row's last real token.

    It is found by the attention mask, not by the padding id: left padding, right padding and a padding id equal to the
    end-of-sequence id all return the same state.

    Args:
        hidden: Shape (rows, tokens, size).
        attention_mask: 1 for real tokens, shape (rows, tokens); None without padding.

    Returns:
        Shape (rows, size).

    Examples:
        >>> hidden = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
        >>> last_token(hidden, torch.tensor([[1, 1, 0], [0, 1, 1]]))  # padded on the right, padded on the left
        tensor([[2.],
                [6.]])
    """
    if attention_mask is None:
        return hidden[:, -1]
    places = torch.arange(attention_mask.shape[1], device=hidden.device)
    last = (attention_mask.to(torch.bool) * (places + 1)).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def expect_labels(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], ending: str = " relevance:"
) -> PreTrainedConfig:
    """Return the config of a teacher that scores by the expected grade over label tokens.

    The authors of DisRanker prefer this head to the last token in later work, as it is closer to pre-training. Pass it
    to `LLMForLastTokenRanking.from_pretrained(..., config=config)`.

    Args:
        config: Config of a causal language model.
        tokenizer: Its tokenizer; it is prepared for the ending, in place.
        labels: Word of each grade, from 0 up; each one token after the ending.
        ending: Text that ends each input, also a truncated one; the label would be the next token.

    Raises:
        ValueError: If a label is not one token of its own.
    """
    before = tokenizer.encode(ending, add_special_tokens=False)
    after = [tokenizer.encode(ending + label, add_special_tokens=False) for label in labels]
    tokens = [ids[-1] for ids in after]
    if any(ids[:-1] != before for ids in after) or len(set(tokens)) < len(labels):
        raise ValueError(f"Each of the labels {list(labels)} must be one token after {ending!r}; choose other words.")
    config = LLMForLastTokenRanking.family_class(config.model_type).config_class.mark(config)
    config.update_marker(head=LABEL_EXPECTATION, label_tokens=tokens, grades=list(range(len(labels))), ending=ending)
    prepare_tokenizer(tokenizer, ending)
    return config


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, ending: str | None = None) -> PreTrainedTokenizerBase:
    """Make a decoder's tokenizer end every text with its end-of-sequence token, and pad with another token.

    The post-processor adds the token, since in the text it would be lost to truncation. A padding id equal to the
    end-of-sequence id would make stock loaders read the token before it. Works in place and only once; the vocabulary
    may grow by the padding token, for which `fit_embeddings` extends the model.

    Args:
        tokenizer: The model's tokenizer.
        ending: Text to end with in place of the end-of-sequence token.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or no fast implementation.
    """
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__}: a teacher needs a fast tokenizer with an end-of-sequence token."
        )
    if ending is None:
        _end_with(tokenizer, [tokenizer.eos_token_id])
    else:
        _end_with(tokenizer, tokenizer.encode(ending, add_special_tokens=False))
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return tokenizer


def _end_with(tokenizer: PreTrainedTokenizerBase, ending: list[int]) -> None:
    """End every text with the given tokens, in place of those that the tokenizer appends."""
    if tokenizer("a")["input_ids"][-len(ending) :] == ending:
        return
    start = leading_tokens(tokenizer)
    text, parts = ("START $A", {"START": start, "ENDING": ending}) if start else ("$A", {"ENDING": ending})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{text} ENDING",
        pair=f"{text} $B:1 ENDING:1",
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)} for name, ids in parts.items()
        ],
    )


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that a tokenizer puts in front of every text, such as a bos token."""
    whole, letter = tokenizer("a")["input_ids"], tokenizer.encode("a", add_special_tokens=False)
    return whole[: whole.index(letter[0])]


@torch.no_grad()
def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Extend a decoder's embeddings to all tokens of a prepared tokenizer, and set its padding id, in place.

    New rows are zero, so that a checkpoint has the same weights on every machine: padding is masked and its row is not
    trained. Accepts a decoder with any head.

    Raises:
        ValueError: If the tokenizer belongs to another model.
    """
    check_vocabulary(model, tokenizer)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = 0
    model.config.pad_token_id = tokenizer.pad_token_id
    model.get_input_embeddings().padding_idx = tokenizer.pad_token_id  # excludes the row from training
