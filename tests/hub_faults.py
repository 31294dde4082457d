"""Requests that fail on demand: refused with a status, or cut off in the middle of a body."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse


@dataclass
class Fault:
    """What befalls the next `times` requests that match; `status` None cuts the connection."""

    path: str
    method: str | None
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    of_request: bool = False


@dataclass(frozen=True)
class Seen:
    """A request that came; `status` is None where its connection was cut."""

    method: str
    path: str
    status: int | None


class Faults:
    """
    An application around another: it keeps every request in `requests`, and spoils those it was told to.

    Args:
        app (`Callable`): the application that answers.
        transport_of (`Callable`): the transport of the connection of a client `(host, port)`.
    """

    def __init__(self, app: Callable, transport_of: Callable):
        self.app = app
        self.transport_of = transport_of
        self.requests: list[Seen] = []
        self.crashes: list[Exception] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault):
        with self._lock:
            self._faults.append(fault)

    def _take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.method in (None, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _give_back(self, fault: Fault):
        with self._lock:
            fault.times += 1

    async def __call__(self, scope, receive, send):
        method, path = scope["method"], scope["raw_path"].decode()
        fault = self._take(method, path)
        exchange = _Exchange(fault, self.transport_of(scope["client"]), receive, send)
        try:
            if fault is not None and fault.status is not None:
                # The body is read first, so that a client always gets as far as the answer.
                await Request(scope, receive).body()
                answer = JSONResponse({"error": f"refused with {fault.status}"}, fault.status, fault.headers)
                await answer(scope, receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)
                if fault is not None and not exchange.is_cut:
                    self._give_back(fault)
        except ClientDisconnect:
            pass
        except Exception as error:
            self.crashes.append(error)
            raise
        finally:
            self.requests.append(Seen(method, path, None if exchange.is_cut else exchange.status))


class _Exchange:
    """The messages of one request and its answer, up to where they are cut."""

    def __init__(self, fault: Fault | None, transport, receive: Callable, send: Callable):
        cuts = fault is not None and fault.status is None
        self.cuts_request = cuts and fault.of_request
        self.cuts_answer = cuts and not fault.of_request
        self.after = fault.after if cuts else 0
        self.transport = transport
        self._receive = receive
        self._send = send
        self.passed = 0
        self.is_cut = False
        self.status: int | None = None

    async def receive(self) -> dict:
        message = await self._receive()
        if self.cuts_request and not self.is_cut:
            self.passed += len(message.get("body", b""))
            if self.passed > self.after:
                self.is_cut = True
                self.transport.abort()
        return {"type": "http.disconnect"} if self.is_cut else message

    async def send(self, message: dict):
        if self.is_cut:
            return
        is_body = message["type"] == "http.response.body"
        body = message.get("body", b"")
        if self.cuts_answer and is_body and (self.passed + len(body) > self.after or self.after == 0):
            if self.after:
                await self._send({**message, "body": body[: self.after - self.passed], "more_body": True})
            self.is_cut = True
            self.transport.close()
        elif is_body or not self.cuts_answer or self.after:
            self.status = message.get("status", self.status)
            self.passed += len(body) if self.cuts_answer else 0
            await self._send(message)
