"""YAN's model: text -> tokens -> latents -> flow -> latents -> text, in plain PyTorch (arXiv:2604.15009).

Settings are frozen dataclasses, made of plain dictionaries and given back as such; what is wrong is named:

>>> import tempfile, torch, yan_core
>>> run = yan_core.from_dict(yan_core.RunConfig, {"name": "mine", "stages": {"flow": {"max_steps": 500}}})
>>> run.stages.flow.max_steps, yan_core.to_dict(run)["model"]["num_experts"]
(500, 4)
>>> yan_core.from_dict(yan_core.RunConfig, {"modle": {}})  # doctest: +ELLIPSIS
Traceback (most recent call last):
yan_core.config.UnknownName: modle: unknown name 'modle'; did you mean 'model'? Allowed: autoencoder_loss, baseline, ...

A tokenizer learns its vocabulary, and a model is built for it; this one has not learnt anything:

>>> story = "Mary went to the kitchen. Where is Mary?"
>>> tokenizer = yan_core.Tokenizer.train([story], yan_core.TokenizerConfig(vocab_size=64))
>>> model = yan_core.build_model(yan_core.ModelConfig(d_model=32, num_heads=2), tokenizer.vocab_size, seed=0)
>>> isinstance(model, yan_core.YanModel)
True

The sampler is where the speed is: token ids of a batch in, token ids out, one trunk pass a step:

>>> ids = torch.tensor([tokenizer.encode_batch([story])[0].ids])
>>> drawn = yan_core.sample(model.eval(), ids, torch.ones_like(ids, dtype=torch.bool), 4, torch.tensor([7]))
>>> isinstance(drawn, yan_core.Sample), drawn.ids.shape, drawn.nfe
(True, torch.Size([1, 4]), 3)

A model folder holds weights (safetensors), tokenizer, settings and what the model is for; loaded, it answers texts:

>>> with tempfile.TemporaryDirectory() as folder:
...     details = {"task": "question_answering", "max_source_tokens": 32, "max_target_tokens": 4}
...     yan_core.save_pretrained(folder, model, tokenizer, details)
...     generator = yan_core.load(folder)
>>> isinstance(generator, yan_core.TextGenerator)
True
>>> (answer,) = generator.generate([story], num_steps=3, seeds=7)
>>> isinstance(answer, yan_core.Generation), answer.nfe, answer.tokens == tokenizer.until_eos(drawn.ids[0].tolist())
(True, 3, True)

How answers are drawn goes as one bundle, to `sample` too: here the best of four, with a solver of order 2:

>>> sampling = yan_core.SamplingConfig(num_candidates=4, method="midpoint")
>>> generator.generate([story], num_steps=3, seeds=7, sampling=sampling)[0].nfe
6
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yan_core.checkpoint import load, save_pretrained
    from yan_core.config import ModelConfig, RunConfig, SamplingConfig, TokenizerConfig, from_dict, to_dict
    from yan_core.generator import Generation, TextGenerator
    from yan_core.model import YanModel, build_model
    from yan_core.sampler import Sample, sample
    from yan_core.tokenization import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Generation",
    "ModelConfig",
    "RunConfig",
    "Sample",
    "SamplingConfig",
    "TextGenerator",
    "Tokenizer",
    "TokenizerConfig",
    "YanModel",
    "build_model",
    "from_dict",
    "load",
    "sample",
    "save_pretrained",
    "to_dict",
]

_HOME = {
    "Generation": "generator",
    "ModelConfig": "config",
    "RunConfig": "config",
    "Sample": "sampler",
    "SamplingConfig": "config",
    "TextGenerator": "generator",
    "Tokenizer": "tokenization",
    "TokenizerConfig": "config",
    "YanModel": "model",
    "build_model": "model",
    "from_dict": "config",
    "load": "checkpoint",
    "sample": "sampler",
    "save_pretrained": "checkpoint",
    "to_dict": "config",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: processes that only tokenise start two seconds sooner so."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
