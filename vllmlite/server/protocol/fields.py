"""Rules for request fields that an endpoint does not have: a field that would change the text is refused, others are
ignored.

The tables list names that change the text, and names without effect. An endpoint's own fields take precedence. Other
unknown fields are ignored and logged once; ``--strict-requests`` refuses them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vllmlite.config.refused import Absent

BOOKKEEPING = frozenset(
    "user metadata store service_tier safety_identifier session_id prompt_cache_key prompt_cache_retention "
    "prompt_cache_options cache_control diagnostics user_profile_id workspace_id client_metadata "
    "max_tool_calls truncation id_slot t_max_prompt_ms model".split()
)
"""Parameters of the served APIs that do not affect an answer. ``max_tool_calls`` limits OpenAI's built-in tools, which
do not exist here; ``truncation`` is about conversations that are too long, which are always refused; ``id_slot``
selects llama.cpp's cache slot; ``t_max_prompt_ms`` is not enforced by llama.cpp either; llama-server ignores
``model``."""

SYNONYMS = (
    (
        "max_tokens",
        "n_predict",
        "max_output_tokens",
        "max_completion_tokens",
        "max_new_tokens",
        "num_predict",
    ),
    ("min_tokens", "min_new_tokens"),
    ("repetition_penalty", "repeat_penalty"),
    ("seed", "random_seed"),
    ("stop", "stop_sequences"),
    ("ignore_eos", "ban_eos_token"),
    ("include_stop_str_in_output", "no_stop_trim"),
    ("thinking", "think"),
    ("thinking_token_budget", "thinking_budget"),
)
"""Names of the same parameter in several APIs; an endpoint maps each to the first name that it has as a field."""


_NAMES_OF = {name: names for names in SYNONYMS for name in names}


def synonym(name: str, fields: Collection[str]) -> str | None:
    """Return the field in ``fields`` that another API calls ``name``, or None."""
    others = _NAMES_OF.get(name)
    return None if others is None else next((other for other in others if other in fields), None)


_UNUSED = (None,)
_SAMPLER = "this sampler is not available: use temperature, top_k, top_p, min_p and the penalties"
_TEXT_ONLY = "only text is supported"
_TOOLS = "tools are only supported in conversations: see /v1/chat/completions"
_OLD_NAME = "vLLM's old name: see structured_outputs"
_NO_LORA = "adapters are chosen by their names: see model"
_ELSEWHERE = "this endpoint has no such parameter: see /v1/chat/completions and /v1/completions"
_NO_SEARCH = "there is no web search"
_OLLAMA = "Ollama's own API is not served: options are fields of their own, such as temperature"

PROMPT_CHANGING: Mapping[str, Absent] = {
    "functions": Absent((None, []), "deprecated by OpenAI: see tools"),
    "function_call": Absent((None, "none"), "deprecated by OpenAI: see tool_choice"),
    "system": Absent((None, ""), "put a system message into messages"),
    "template": Absent((None, ""), "see chat_template"),
    "prompt_embeds": Absent(_UNUSED, "prompts are text or token ids"),
    "images": Absent((None, []), _TEXT_ONLY),
}
"""Fields known to change a prompt."""

_SAMPLERS: Mapping[str, Absent] = {
    # llama.cpp
    "dynatemp_range": Absent((None, 0, 0.0), _SAMPLER),
    "dynatemp_exponent": Absent((None, 1, 1.0), _SAMPLER),
    "typical_p": Absent((None, 1, 1.0), _SAMPLER),
    "typ_p": Absent((None, 1, 1.0), _SAMPLER),
    "adaptive_target": Absent((None, -1, -1.0), _SAMPLER),
    "adaptive_decay": Absent((None, 0.9), _SAMPLER),
    "top_n_sigma": Absent((None, -1, -1.0, 0, 0.0), _SAMPLER),
    "mirostat": Absent((None, 0), _SAMPLER),
    "mirostat_tau": Absent((None, 5, 5.0), _SAMPLER),
    "mirostat_eta": Absent((None, 0.1), _SAMPLER),
    "xtc_probability": Absent((None, 0, 0.0), _SAMPLER),
    "xtc_threshold": Absent((None, 0.1), _SAMPLER),
    "dry_multiplier": Absent((None, 0, 0.0), _SAMPLER),
    "dry_base": Absent((None, 1.75), _SAMPLER),
    "dry_allowed_length": Absent((None, 2), _SAMPLER),
    "dry_penalty_last_n": Absent((None, -1), _SAMPLER),
    "dry_sequence_breakers": Absent((None, ["\n", ":", '"', "*"]), _SAMPLER),
    "min_keep": Absent((None, 0), _SAMPLER),
    "repeat_last_n": Absent((None, -1, 64), "penalties see the whole prompt and output"),
    # text-generation-webui, KoboldCpp, TabbyAPI, Aphrodite
    "top_a": Absent((None, 0, 0.0), _SAMPLER),
    "tfs": Absent((None, 1, 1.0), _SAMPLER),
    "tfs_z": Absent((None, 1, 1.0), _SAMPLER),
    "typical": Absent((None, 1, 1.0), _SAMPLER),
    "epsilon_cutoff": Absent((None, 0, 0.0), _SAMPLER),
    "eta_cutoff": Absent((None, 0, 0.0), _SAMPLER),
    "smoothing_factor": Absent((None, 0, 0.0), _SAMPLER),
    "smoothing_curve": Absent((None, 1, 1.0), _SAMPLER),
    "skew": Absent((None, 0, 0.0), _SAMPLER),
    "nsigma": Absent((None, 0, 0.0), _SAMPLER),
    "dynamic_temperature": Absent((None, False), _SAMPLER),
    "temperature_last": Absent((None, False), "temperature comes before the other samplers"),
    "sampler_priority": Absent((None, []), "the order of samplers cannot be chosen: see samplers"),
    "sampler_order": Absent((None, []), "the order of samplers cannot be chosen: see samplers"),
    "mirostat_mode": Absent((None, 0), _SAMPLER),
    "no_repeat_ngram_size": Absent((None, 0), _SAMPLER),
    "encoder_repetition_penalty": Absent((None, 1, 1.0), _SAMPLER),
    "repetition_penalty_range": Absent((None, 0, -1), "penalties see the whole prompt and output"),
    "repetition_decay": Absent((None, 0), _SAMPLER),
    "penalty_alpha": Absent((None, 0, 0.0), _SAMPLER),
    "guidance_scale": Absent((None, 1, 1.0), "guidance by a second prompt is not supported"),
    "cfg_scale": Absent((None, 1, 1.0), "guidance by a second prompt is not supported"),
    "negative_prompt": Absent((None, ""), "guidance by a second prompt is not supported"),
    "banned_strings": Absent((None, [], ""), "see bad_words"),
    "banned_tokens": Absent((None, [], ""), "see bad_words and logit_bias"),
    "custom_token_bans": Absent((None, [], ""), "see logit_bias"),
    # text-generation-inference, SGLang, OpenVINO, transformers
    "do_sample": Absent((None, True), "temperature 0 is greedy"),
    "num_beams": Absent((None, 1), "see use_beam_search"),
    "min_length": Absent((None, 0), "see min_tokens"),
    "watermark": Absent((None, False), "nothing is watermarked"),
    "truncate": Absent(_UNUSED, "see truncate_prompt_tokens"),
    "return_full_text": Absent((None, False), "see echo"),
    "stop_regex": Absent((None, []), "see stop"),
    "regex": Absent(_UNUSED, "see structured_outputs"),
    "ebnf": Absent(_UNUSED, "see structured_outputs"),
    "custom_logit_processor": Absent(_UNUSED, "custom logits processors are not supported: see logit_bias"),
    "separate_reasoning": Absent((None, True), "see reasoning_format"),
}
"""Samplers of other servers."""

_FEATURES: Mapping[str, Absent] = {
    "suffix": Absent((None, ""), "text is only continued, not filled in: see /infill for models that can"),
    "logits_processors": Absent((None, []), "custom logits processors are not supported: see logit_bias"),
    "audio": Absent(_UNUSED, _TEXT_ONLY),
    "modalities": Absent((None, ["text"]), _TEXT_ONLY),
    "image_data": Absent((None, []), _TEXT_ONLY),
    "multimodal_data": Absent((None, []), _TEXT_ONLY),
    "web_search_options": Absent(_UNUSED, _NO_SEARCH),
    "web_search": Absent((None, False), _NO_SEARCH),
    "enable_search": Absent((None, False), _NO_SEARCH),
    "search_parameters": Absent((None, {"mode": "off"}), _NO_SEARCH),
    "plugins": Absent((None, []), "there are no plugins"),
    "post_sampling_probs": Absent((None, False), "probabilities are those before sampling"),
    "repetition_detection": Absent(
        _UNUSED, "an answer that repeats itself is not ended: see repetition_penalty"
    ),
    "watermarking": Absent((None, False), "nothing is watermarked"),
    "vllm_xargs": Absent((None, {}), "there are no extensions to pass arguments to"),
    "lora": Absent((None, []), _NO_LORA),
    "lora_path": Absent(_UNUSED, _NO_LORA),
    "adapter_id": Absent(_UNUSED, _NO_LORA),
    "safe_prompt": Absent((None, False), "put a system message into messages"),
    "prompt_mode": Absent(_UNUSED, "see reasoning_effort"),
    "tools": Absent((None, []), _TOOLS),
    "tool_choice": Absent((None, "none", "auto"), _TOOLS),
    "parallel_tool_calls": Absent((None, True, False), _TOOLS),
    "guided_json": Absent(_UNUSED, _OLD_NAME),
    "guided_regex": Absent(_UNUSED, _OLD_NAME),
    "guided_choice": Absent(_UNUSED, _OLD_NAME),
    "guided_grammar": Absent(_UNUSED, _OLD_NAME),
    "guided_decoding_backend": Absent(_UNUSED, _OLD_NAME),
    "guided_whitespace_pattern": Absent(_UNUSED, _OLD_NAME),
    "moderation": Absent(_UNUSED, "nothing is moderated"),
    "verbosity": Absent((None, "medium"), "the model's verbosity cannot be chosen"),
    "options": Absent((None, {}), _OLLAMA),
    "format": Absent((None, ""), "see response_format"),
}
"""Features of other servers, OpenAI and vLLM."""

_OTHER_ENDPOINTS: Mapping[str, Absent] = {
    name: Absent((None, *neutral), _ELSEWHERE)
    for neutral, names in (
        (
            (),
            "temperature max_tokens max_completion_tokens allowed_token_ids structured_outputs grammar json_schema",
        ),
        (
            (),
            "chat_template reasoning_effort thinking enable_thinking thinking_token_budget thinking_budget samplers",
        ),
        ((), "truncate_prompt_tokens"),
        ((1, 1.0), "n best_of top_p repetition_penalty length_penalty"),
        ((0, 0.0), "min_p presence_penalty frequency_penalty min_tokens"),
        ((0, -1), "top_k"),
        ((-1,), "seed"),
        (([],), "stop stop_token_ids bad_words documents logprob_token_ids"),
        (({},), "logit_bias chat_template_kwargs"),
        (({"type": "text"},), "response_format"),
        (
            (False,),
            "ignore_eos include_stop_str_in_output echo continue_final_message use_beam_search early_stopping",
        ),
        (("left",), "truncation_side"),
    )
    for name in names.split()
}
"""Fields that other endpoints of this server honour."""

TEXT_CHANGING: Mapping[str, Absent] = {**_OTHER_ENDPOINTS, **PROMPT_CHANGING, **_SAMPLERS, **_FEATURES}
"""Fields known to change the text; an endpoint that does not have them refuses them, unless their value has no
effect."""

RESPONSES_TEXT_CHANGING: Mapping[str, Absent] = {
    **TEXT_CHANGING,
    "prompt": Absent(_UNUSED, "there are no stored prompts: give instructions"),
    "context_management": Absent((None, []), "there is nothing that compacts a conversation"),
    "messages": Absent(_UNUSED, "see input"),
}

_ANTHROPICS = "is a feature of Anthropic's own service"
MESSAGES_PROMPT_CHANGING: Mapping[str, Absent] = {
    "container": Absent(_UNUSED, _ANTHROPICS),
    "mcp_servers": Absent((None, []), _ANTHROPICS),
    "compaction": Absent(_UNUSED, _ANTHROPICS),
}
MESSAGES_TEXT_CHANGING: Mapping[str, Absent] = {**TEXT_CHANGING, **MESSAGES_PROMPT_CHANGING}

VECTOR_CHANGING: Mapping[str, Absent] = {
    name: Absent((None, ""), "put the instruction before each input: the model's prompts have no names here")
    for name in ("input_type", "prompt_name", "instruction", "prompt", "task", "query_instruction")
} | {
    "truncate": Absent((None, "NONE", "none"), "see truncate_prompt_tokens"),
    "images": Absent(_UNUSED, _TEXT_ONLY),
}
"""Fields that change an embedding."""
