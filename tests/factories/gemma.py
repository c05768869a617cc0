"""What the tiny random checkpoints of Gemma's families share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.factory import redraw_weights, train_bpe


def build_gemma_tokenizer(signs: Mapping[str, str], *, image: str, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with Gemma's special tokens.

    Args:
        signs: the family's own, by the names of the tokenizer's attributes.
        image: what the chat template writes for a picture.
        adds_bos: every text begins with <bos>.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = train_bpe([*special, *signs.values()])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=dict(signs),
        chat_template=(
            "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{% for part in message['content'] %}"
            f"{{% if part['type'] == 'image' %}}{image}{{% elif 'text' in part %}}{{{{ part['text'] }}}}{{% endif %}}"
            "{% endfor %}{% endif %}{% endfor %}"
        ),
        clean_up_tokenization_spaces=False,
    )


def redraw_gemma_weights(model: torch.nn.Module, seed: int) -> None:
    """``redraw_weights``, and Gemma's norms around 0, since they add 1 to what they keep."""
    redraw_weights(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if type(owner).__name__.endswith("RMSNorm"):
                parameter.sub_(1.0)
