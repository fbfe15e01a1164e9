"""transformers' table of each family's ``config.json``: its keys, their defaults, and other names of the keys.

``scripts/config_table.py`` generates ``config_keys.json``. It allows one rule for all families: an absent key has
transformers' default, and a key that the family's code does not read must have that default, or the model is refused.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

from vllmlite.models.hf_config import HfConfig

logger = logging.getLogger(__name__)

FILE = Path(__file__).with_name("config_keys.json")
NEUTRAL: dict[str, str] = {
    "only training uses them": """
        activation_dropout attention_dropout attention_probs_dropout_prob attn_pdrop classifier_dropout dropout
        embd_pdrop hidden_dropout hidden_dropout_prob init_std initializer_range layerdrop output_router_logits
        resid_pdrop router_aux_loss_coef router_jitter_noise summary_first_dropout""",
    "other heads than the language model's use them": """
        id2label label2id num_labels problem_type summary_activation summary_proj_to_labels summary_type
        summary_use_proj task_specific_params""",
    "they name tokens, or are defaults of requests": """
        bos_token_id decoder_start_token_id do_sample eos_token_id max_length min_length pad_token_id prefix
        repetition_penalty sep_token_id temperature tokenizer_class top_k top_p unk_token_id""",
    "they say in what form transformers gives its results, or how it computes the same ones": """
        _attn_implementation cache_implementation chunk_size_feed_forward is_decoder output_attentions
        output_hidden_states pretraining_tp reorder_and_upcast_attn return_dict slow_but_exact torchscript use_cache""",
    "they describe the file": """
        _name_or_path architectures auto_map dtype is_encoder_decoder model_type pruned_heads torch_dtype
        transformers_version trust_remote_code""",
}
"""Keys that do not change the results, by the reason why."""
_EVERY = {"is_causal": True, "use_bidirectional_attention": None}
"""Keys that transformers reads from every configuration that has them, with their defaults."""
_IGNORED = frozenset(" ".join(NEUTRAL.values()).split())


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return table


def with_defaults(config: HfConfig, model_type: str) -> HfConfig:
    """Return ``config`` completed with transformers' defaults for keys of ``model_type`` that are absent."""
    family = _table()["families"][model_type]
    names = {key: {key} for key in family["keys"]}
    for alias, key in family["aliases"].items():
        names.get(key, set()).add(alias)
    given = config.keys()
    absent = {key: value for key, value in family["keys"].items() if not names[key] & given}
    return config.fixed(**{key: value for key, value in absent.items() if value is not None})


def check_remaining(config: HfConfig, model_type: str) -> None:
    """Raise ModelError if an unread key changes the results; log keys that transformers does not know."""
    defaults = {**_EVERY, **_table()["families"][model_type]["keys"]}
    unknown = []
    for key, value in config.remaining().items():
        if key in _IGNORED:
            continue
        if key not in defaults:
            unknown.append(key)
        elif not (value == defaults[key] or (not value and not defaults[key])):
            raise config.error(
                key, f"{json.dumps(defaults[key])}, the only supported value for {model_type} models"
            )
    if unknown:
        logger.info("%s: unknown keys without effect: %s", config.where, ", ".join(sorted(unknown)))
