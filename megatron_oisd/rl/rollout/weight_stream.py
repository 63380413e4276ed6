"""Weights from the trainer to the processes of a rollout engine, over a socket, one tensor at a time.

The trainer listens (on loopback unless told otherwise) and tells the receivers its address and a secret made for this
one transfer; nothing is written to disk, and neither side holds more than a tensor. On the wire::

    receiver: the secret, 32 bytes of hexadecimal digits
    sender:   for each tensor a header, its length in 4 bytes and JSON {"name", "dtype", "shape"}, then its bytes
    sender:   a header {"end": number of tensors}

A stream that ends without the last header is a failed transfer: the receiver raises and its weights are void.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.errors import OISDError

_SECRET_BYTES = 32
_LARGEST_HEADER = 2**20
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


class TransferError(OISDError):
    """No receiver came, or one went away: the cause lies with the engine."""


class WeightSender:
    """Listens for the receivers of one transfer.

    Args:
        host: address to listen on, and the one that receivers are told; it must lead here from their machines.
        timeout_s: seconds that a receiver may take to connect, or to take in a piece of a tensor.

    Raises:
        OISDError: the address cannot be listened on.
    """

    def __init__(self, host: str = "127.0.0.1", *, timeout_s: float = 600.0) -> None:
        self._timeout_s = timeout_s
        self._secret = secrets.token_hex(_SECRET_BYTES // 2)
        try:
            self._socket = socket.create_server((host, 0))
        except OSError as error:
            raise OISDError(
                f"--rollout-weights-host is {host!r}, which this machine cannot listen on ({error.strerror}): give an "
                "address of this machine that the rollout engines reach"
            ) from error
        self._socket.settimeout(0.2)
        self.address = f"{host}:{self._socket.getsockname()[1]}:{self._secret}"
        """What :func:`receive_weights` is given."""

    def send(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        receivers: int = 1,
        failed: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send every tensor to all receivers.

        Args:
            tensors: ``(HF name, full tensor)`` pairs.
            receivers: processes that connect.
            failed: asked while waiting; True means that no receiver will come any more.

        Raises:
            TransferError: a receiver did not come or went away.
        """
        connections: list[socket.socket] = []
        try:
            connections = self._accept(receivers, failed)
            count = 0
            for count, (name, tensor) in enumerate(tensors, start=1):  # noqa: B007
                header, data = _packed(name, tensor)
                for connection in connections:
                    connection.sendall(header)
                    connection.sendall(data)
            for connection in connections:
                connection.sendall(_header({"end": count}))
        except OSError as error:
            raise TransferError(f"the rollout engine broke off a refresh of its weights ({error})") from error
        finally:
            for connection in connections:
                connection.close()

    def _accept(self, receivers: int, failed: Callable[[], bool]) -> list[socket.socket]:
        connections: list[socket.socket] = []
        deadline = time.monotonic() + self._timeout_s
        while len(connections) < receivers:
            if failed() or time.monotonic() > deadline:
                for connection in connections:
                    connection.close()
                raise TransferError(
                    f"{len(connections)} of {receivers} processes of the rollout engine came for the weights"
                    + ("" if failed() else f" within {self._timeout_s:.0f} s")
                )
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            connection.settimeout(self._timeout_s)
            if hmac.compare_digest(_read(connection, _SECRET_BYTES), self._secret.encode()):
                connections.append(connection)
            else:
                connection.close()
        return connections

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def __enter__(self) -> WeightSender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def receive_weights(address: str, *, timeout_s: float = 600.0) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of one transfer in the order they were sent; the caller owns them.

    Args:
        address: :attr:`WeightSender.address`.
        timeout_s: seconds without any data after which the transfer has failed.

    Raises:
        OISDError: the transfer broke off.
    """
    host, port, secret = address.rsplit(":", 2)
    count = 0
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s) as connection:
            connection.sendall(secret.encode())
            while True:
                header = _read_header(connection)
                if "end" in header:
                    if header["end"] != count:
                        raise OISDError(f"{count} tensors came where {header['end']} were sent")
                    return
                tensor = torch.empty(header["shape"], dtype=DTYPES[header["dtype"]])
                _read_into(connection, _bytes(tensor))
                count += 1
                yield header["name"], tensor
    except (OSError, EOFError) as error:
        raise OISDError(f"the trainer broke off a refresh of the weights after {count} tensors ({error})") from error


def _packed(name: str, tensor: Tensor) -> tuple[bytes, memoryview]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise OISDError(f"weight {name!r} has the dtype {dtype}: expected one of {', '.join(DTYPES)}")
    header = _header({"name": name, "dtype": dtype, "shape": list(tensor.shape)})
    return header, _bytes(tensor.detach().cpu().contiguous())


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _header(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("!I", len(text)) + text


def _read_header(connection: socket.socket) -> dict[str, Any]:
    (length,) = struct.unpack("!I", _read(connection, 4))
    if length > _LARGEST_HEADER:
        raise OISDError(f"a header of {length} bytes: this is no stream of weights")
    header: dict[str, Any] = json.loads(_read(connection, length))
    return header


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _read_into(connection, memoryview(data))
    return bytes(data)


def _read_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise EOFError("the connection was closed")
        view = view[count:]


def transfer(
    sender: WeightSender, tensors: Iterable[tuple[str, Tensor]], receive: Callable[[], Any], *, receivers: int = 1
) -> Any:
    """Send while ``receive``, called in a second thread, asks the engine to receive; returns what it returns.

    Raises:
        OISDError: of the two sides' errors the one that caused the other's.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(receive)
        try:
            sender.send(tensors, receivers=receivers, failed=future.done)
        except OISDError as error:
            theirs = future.exception()
            if isinstance(error, TransferError) and theirs is not None:
                raise theirs from error
            raise
        return future.result()
