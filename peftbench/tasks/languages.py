"""Source and target language of a translation, for backbones with language codes (mBART, M2M100, NLLB)."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftbench.utils.errors import UserError, describe_unknown


def set_languages(tokenizer: PreTrainedTokenizerBase, source: str | None, target: str | None) -> None:
    """Tell the tokenizer which languages it reads and writes. A tokenizer without codes is unchanged.

    None keeps the language that the tokenizer is set to. Raises UserError if it has no such code.
    """
    if not hasattr(tokenizer, "src_lang"):
        return
    codes = [*getattr(tokenizer, "lang_code_to_token", ())]  # M2M100: its token of en is __en__
    codes = codes or [token for token in tokenizer.all_special_tokens if "_" in token]
    for key, code in (("task.source_language", source), ("task.target_language", target)):
        if code is not None and code not in codes:
            raise UserError(describe_unknown(key, code, codes))
    tokenizer.src_lang = source or tokenizer.src_lang
    tokenizer.tgt_lang = target or tokenizer.tgt_lang or tokenizer.src_lang


def begin_in_language(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model write in the language that `set_languages` has set.

    mBART-cc25 ends a text with its code, and generation starts from the target's code, which the model moves to the
    front of the decoder's input. mBART-50, M2M100 and NLLB begin a text with its code, which is then forced as the
    first generated token. How the tokenizer encodes a target tells the two apart.

    Raises:
        UserError: the tokenizer is of the first kind, and the model of the second.
    """
    if not hasattr(tokenizer, "src_lang"):
        return
    written = get_written_language(tokenizer)
    ids = tokenizer(text_target="")["input_ids"]
    assert model.generation_config is not None
    if ids[-1] == written and model.config.model_type == "m2m_100":
        raise UserError(
            "The tokenizer puts the language code after a text, and this backbone (m2m_100) reads it before: set "
            "legacy_behaviour to false in its tokenizer_config.json."
        )
    if ids[-1] == written:
        model.generation_config.decoder_start_token_id = written
        model.generation_config.forced_bos_token_id = None
    elif ids[0] == written:
        model.generation_config.forced_bos_token_id = written


def get_written_language(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the code of the output language that `set_languages` has set; None if there are no codes."""
    if not hasattr(tokenizer, "src_lang"):
        return None
    token = getattr(tokenizer, "lang_code_to_token", {}).get(tokenizer.tgt_lang, tokenizer.tgt_lang)
    code: int = tokenizer.convert_tokens_to_ids(token)
    return code
