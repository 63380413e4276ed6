"""The client of rollout servers against one that dies, stalls, returns garbage or is restarted."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import (
    INCONSISTENT_VERSION,
    ModelLimits,
    SamplingParams,
    ServerError,
    StaleEngineError,
)
from megatron_oisd.rl.rollout.vllm_server import ServerLimits, VLLMServerEngine
from megatron_oisd.rl.rollout.weight_names import ExpectedWeights
from tests.helpers import fake_server
from tests.helpers.fake_server import EOS, FakeServer, change

WEIGHTS = {"model.a": torch.ones(2), "model.b": torch.ones(3)}
SAMPLING = SamplingParams(max_new_tokens=3)
PROMPTS = [[5, 6], [7], [8, 9]]


def make_engine(server: FakeServer, **options) -> VLLMServerEngine:
    limits = ServerLimits(timeout_s=options.pop("timeout_s", 20.0), retries=options.pop("retries", 2), backoff_s=0.01)
    return VLLMServerEngine(
        options.pop("url", server.url), run="run", expected=ExpectedWeights(WEIGHTS), limits=ModelLimits(24, 64),
        eos_token_ids=[EOS], server=limits, **options,
    )  # fmt: skip


@pytest.fixture
def server():
    with FakeServer() as fake:
        yield fake


def refreshed(server: FakeServer, **options) -> VLLMServerEngine:
    engine = make_engine(server, **options)
    engine.update_weights(iter(WEIGHTS.items()), version=1)
    return engine


def generate(engine: VLLMServerEngine):
    return engine.generate(PROMPTS, SAMPLING, samples_per_prompt=2, seeds=[1, 2, 3])


def test_weights_go_over_and_responses_come_back_in_order(server):
    engine = refreshed(server)
    assert (server.version, server.weights, server.resets) == ("run/1", ["model.a", "model.b"], 1)
    results = generate(engine)
    assert [[r.response_ids for r in group] for group in results] == [
        [[prompt[0], 3, EOS], [prompt[0], 4, EOS]] for prompt in PROMPTS
    ]
    assert results[0][0].logprobs == [-0.5, -1.0, -0.25]


def test_a_client_that_does_not_push_waits_for_the_one_that_does(server):
    refreshed(server)
    other = make_engine(server, pushes=False)
    other.update_weights(iter(WEIGHTS.items()), version=1)
    assert len(generate(other)) == 3
    late = make_engine(server, pushes=False, timeout_s=0.2)
    with pytest.raises(ServerError, match="did not get the weights 'run/2'"):
        late.update_weights(iter(WEIGHTS.items()), version=2)


@pytest.mark.parametrize(
    "fault",
    [
        fake_server.http_500,
        fake_server.hang_up,
        fake_server.no_json,
        fake_server.drop_one,
        change(token_ids=[99, EOS]),
        change(token_ids="5 6 7"),
        change(token_ids=[]),
        change(token_ids=[5, 6, 7, EOS]),
        change(token_ids=[EOS, 5, EOS]),
        change(finish_reason="abort"),
        change(finish_reason="length"),
        change(logprobs={"token_logprobs": [-0.5, math.nan, -0.25]}),
        change(logprobs={"token_logprobs": [-0.5, 3.0, -0.25]}),
        change(logprobs={"token_logprobs": [-0.5]}),
        change(logprobs=None),
        change(index=7),
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_bad_answer_is_asked_for_again_and_then_reported(server, fault):
    engine = refreshed(server)
    expected = generate(engine)
    server.faults, server.completions = [fault, fault], 0
    assert generate(engine) == expected
    assert server.completions == 5
    server.faults = [fault] * 9
    with pytest.raises(OISDError, match=rf"{server.url}.*gave up after 3 attempts"):
        generate(engine)


def test_a_stalled_server_runs_into_the_time_limit(server):
    engine = refreshed(server, timeout_s=0.5)
    server.faults = [fake_server.stall]
    assert len(generate(engine)) == 3
    server.faults = [fake_server.stall] * 9
    with pytest.raises(ServerError, match=r"does not answer.*gave up after 3 attempts"):
        generate(engine)


def test_a_restarted_server_is_noticed_before_and_after(server):
    engine = refreshed(server)
    server.version = ""
    with pytest.raises(StaleEngineError, match="restarted"):
        generate(engine)
    assert server.completions == 0
    engine.update_weights(iter(WEIGHTS.items()), version=1)

    def restart(handler, answer):
        del handler
        server.version = "other/1"
        return answer

    server.faults = [restart]
    with pytest.raises(StaleEngineError, match="other/1"):
        generate(engine)


def test_a_failed_refresh_voids_the_engine(server):
    engine = refreshed(server)
    with pytest.raises(OISDError, match=r"missing from the refresh, first 'model\.b'"):
        engine.update_weights(iter(list(WEIGHTS.items())[:1]), version=2)
    assert engine.weights_version == INCONSISTENT_VERSION
    with pytest.raises(StaleEngineError, match="last refresh"):
        generate(engine)


def test_no_server_is_reported(server):
    url = server.url
    server.close()
    engine = make_engine(server, url=url, retries=1)
    with pytest.raises(ServerError, match=f"{url} does not answer.*gave up after 2 attempts"):
        engine.update_weights(iter(WEIGHTS.items()), version=1)
    with pytest.raises(OISDError, match="--rollout-urls names 'host:8000'"):
        make_engine(server, url="host:8000")
