"""The demo's tokenizer: bytes, plus one token for every fixed phrase and word of the families.

Operands stay apart: each digit and each letter of a word to be spelled is a token of its own, while
"Spell this word backward (example: sun -> nus): " is one. So prompts have 10 to 90 tokens and any
text at all can be encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ground.answers import ANSWER_MARKER
from ground.herd.corpus import SYSTEMS
from ground.herd.families import FAMILIES
from ground.judging import JUDGE_QUESTION
from ground.records import LABELS

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad|>"
HEADER_START, HEADER_END, TURN_END = "<|header_start|>", "<|header_end|>", "<|eot|>"
SPECIAL_TOKENS = (PAD, BEGIN, END, HEADER_START, HEADER_END, TURN_END)
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|eot|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\\n\\n' }}
{%- endif %}
"""


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer; nothing is random and nothing is read from disk."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([AddedToken(text, normalized=False) for text in _phrases()])
    backend.add_tokens([AddedToken(text, normalized=False, single_word=True) for text in _words()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _phrases() -> Sequence[str]:
    system_instructions = (text for text in SYSTEMS if text)
    of_families = (phrase for family in FAMILIES.values() for phrase in family.phrases)
    return _unique(("\n\n", ANSWER_MARKER, JUDGE_QUESTION, *system_instructions, *of_families))


def _words() -> Sequence[str]:
    of_families = (word for family in FAMILIES.values() for word in family.words)
    return _unique((*ROLES, *LABELS, *of_families))


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write tokenizer.json, its configuration and the chat template."""
    tokenizer.save_pretrained(directory)
