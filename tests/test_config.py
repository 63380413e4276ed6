"""OISDConfig: what it refuses and how it says so, and the command-line surface made from it.

Why the flags are frozen here: launch scripts and configuration files of other people hold them, so that a renamed flag
or a changed default must be a decision and not a side effect.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import pytest

from megatron_oisd.config import OISDConfig, add_arguments, config_from_arguments, layer_index
from megatron_oisd.errors import OISDError

DEFAULTS = {
    "--oisd-layers": None,
    "--oisd-lambda-think": 1.0,
    "--oisd-lambda-attn": 0.1,
    "--oisd-temperature": 1.0,
    "--oisd-advantage-clip": 1.0,
    "--oisd-advantage-weighting": "signed",
    "--oisd-attn-window": 32,
    "--oisd-attn-global-keys": 32,
    "--oisd-attn-queries": 128,
    "--oisd-head-gradient": True,
    "--oisd-teacher-payload": "hidden",
    "--oisd-teacher-topk": 256,
    "--oisd-aggregation": "sequence",
    "--oisd-seed": 1234,
    "--oisd-chunk-tokens": 1024,
}


def parser(**kwargs) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser()
    add_arguments(result, **kwargs)
    return result


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("layers", (), "empty"),
        ("layers", (0,), "0"),
        ("layers", (-1,), "-1"),
        ("layers", (2.0,), "2.0"),
        ("layers", (True,), "True"),
        ("layers", "6", "'6'"),
        ("layers", (2, 3, 2), r"\[2, 3, 2\]"),
        ("lambda_think", -0.5, "-0.5"),
        ("lambda_think", math.inf, "inf"),
        ("lambda_think", math.nan, "nan"),
        ("lambda_attn", -1e-9, "-1e-09"),
        ("lambda_attn", math.nan, "nan"),
        ("temperature", 0.0, "0.0"),
        ("temperature", -1.0, "-1.0"),
        ("temperature", math.inf, "inf"),
        ("temperature", math.nan, "nan"),
        ("advantage_clip", 0.0, "0.0"),
        ("advantage_clip", -2.0, "-2.0"),
        ("advantage_clip", math.nan, "nan"),
        ("attn_window", 0, "0"),
        ("attn_window", 1.5, "1.5"),
        ("attn_global_keys", -1, "-1"),
        ("attn_queries", 0, "0"),
        ("attn_queries", 128.0, "128.0"),
        ("chunk_tokens", 0, "0"),
        ("aggregation", "mean", "'mean'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_field_and_value(field, value, shown):
    with pytest.raises(OISDError, match=rf"^{field} (is|holds) .*{shown}") as caught:
        OISDConfig(**{"layers": (2,), field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lambda_think", 0.0), ("advantage_clip", math.inf), ("attn_global_keys", 0), ("attn_window", 1), ("seed", -1)],
)
def test_the_edge_of_each_range_is_accepted(field, value):
    assert getattr(OISDConfig(**{"layers": [2], field: value}), field) == value


def test_it_is_frozen_hashable_and_keeps_layers_as_a_tuple():
    config = OISDConfig(layers=[3, 1])
    assert config.layers == (3, 1)
    assert hash(config) == hash(OISDConfig(layers=(3, 1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lambda_think = 0.0
    with pytest.raises(OISDError, match="temperature is 0"):
        dataclasses.replace(config, temperature=0.0)


@pytest.mark.parametrize(("lambda_think", "lambda_attn", "enabled"), [(0, 0, False), (1, 0, True), (0, 0.1, True)])
def test_enabled_means_that_any_loss_has_weight(lambda_think, lambda_attn, enabled):
    assert OISDConfig(layers=(1,), lambda_think=lambda_think, lambda_attn=lambda_attn).enabled is enabled


def test_student_layers_lie_below_the_last_one():
    OISDConfig(layers=(1, 35)).validate_layers(36)
    for layer in (36, 37):
        with pytest.raises(OISDError, match=rf"student layer {layer} is outside 1\.\.35: .*36 layers.*--oisd-layers"):
            OISDConfig(layers=(6, layer)).validate_layers(36)
    with pytest.raises(OISDError, match=r"outside 1\.\.0"):
        OISDConfig(layers=(1,)).validate_layers(1)


def test_layers_count_from_one_and_indices_from_zero():
    assert [layer_index(layer) for layer in (1, 6, 36)] == [0, 5, 35]


def test_the_flags_and_their_defaults_are_frozen():
    actions = {a.option_strings[0]: a for a in parser()._actions if a.dest != "help"}
    assert {flag: action.default for flag, action in actions.items()} == DEFAULTS
    assert [flag for flag, action in actions.items() if action.required] == ["--oisd-layers"]
    assert all(action.help for action in actions.values())
    assert {action.dest.removeprefix("oisd_") for action in actions.values()} == {
        item.name for item in dataclasses.fields(OISDConfig)
    }


def test_arguments_alone_give_the_default_config():
    assert config_from_arguments(parser().parse_args(["--oisd-layers", "6"])) == OISDConfig(layers=(6,))
    assert config_from_arguments(parser(default_layers=[27]).parse_args([])) == OISDConfig(layers=(27,))


def test_every_field_goes_through_the_command_line_and_back():
    config = OISDConfig(
        layers=(6, 12), lambda_think=0.5, lambda_attn=0.25, temperature=2.0, advantage_clip=math.inf, attn_window=3,
        attn_global_keys=0, attn_queries=7, head_gradient=False, aggregation="token", seed=-5, chunk_tokens=99,
        teacher_payload="topk", teacher_topk=17, advantage_weighting="none",
    )  # fmt: skip
    assert all(getattr(config, f.name) != f.default for f in dataclasses.fields(config)), "every value off its default"
    words = []
    for item in dataclasses.fields(config):
        flag, value = "--oisd-" + item.name.replace("_", "-"), getattr(config, item.name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--oisd-", "--no-oisd-"))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    assert config_from_arguments(parser().parse_args(words)) == config


def test_the_parser_refuses_what_is_not_a_value(capsys):
    for words in ([], ["--oisd-layers", "six"], ["--oisd-layers", "6", "--oisd-aggregation", "mean"]):
        with pytest.raises(SystemExit):
            parser().parse_args(words)
    assert "--oisd-aggregation" in capsys.readouterr().err
