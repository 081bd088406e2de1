"""Tokenizers: bytes, scene words, SentencePiece, Hugging Face."""

from mtv_jax.data.tokenizers.base import Tokenizer as Tokenizer
from mtv_jax.data.tokenizers.base import canonicalize as canonicalize
from mtv_jax.data.tokenizers.base import check_vocabulary as check_vocabulary
from mtv_jax.data.tokenizers.base import clean_for_clip as clean_for_clip
from mtv_jax.data.tokenizers.base import export_files as export_files
from mtv_jax.data.tokenizers.source import build_tokenizer as build_tokenizer
from mtv_jax.data.tokenizers.source import find_file as find_file
from mtv_jax.data.tokenizers.source import list_files as list_files
