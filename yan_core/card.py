"""The model card of a model folder: `README.md`, as the Hugging Face hub shows it.

It is documentation: nothing reads it back, and a folder without one loads. It says what is known and no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from yan_core.tasks import InfillingTask, get_task
from yan_core.tokenization import MASK, Tokenizer

FAMILIES = {"ar": "GPT-2", "encoder_decoder": "BART", "masked_diffusion": "masked diffusion model"}
"""Family of a baseline -> its name in a sentence."""


@dataclass(frozen=True)
class Evidence:
    """What the run that made a model knows of it, and the folder alone does not.

    Attributes:
        metadata: More entries of the card's front matter.
        data: What it was trained on, Markdown.
        figures: What was measured, Markdown.
        settings: The run's resolved config.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    data: str = "Not recorded with this folder."
    figures: str = "None were recorded with this folder."
    settings: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    name: str, config: Mapping[str, Any], tokenizer: Tokenizer, num_parameters: int, evidence: Evidence | None = None
) -> str:
    """The text of a model card.

    Args:
        name: What the model is called.
        config: The folder's `config.json`.
        tokenizer: The folder's tokenizer.
        num_parameters: Of the model, all of them.
        evidence: What is known of its training; None: nothing.
    """
    evidence = evidence or Evidence()
    details, task = config["details"], get_task(config["details"]["task"])
    settings = evidence.settings or {key: config[key] for key in ("model", "baseline") if key in config}
    if "baseline" in config:
        kind, tags = FAMILIES[config["baseline"]["family"]], ["baseline"]
        way = "It was trained as a baseline that YAN is measured against."
    else:
        kind, tags = "YAN", ["flow-matching", *(["mixture-of-experts"] if config["model"]["num_experts"] > 1 else [])]
        way = (
            "It writes all words of an answer at once, in as many forward passes as solver steps are asked for "
            "([arXiv:2604.15009](https://arxiv.org/abs/2604.15009))."
        )
    if isinstance(task, InfillingTask):
        source, example = f"a text with one `{MASK}`", f"Mary went to the {MASK}."
    else:
        source, example = f"`{task.source}`", "Mary went to the kitchen. Where is Mary?"
    limits = [
        "It answers the task it was trained for, on texts like those of its training data; it is no chat model.",
        f"It reads {details['max_source_tokens']} tokens of a source, the {task.keep} of a longer one, and writes at "
        f"most {details['max_target_tokens']}.",
        "What it says was not checked for truth, bias or harm.",
    ]
    if tokenizer.normalize("A") == "a":
        limits.append("It reads and writes lower case alone.")
    metadata = {"library_name": "yan", "pipeline_tag": task.pipeline_tag, "tags": ["yan", *tags]}
    return f"""---
{_yaml({**metadata, **evidence.metadata})}
---
# {name}

A {kind} of {num_parameters:,} parameters for the task `{task.name}`. {way}

## Use

```python
import yan_core

model = yan_core.load("path/to/this/folder")
print(model.generate(["{example}"], num_steps=3)[0].text)
```

A source is {source}. `transformers.AutoTokenizer` reads the tokenizer; the model needs `yan_core`.

## Training data

{evidence.data}

## Figures

{evidence.figures}

## Limits

{_bullets(limits)}

## Configuration

Written by YAN {config["yan_version"]}, commit {config["commit"]}, format {config["format_version"]}.

```yaml
{_yaml(settings)}
```
"""


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).rstrip()


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
