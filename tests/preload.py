"""The modules that the server of `tests.ranks` imports once. The garbage collector of a rank ignores them."""

import gc

import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.models.starcoder2.modeling_starcoder2
import transformers.models.vit.modeling_vit  # noqa: F401

import eval.faults.preload  # noqa: F401
import tests.conftest  # noqa: F401

gc.collect()
gc.freeze()
