"""The tokenizer of the built-in model: a byte-level BPE of its training text, so that any text round-trips."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.algorithms.errors import InputError

END = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train it; digits are single tokens.

    Raises:
        InputError: the texts are too short for that many tokens.
    """
    core = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    if core.get_vocab_size() != vocabulary:
        raise InputError(
            f"the corpus yields {core.get_vocab_size()} BPE tokens, base_model.vocabulary asks for {vocabulary}; "
            "raise corpus.train_bytes or lower the vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
