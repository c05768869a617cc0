"""Reading config.json without letting anything pass unread. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.errors import UnsupportedModelError

# Keys that change nothing at inference: training, generation defaults (read elsewhere), bookkeeping, and the base
# fields that transformers 4 wrote into every nested config.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout attn_implementation auto_map
    begin_suppress_tokens bad_words_ids bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty
    do_sample dropout dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout id2label
    initializer_factor initializer_range is_composition is_matryoshka keys_to_ignore_at_inference label2id
    length_penalty matryoshka_dimensions max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type projection_dim remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class
    top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache
    """.split()
)

# Keys that say nothing while they hold one of these values (null always counts).
HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}


class StrictConfig:
    """A config dict that knows which of its keys were read.

    Args:
        where: what to call it in errors: ``text_config``.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = None) -> Any:
        """The value of ``name``; ``default`` where it is absent or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def require(self, name: str) -> Any:
        """The value of ``name``.

        Raises:
            UnsupportedModelError: it is absent or null.
        """
        value = self.take(name)
        if value is None:
            raise UnsupportedModelError(f"{self._where} has no {name!r}, which its model type needs.")
        return value

    def choose(self, name: str, allowed: Sequence[Any], default: Any) -> Any:
        """The value of ``name``, which must be one of ``allowed``.

        Raises:
            UnsupportedModelError: it is another one.
        """
        value = self.take(name, default)
        if value not in allowed:
            known = ", ".join(repr(option) for option in allowed)
            raise UnsupportedModelError(f"{self._where}.{name} is {value!r}; implemented are {known}.")
        return value

    def skip(self, *names: str) -> None:
        """Declare keys that this model type may carry and that change nothing."""
        self._read.update(names)

    def rest(self) -> dict[str, Any]:
        """What was left unread, for another reader."""
        return {name: value for name, value in self._values.items() if name not in self._read}

    def finish(self) -> None:
        """Refuse what was left unread.

        Raises:
            UnsupportedModelError: names the first unknown key and its value.
        """
        for name, value in self._values.items():
            if name in self._read or name in HARMLESS or value is None:
                continue
            if value in HARMLESS_VALUES.get(name, ()):
                continue
            raise UnsupportedModelError(
                f"{self._where}.{name} is {value!r}, a setting that opsin does not know. Running without it could "
                "give wrong answers. Use a supported checkpoint, or remove the key if it changes nothing."
            )


def text_settings(config: Mapping[str, Any], outer_keys: Sequence[str], sections: Sequence[int]) -> dict[str, Any]:
    """The language model's settings: those of text_config, or all of a flat config.json's.

    Args:
        outer_keys: those that belong to config.json, wherever they are found.
        sections: M-RoPE's by default.

    Raises:
        UnsupportedModelError: an unknown key beside a text_config.
    """
    nested = config.get("text_config")
    text = {key: value for key, value in (nested or config).items() if key not in outer_keys}
    if nested:
        outer = StrictConfig(config, "config.json")
        outer.skip(*outer_keys, "tie_word_embeddings", *(key for key in text if config.get(key) == text[key]))
        outer.finish()
    rope = {"mrope_section": sections, **(text.get("rope_parameters") or text.get("rope_scaling") or {})}
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return {**text, "rope_parameters": rope, "tie_word_embeddings": tied}
