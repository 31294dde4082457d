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

    async def __call__(self, scope, receive, send):
        method, path = scope["method"], scope["raw_path"].decode()
        fault = self._take(method, path)
        status = None

        async def noted_send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if fault is None:
                await self.app(scope, receive, noted_send)
            elif fault.status is not None:
                # The body is read first, so that a client always gets as far as the answer.
                await Request(scope, receive).body()
                answer = JSONResponse({"error": f"refused with {fault.status}"}, fault.status, fault.headers)
                await answer(scope, receive, noted_send)
            elif fault.of_request:
                await self.app(scope, self._cutting_receive(scope, receive, fault), send)
            else:
                await self.app(scope, receive, self._cutting_send(scope, send, fault))
        except ClientDisconnect:
            pass
        except Exception as error:
            self.crashes.append(error)
            raise
        finally:
            self.requests.append(Seen(method, path, status))

    def _cutting_receive(self, scope, receive, fault: Fault) -> Callable:
        passed = 0

        async def cutting():
            nonlocal passed
            message = await receive()
            passed += len(message.get("body", b""))
            if passed <= fault.after:
                return message
            self.transport_of(scope["client"]).abort()
            return {"type": "http.disconnect"}

        return cutting

    def _cutting_send(self, scope, send, fault: Fault) -> Callable:
        passed = 0

        async def cutting(message):
            nonlocal passed
            transport = self.transport_of(scope["client"])
            if transport is None or transport.is_closing():
                return
            body = message.get("body", b"")
            if message["type"] == "http.response.body":
                if fault.after:
                    await send({**message, "body": body[: fault.after - passed], "more_body": True})
                passed += len(body)
                if passed >= fault.after:
                    transport.close()
            elif fault.after:
                await send(message)

        return cutting
