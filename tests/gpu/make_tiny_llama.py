"""Write a small random Llama with a tokenizer and a chat template: a model to serve where none can be fetched.

    BUNDLE/bin/python tests/gpu/make_tiny_llama.py FOLDER

Two layers, hidden size 256, four heads of 64 with two for K and V, bf16; one token per byte. The weights are the same
on every run.
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer():
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE,
        model_max_length=2048,
    )  # fmt: skip


def config():
    return LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = sys.argv[1]
    LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    tokenizer().save_pretrained(folder)
    print(folder)
