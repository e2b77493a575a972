"""EleutherAI's lm-evaluation-harness asks a model folder: `yan lm-eval --model yan --model_args pretrained=FOLDER ...`.

The harness finds no model outside its own package, so the command registers this one and hands over to the harness's
own command line. See docs/HARNESS.md.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

import yan_core
from pipelines.evaluation import generate_rows
from yan_core.checkpoint import read_config
from yan_core.config import NUM_STEPS, EvaluationConfig, SamplingConfig, from_dict
from yan_core.tasks import InfillingTask
from yan_core.tokenization import MASK

REPEAT = 2**40
"""What is added to a document's seed each time it is asked again; more than any data set has documents."""


@dataclass(frozen=True, kw_only=True)
class HarnessConfig(SamplingConfig):
    """What `--model_args` may name, beside the fields of `SamplingConfig`; the harness adds the last two itself."""

    pretrained: str
    """Model folder, such as runs/world/model."""
    num_steps: int = NUM_STEPS
    """Solver steps."""
    seed: int = 0
    """Seed of the first document; that of the n-th one is seed + n, as in `yan evaluate`."""
    batch_size: int = 1
    """Documents answered together (`--batch_size`)."""
    device: str | None = None
    """Where the model runs (`--device`); on a machine without CUDA a CUDA device means the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


@register_model("yan")
class YanLM(LM):
    """A YAN, or one of its baselines, as the harness sees it: it writes answers, and scores none."""

    def __init__(self, **model_args: Any) -> None:
        """Load a model.

        Args:
            model_args: Fields of `HarnessConfig`.

        Raises:
            ValueError: If one is unknown, missing or out of range.
            CheckpointError: If there is no model in the folder, or it is damaged.
        """
        super().__init__()
        if "pretrained" not in model_args:
            raise ValueError(
                "model_args.pretrained is missing: name a model folder, such as pretrained=runs/world/model"
            )
        if str(model_args.get("batch_size", "")).isdigit():  # the command line gives text
            model_args["batch_size"] = int(model_args["batch_size"])
        self.config = from_dict(HarnessConfig, model_args, "model_args")
        device = self.config.device or "cuda"
        if device.startswith("cuda") and not torch.cuda.is_available():  # the harness's default is cuda:0
            device = "cpu"
        self._device = torch.device(device)
        self.generator = yan_core.load(self.config.pretrained, self._device)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results tell of the model."""
        saved = read_config(self.config.pretrained)
        return {
            "model_num_parameters": self.generator.model.num_parameters(),
            "model_sha": saved["sha256"]["model.safetensors"],
            "model_commit": saved["commit"],
        }

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer contexts.

        Every context is a source as the model's task makes them, and one with `<mask>` is filled in. An answer has at
        most `max_gen_toks` tokens, and no more than the model was trained to write; it ends before the first stop
        string. Sampling is by seed alone, whatever is said of temperature.

        Args:
            requests: Each with its context and generation settings.

        Returns:
            An answer each.

        Raises:
            ValueError: If a context has no mask where the model fills in, or one where it does not.
        """
        asked: Counter[tuple[str | None, int | None, int]] = Counter()
        rows, seeds, stops, limits = [], [], [], []
        for request in requests:
            context, settings = request.arguments
            how: dict[str, Any] = {**normalize_gen_kwargs(settings, self.generator.max_target_tokens)}
            stops.append([self.generator.tokenizer.normalize(stop) for stop in how["until"] if stop])
            limits.append(min(how["max_gen_toks"], self.generator.max_target_tokens))
            rows.append({"source": self._source(context, request)})
            document = (request.task_name, request.doc_id, request.idx)
            seeds.append(self.config.seed + (request.doc_id or 0) + asked[document] * REPEAT)
            asked[document] += 1
        sampling = SamplingConfig(**{f.name: getattr(self.config, f.name) for f in fields(SamplingConfig)})
        evaluation = EvaluationConfig(batch_size=self.config.batch_size, sampling=sampling)
        answers = [""] * len(requests)
        for limit in set(limits):
            places = [i for i, of_request in enumerate(limits) if of_request == limit]
            found = generate_rows(
                self.generator,
                [rows[i] for i in places],
                self.config.num_steps,
                evaluation,
                [seeds[i] for i in places],
                max_tokens=limit,
            )
            for i, generation in zip(places, found, strict=True):
                answers[i] = postprocess_generated_text(generation.text, stops[i], None)
        return answers

    def _source(self, context: str, request: Instance) -> str:
        """A context as the model reads it: of one to be filled in, the words around the mask."""
        task, count = self.generator.task, context.count(MASK)
        fills = isinstance(task, InfillingTask)
        if count != (1 if fills else 0):
            wanted = f"fills in one {MASK}" if fills else f"answers {task.name} and fills in no {MASK}"
            raise ValueError(
                f"{self.config.pretrained} {wanted}; document {request.doc_id} of task {request.task_name} has {count}"
            )
        return task.around(context) if isinstance(task, InfillingTask) else context

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        raise ValueError(
            f"{tasks}: `yan` writes answers and scores none, since all words come at once and their likelihood cannot "
            "be computed; output_type loglikelihood, loglikelihood_rolling and multiple_choice are not for it. Take "
            "tasks of output_type generate_until, with the text of the right choice as the answer (exact_match), and "
            "for perplexity `yan evaluate --perplexity-model DIR`"
        )

    loglikelihood_rolling = loglikelihood


def main(args: Sequence[str]) -> int:
    """Hand over to the harness's command line, which reads sys.argv."""
    sys.argv = ["lm-eval", *args]
    cli_evaluate()
    return 0
