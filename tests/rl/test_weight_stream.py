"""The stream of weights between trainer and engine processes."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.weight_stream import TransferError, WeightSender, receive_weights, transfer

TENSORS = [
    ("a", torch.randn(3, 5, generator=torch.Generator().manual_seed(0))),
    ("empty", torch.zeros(0, 4)),
    ("half", torch.arange(7, dtype=torch.bfloat16)),
    ("view", torch.arange(12.0, dtype=torch.float64).reshape(3, 4).T),
    ("large", torch.arange(300_000, dtype=torch.float16)),
]


@pytest.mark.parametrize("receivers", [1, 3])
def test_every_receiver_gets_every_tensor(receivers):
    with WeightSender(timeout_s=20) as sender, ThreadPoolExecutor(receivers) as pool:
        futures = [pool.submit(lambda: list(receive_weights(sender.address))) for _ in range(receivers)]
        sender.send(iter(TENSORS), receivers=receivers)
    for future in futures:
        received = future.result()
        assert [name for name, _ in received] == [name for name, _ in TENSORS]
        for (_, mine), (_, theirs) in zip(received, TENSORS, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_a_stranger_gets_nothing():
    with WeightSender(timeout_s=2) as sender, ThreadPoolExecutor(1) as pool:
        host, port, _ = sender.address.rsplit(":", 2)
        stranger = pool.submit(lambda: list(receive_weights(f"{host}:{port}:{'0' * 32}")))
        with pytest.raises(TransferError, match="0 of 1"):
            sender.send(iter(TENSORS))
        with pytest.raises(OISDError, match="after 0 tensors"):
            stranger.result()


def test_a_sender_that_fails_half_way_is_noticed_by_the_receiver():
    def broken():
        yield TENSORS[0]
        raise OISDError("no more")

    received = []

    def receive(address):
        received.extend(receive_weights(address))

    with WeightSender(timeout_s=5) as sender, pytest.raises(OISDError, match="no more"):
        transfer(sender, broken(), lambda: receive(sender.address))
    assert not received or len(received) == 1


def test_the_engines_own_error_is_told_where_it_broke_off():
    def receive():
        raise OISDError("out of memory in the engine")

    with WeightSender(timeout_s=5) as sender, pytest.raises(OISDError, match="out of memory in the engine"):
        transfer(sender, iter(TENSORS), receive)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(OISDError, match=r"--rollout-weights-host is '192\.0\.2\.1'"):
        WeightSender("192.0.2.1")


def test_garbage_is_no_stream():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: list(receive_weights(f"127.0.0.1:{server.getsockname()[1]}:{'0' * 32}")))
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.close()
        with pytest.raises(OISDError, match="no stream of weights"):
            future.result()
