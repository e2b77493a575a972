"""Configs: strict round trips, and messages that name the key, the value and the remedy."""

import ast
import dataclasses
import inspect
import json
import pickle
from typing import Any

import pytest

from yan_core import config as config_module
from yan_core.config import (
    AutoencoderLossConfig,
    DataConfig,
    DatasetConfig,
    EncoderConfig,
    EvaluationConfig,
    FlowLossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScalingConfig,
    StageConfig,
    StagesConfig,
    TokenizerConfig,
    from_dict,
    to_dict,
)

ALL = [value for value in vars(config_module).values() if inspect.isclass(value) and dataclasses.is_dataclass(value)]

CHANGED = RunConfig(
    name="other",
    seed=7,
    data=DataConfig(
        dataset="squad",
        datasets={
            "squad": DatasetConfig(path="squad", columns={"context": "passage"}, where={"split": "a"}),
            "named": DatasetConfig(format="huggingface", config_name="qa1", kinds=("where", "who")),
        },
    ),
    model=ModelConfig(d_model=48, num_heads=3, target_encoder=EncoderConfig(positions=("end",), conv_kernel=5)),
    flow_loss=FlowLossConfig(solver_steps=(2, 5), likelihood="marginal"),
    stages=StagesConfig(flow=StageConfig(trains=("flow", "decoder"), optim=OptimConfig(lr=0.25, decay="cosine"))),
    scaling=ScalingConfig(num_workers=1),
)


@pytest.mark.parametrize("run", [RunConfig(), CHANGED], ids=["defaults", "changed"])
def test_round_trip_through_json(run: RunConfig) -> None:
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_defaults_are_valid_frozen_keyword_only_and_picklable(cls: type[Any]) -> None:
    made = cls()
    assert pickle.loads(pickle.dumps(made)) == made
    first = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, first, getattr(made, first))
    with pytest.raises(TypeError):
        cls(getattr(made, first))


def test_two_configs_share_no_mutable_default() -> None:
    assert DataConfig().datasets is not DataConfig().datasets


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring_under_it(cls: type[Any]) -> None:
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{cls.__name__}.{ast.unparse(node.target)}"


def test_what_is_left_out_keeps_its_default() -> None:
    assert from_dict(RunConfig, {}) == RunConfig()
    assert from_dict(RunConfig, {"model": {"flow_blocks": 9}}) == RunConfig(model=ModelConfig(flow_blocks=9))


def test_a_whole_number_serves_as_a_float() -> None:
    made = from_dict(OptimConfig, {"lr": 1})
    assert made.lr == 1.0 and type(made.lr) is float


def test_null_only_where_it_is_allowed() -> None:
    assert from_dict(DatasetConfig, {"config_name": None}).config_name is None
    with pytest.raises(ValueError, match=r"^path must be of type str, got None"):
        from_dict(DatasetConfig, {"path": None})


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"modle": {}}, r"^modle: unknown name 'modle'; did you mean 'model'\?.*tokenizer"),
        ({"model": {"d_modle": 1}}, r"^model\.d_modle: .*did you mean 'd_model'"),
        ({"stages": {"flow": {"optim": {"lrr": 1}}}}, r"^stages\.flow\.optim\.lrr: .*did you mean 'lr'"),
        ({"data": {"datasets": {"mine": {"colums": {}}}}}, r"^data\.datasets\.mine\.colums: .*did you mean 'columns'"),
        ({"zzzzzz": 1}, r"^zzzzzz: unknown name 'zzzzzz'\. Allowed: .*model"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_offered(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"flow_loss": {"even_experts": True, "expert_draw": "prior"}}, "even_experts wants .*expert_draw posterior"),
        ({"flow_loss": {"even_experts": True}, "model": {"top_k": 2}}, "even_experts wants model.top_k 0, got 2"),
        ({"seed": "1"}, r"^seed must be of type int, got '1' \(str\)"),
        ({"seed": True}, r"^seed must be of type int, got True"),
        ({"seed": 1.0}, r"^seed must be of type int, got 1\.0"),
        ({"log_every_s": True}, r"^log_every_s must be of type float, got True"),
        ({"log_every_s": "1e-3"}, r"^log_every_s must be of type float, got '1e-3'"),
        ({"name": 3}, r"^name must be of type str, got 3"),
        ({"tokenizer": {"lowercase": 1}}, r"^tokenizer\.lowercase must be of type bool, got 1"),
        ({"model": 3}, r"^model must be a mapping of settings, got int"),
        ({"model": None}, r"^model must be a mapping of settings, got NoneType"),
        ({"model": {"expert_scope": "word"}}, r"^model\.expert_scope must be one of 'token', .*got 'word'"),
        ({"flow_loss": {"solver_steps": 3}}, r"^flow_loss\.solver_steps must be a list, got 3"),
        ({"flow_loss": {"solver_steps": [1, "2"]}}, r"^flow_loss\.solver_steps\[1\] must be of type int, got '2'"),
        ({"stages": {"flow": {"trains": ["gate"]}}}, r"^stages\.flow\.trains\[0\] must be one of .*'flow'.*got 'gate'"),
        ({"data": {"datasets": []}}, r"^data\.datasets must be a mapping, got \[\]"),
        (
            {"data": {"datasets": {"a": {"where": {"x": 1}}}}},
            r"^data\.datasets\.a\.where\.x must be of type str, got 1",
        ),
    ],
)
def test_a_wrong_type_is_refused(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        (
            {"stages": {"finetune": {"optim": {"lr": 0.0}}}},
            r"^stages\.finetune\.optim\.lr must be > 0, got 0\.0",
        ),
        ({"stages": {"flow": {"max_steps": -1}}}, r"^stages\.flow\.max_steps must be >= 0, got -1"),
        ({"model": {"num_experts": 0}}, r"^model\.num_experts must be >= 1, got 0"),
        ({"model": {"top_k": 5}}, r"^model\.top_k must be in \[0, num_experts=4\], got 5"),
        ({"model": {"source_encoder": {"num_blocks": 0}}}, r"^model\.source_encoder\.num_blocks must be >= 1, got 0"),
        ({"model": {"target_encoder": {"conv_kernel": 4}}}, r"^model\.target_encoder\.conv_kernel must be 0 or odd"),
        ({"model": {"mamba": {"d_state": 0}}}, r"^model\.mamba\.d_state must be >= 1, got 0"),
        ({"baseline": {"d_model": 0}}, r"^baseline\.d_model must be >= 1, got 0"),
        ({"tokenizer": {"sample_rows": 0}}, r"^tokenizer\.sample_rows must be >= 1, got 0"),
        ({"autoencoder_loss": {"max_span": 0}}, r"^autoencoder_loss\.max_span must be >= 1, got 0"),
        ({"flow_loss": {"sigma": 0.0}}, r"^flow_loss\.sigma must be > 0, got 0\.0"),
        ({"scaling": {"accumulation": 0}}, r"^scaling\.accumulation must be >= 1, got 0"),
        ({"evaluation": {"diversity": 1}}, r"^evaluation\.diversity must be 0 or >= 2 answers a row, got 1"),
        ({"evaluation": {"sampling": {"num_candidates": 0}}}, r"^evaluation\.sampling\.num_candidates must be >= 1"),
        ({"data": {"lanes": 0}}, r"^data\.lanes must be >= 1, got 0"),
        ({"data": {"clean": {"min_chars": -1}}}, r"^data\.clean\.min_chars must be >= 0, got -1"),
        (
            {"data": {"datasets": {"mine": {"format": "jsonn"}}}},
            r"^data\.datasets\.mine\.format must be one of",
        ),
        (
            {"data": {"datasets": {"mine": {"held_out": 0.7}}}},
            r"^data\.datasets\.mine\.held_out must be in",
        ),
        ({"data": {"mixture": {"a": {"epochs": 0.0}}}}, r"^data\.mixture\.a\.epochs must be > 0, got 0\.0"),
        ({"data": {"mixture": {"a": {"share": 0.5}}}}, r"^data\.mixture\.\*\.share must be given for every part"),
        ({"seed": -1}, r"^seed must be >= 0, got -1"),
    ],
)
def test_a_value_out_of_range_is_refused_under_its_dotted_key(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("cls", "values", "pattern"),
    [
        (TokenizerConfig, {"kind": "bpe", "vocab_size": 259}, r"^vocab_size must be >= 260 .*bpe, got 259"),
        (TokenizerConfig, {"kind": "word", "vocab_size": 7}, r"^vocab_size must be >= 8 .*word, got 7"),
        (TokenizerConfig, {"sample_rows": 0}, r"^sample_rows must be >= 1, got 0"),
        (EncoderConfig, {"positions": ("rotary", "left")}, r"^positions must be from .*got \['left'\]"),
        (EncoderConfig, {"conv_kernel": 4}, r"^conv_kernel must be 0 or odd, got 4"),
        (EncoderConfig, {"matching_gain": -1.0}, r"^matching_gain must be >= 0, got -1\.0"),
        (EncoderConfig, {"num_blocks": 0}, r"^num_blocks must be >= 1, got 0"),
        (EncoderConfig, {"embed_std": 0.0}, r"^embed_std must be > 0, got 0\.0"),
        (ModelConfig, {"d_model": 20, "num_heads": 4}, r"^d_model=20 must be a multiple of .*=8 .*even head"),
        (ModelConfig, {"num_heads": 0}, r"^d_model=.*num_heads=0"),
        (ModelConfig, {"decoder_blocks": 0}, r"^decoder_blocks must be >= 1, got 0"),
        (ModelConfig, {"flow_blocks": 0}, r"^flow_blocks must be >= 1, got 0"),
        (ModelConfig, {"cross_attention_every": 0}, r"^cross_attention_every must be >= 1, got 0"),
        (ModelConfig, {"num_experts": 0}, r"^num_experts must be >= 1, got 0"),
        (ModelConfig, {"segment_length": 0}, r"^segment_length must be >= 1, got 0"),
        (ModelConfig, {"d_model": 0}, r"^d_model=0 must be a multiple"),
        (FlowLossConfig, {"weight_ce": -1.0}, r"^weight_ce must be finite, >= 0, got -1\.0"),
        (FlowLossConfig, {"weight_flow": float("nan")}, r"^weight_flow must be finite"),
        (FlowLossConfig, {"corpus_max_span": 0}, r"^corpus_max_span must be >= 1, got 0"),
        (DatasetConfig, {"num_train": 0}, r"^num_train must be >= 1, got 0"),
        (RunConfig, {"name": ".."}, r"name must be letters.*got '\.\.'"),
        (RunConfig, {"name": "mlartifacts"}, r"name must be letters.*got 'mlartifacts'"),
        (RunConfig, {"seed": -1}, r"seed must be >= 0, got -1"),
        (ModelConfig, {"ffn_multiple": 0}, r"^ffn_multiple must be >= 1, got 0"),
        (ModelConfig, {"max_positions": 0}, r"^max_positions must be >= 1, got 0"),
        (ModelConfig, {"dropout": 1.0}, r"^dropout must be in \[0, 1\), got 1\.0"),
        (ModelConfig, {"gate_temperature": 0.0}, r"^gate_temperature must be > 0, got 0\.0"),
        (ModelConfig, {"init_noise": -1.0}, r"^init_noise must be > 0, got -1\.0"),
        (AutoencoderLossConfig, {"clean_share": 1.1}, r"^clean_share must be in \[0, 1\], got 1\.1"),
        (AutoencoderLossConfig, {"mask_share": -0.1}, r"^mask_share must be in \[0, 1\], got -0\.1"),
        (AutoencoderLossConfig, {"latent_noise": -0.5}, r"^latent_noise must be >= 0, got -0\.5"),
        (AutoencoderLossConfig, {"max_span": 0}, r"^max_span must be >= 1, got 0"),
        (AutoencoderLossConfig, {"mmd_tokens": 1}, r"^mmd_tokens must be >= 2, got 1"),
        (FlowLossConfig, {"sigma": 0.0}, r"^sigma must be > 0, got 0\.0"),
        (FlowLossConfig, {"sigma": float("nan")}, r"^sigma must be > 0, got nan"),
        (FlowLossConfig, {"solver_steps": ()}, r"^solver_steps must name step counts >= 1, got \(\)"),
        (FlowLossConfig, {"solver_steps": (3, 0)}, r"^solver_steps must name step counts >= 1"),
        (FlowLossConfig, {"time_alpha": 0.0}, r"^time_alpha must be > 0, got 0\.0"),
        (FlowLossConfig, {"time_beta": 0.0}, r"^time_beta must be > 0, got 0\.0"),
        (FlowLossConfig, {"source_mask_share": 2.0}, r"^source_mask_share must be in \[0, 1\], got 2\.0"),
        (FlowLossConfig, {"corpus_mask_share": 2.0}, r"^corpus_mask_share must be in \[0, 1\], got 2\.0"),
        (OptimConfig, {"lr": 0.0}, r"^lr must be > 0, got 0\.0"),
        (OptimConfig, {"clip_norm": 0.0}, r"^clip_norm must be > 0, got 0\.0"),
        (OptimConfig, {"warmup_steps": -1}, r"^warmup_steps must be >= 0, got -1"),
        (OptimConfig, {"beta2": 1.0}, r"^beta2 must be in \(0, 1\), got 1\.0"),
        (StageConfig, {"max_steps": -1}, r"^max_steps must be >= 0, got -1"),
        (StageConfig, {"batch_size": 0}, r"^batch_size must be >= 1, got 0"),
        (StageConfig, {"trains": ()}, r"^trains must name at least one part"),
        (EvaluationConfig, {"every_steps": -1}, r"^every_steps must be >= 0, got -1"),
        (EvaluationConfig, {"keep": "best"}, r"^keep=best wants every_steps > 0"),
        (
            DatasetConfig,
            {"held_out": 0.1, "validation": "v"},
            r"held_out and validation exclude each other",
        ),
        (DataConfig, {"max_source_tokens": 0}, r"^max_source_tokens must be >= 1, got 0"),
        (DataConfig, {"max_target_tokens": 0}, r"^max_target_tokens must be >= 1, got 0"),
        (DataConfig, {"window_tokens": 0}, r"^window_tokens must be >= 1, got 0"),
        (DataConfig, {"pool_batches": 0}, r"^pool_batches must be >= 1, got 0"),
        (DataConfig, {"lanes": 0}, r"^lanes must be >= 1, got 0"),
        (DataConfig, {"rows_per_shard": 0}, r"^rows_per_shard must be >= 1, got 0"),
        (DataConfig, {"bad_rows_allowed": 1.5}, r"^bad_rows_allowed must be in \[0, 1\], got 1\.5"),
        (ScalingConfig, {"num_workers": 0}, r"^num_workers must be >= 1, or \[fewest, most\], got 0"),
        (ScalingConfig, {"cpus_per_worker": 0.0}, r"^cpus_per_worker must be > 0, got 0\.0"),
        (ScalingConfig, {"resize_every_s": -1.0}, r"^resize_every_s must be >= 0, got -1\.0"),
        (ScalingConfig, {"keep_checkpoints": 0}, r"^keep_checkpoints must be >= 1, got 0"),
        (ScalingConfig, {"checkpoint_every_s": 0.0}, r"^checkpoint_every_s must be > 0, got 0\.0"),
        (EvaluationConfig, {"num_steps": ()}, r"^num_steps must name step counts >= 1, got \(\)"),
        (EvaluationConfig, {"num_steps": (0,)}, r"^num_steps must name step counts >= 1, got \(0,\)"),
        (EvaluationConfig, {"max_rows": 0}, r"^max_rows must be >= 1, got 0"),
        (EvaluationConfig, {"batch_size": 0}, r"^batch_size must be >= 1, got 0"),
        (ScalingConfig, {"max_failures": -2}, r"^max_failures must be >= 0, or -1, got -2"),
        (RunConfig, {"name": ""}, r"name must be letters.*got ''"),
        (RunConfig, {"name": "a/b"}, r"name must be letters.*got 'a/b'"),
        (RunConfig, {"name": "a b"}, r"name must be letters.*got 'a b'"),
        (
            RunConfig,
            {"model": ModelConfig(max_positions=64), "data": DataConfig(max_source_tokens=65)},
            r"model\.max_positions=64 is below the longest sequence of data\.\*_tokens, 65",
        ),
        (
            RunConfig,
            {"scaling": ScalingConfig(num_workers=(2, 5)), "stages": StagesConfig(flow=StageConfig(batch_size=4))},
            r"scaling\.num_workers=5 is more than the lanes of stage flow, 4, .*batch_size=4 and data\.lanes=8",
        ),
    ],
)
def test_a_value_out_of_range_is_refused(cls: type[Any], values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        cls(**values)


def test_the_longest_sequence_may_fill_the_positions() -> None:
    data = DataConfig(max_source_tokens=64, max_target_tokens=64, window_tokens=64)
    assert RunConfig(model=ModelConfig(max_positions=64), data=data).data is data
