"""Requests that fail on demand: refused with a status, or cut off in the middle of a body."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse


@dataclass
class Fault:
    """A fault of the next `times` requests that match. If `status` is None, the connection is cut."""

    path: str
    method: str | None
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    of_request: bool = False

    def claim(self) -> bool:
        """Use up one of the `times`. Returns whether one was left."""
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Seen:
    """A request that came. Its `status` is None if its connection was cut."""

    method: str
    path: str
    status: int | None


class Faults:
    """
    An application around another one. It keeps every request in `requests`, and makes those fail that it was told to.

    Args:
        app (`Callable`): the application that answers.
        transport_of (`Callable`): the transport of the connection of a client `(host, port)`.
    """

    def __init__(self, app: Callable, transport_of: Callable):
        self.app = app
        self.transport_of = transport_of
        self.faults: list[Fault] = []
        self.requests: list[Seen] = []
        self.crashes: list[Exception] = []

    async def __call__(self, scope, receive, send):
        method, path = scope["method"], scope["raw_path"].decode()
        matching = (f for f in self.faults if f.times > 0 and f.method in (None, method) and re.search(f.path, path))
        fault = next(matching, None)
        exchange = _Exchange(fault, self.transport_of(scope["client"]), receive, send)
        exchange.on_end = lambda: self.requests.append(Seen(method, path, exchange.status))
        try:
            if fault is not None and fault.status is not None and fault.claim():
                # The body is read first, so that a client always gets as far as the answer.
                await Request(scope, receive).body()
                answer = JSONResponse({"error": f"refused with {fault.status}"}, fault.status, fault.headers)
                await answer(scope, receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.end()
        except Exception as error:
            self.crashes.append(error)
            raise


class _Exchange:
    """The messages of a request and its answer, up to where they are cut."""

    on_end: Callable[[], None]

    def __init__(self, fault: Fault | None, transport, receive: Callable, send: Callable):
        self.fault = fault if fault is not None and fault.status is None else None
        self.transport = transport
        self._receive = receive
        self._send = send
        self.passed = 0
        self.status: int | None = None
        self.ended = False

    def end(self):
        # Noted before the client sees the end, so that its next request is noted later.
        if not self.ended:
            self.ended = True
            self.on_end()

    async def receive(self) -> dict:
        message = await self._receive()
        if self.fault is not None and self.fault.of_request and not self.ended:
            self.passed += len(message.get("body", b""))
            # Only if the body gets that far. A shorter one leaves the fault to the next request.
            if self.passed > self.fault.after and self.fault.claim():
                self.end()
                self.transport.abort()
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: dict):
        if self.ended:
            return
        if self.fault is not None and not self.fault.of_request:
            body = message.get("body", b"")
            silent = self.fault.after == 0
            if (silent or self.passed + len(body) > self.fault.after) and self.fault.claim():
                if not silent:
                    await self._send({**message, "body": body[: self.fault.after - self.passed], "more_body": True})
                self.status = None
                self.end()
                self.transport.close()
                return
            self.passed += len(body)
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.end()
        await self._send(message)
