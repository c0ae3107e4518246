"""The tokenizer of the example: one token per ASCII character, whose id is its ASCII code.

Three control codes carry the special tokens: NUL is `<pad>`, ETX ("end of text") is `<eos>` and SUB
("substitute") is `<unk>`, for any character outside ASCII. Nothing is added by default and nothing is merged, so
`encode(prompt) + encode(response) == encode(prompt + response)` for every text.
"""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

VOCAB = 128
PAD, EOS, UNK = 0, 3, 26
SPECIAL = {PAD: "<pad>", EOS: "<eos>", UNK: "<unk>"}


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer for texts of up to `max_length` tokens; its chat template joins the contents."""
    vocab = {SPECIAL.get(code, chr(code)): code for code in range(VOCAB)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token=SPECIAL[UNK]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
