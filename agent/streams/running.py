"""All streams of the device: started and stopped as the desired state says, fed and reported together."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from pathlib import Path

from agent.outbox.outbox import Outbox
from agent.serving.messages import Request, Respond, Response, answer, refuse
from agent.serving.refusal import Refusal
from agent.slots.active import ActiveModel
from agent.slots.opened import Opened
from agent.streams.local_link import LocalLink, StreamLink
from agent.streams.runner import StreamRunner
from agent.streams.signature import match
from agent.streams.sources.push import PushSource
from edgeward.clock import Clock
from edgeward.errors import EdgewardError, InvalidDocument, PackageError
from edgeward.identifiers import DeviceName
from edgeward.wire.desired import StreamTarget
from edgeward.wire.reports import StreamReport

log = logging.getLogger(__name__)

#: Where applications post samples: `/v1/streams/{stream}/samples`.
PREFIX = "/v1/streams"
#: Seconds after which a sender may try again.
RETRY_AFTER = 1
_TARGET = re.compile(rb"/v1/streams/([a-z0-9-]+)/samples(?:\?.*)?")


class Streams:
    """`apply` and `report` are called by the daemon's thread, `handle` by the local server's loop."""

    def __init__(
        self,
        name: DeviceName,
        outbox: Outbox,
        clock: Clock,
        active: Callable[[str], ActiveModel | None],
        link: LocalLink,
        committed: Callable[[], None],
        folder: Path,
    ) -> None:
        """`folder` is where `file` actions write."""
        self._name = name
        self._outbox = outbox
        self._clock = clock
        self._active = active
        self._link = link
        self._committed = committed
        self._folder = folder
        self._running: dict[str, StreamRunner] = {}
        self._refused: dict[str, tuple[StreamTarget, str]] = {}

    def apply(self, targets: list[StreamTarget]) -> None:
        """Whole wanted state: streams that changed are stopped and started again.

        One that cannot run here is left out; its report carries the reason.
        """
        wanted = {target.name: target for target in targets}
        for name in [name for name, runner in self._running.items() if wanted.get(name) != runner.target]:
            self._running.pop(name).stop()
        self._refused = {name: item for name, item in self._refused.items() if wanted.get(name) == item[0]}
        self._start(
            [target for name, target in wanted.items() if name not in {*self._running, *self._refused}]
        )

    def _start(self, targets: list[StreamTarget]) -> None:
        made = [runner for target in targets if (runner := self._made(target)) is not None]
        for runner in made:
            runner.announce()
        for runner in made:
            self._running[runner.target.name] = runner
            runner.start()

    def _made(self, target: StreamTarget) -> StreamRunner | None:
        try:
            return StreamRunner(
                target,
                self._name,
                self._outbox,
                self._clock,
                self._active,
                StreamLink(self._link),
                self._committed,
                self._folder,
            )
        except EdgewardError as error:
            log.error("stream %s cannot run here: %s", target.name, error)
            self._refused[target.name] = (target, str(error))
            return None

    def problem(self, slot: str, opened: Opened) -> str:
        """Why a stream of this slot cannot feed a model; empty when all can."""
        manifest, runner = opened.package.manifest, opened.runner
        for name, stream in list(self._running.items()):
            if stream.target.spec.slot == slot:
                try:
                    match(
                        stream.target.spec,
                        runner.inputs,
                        runner.outputs,
                        manifest.decision,
                        manifest.features,
                    )
                except (InvalidDocument, PackageError) as error:
                    return f"stream {name}: {error}"
        return ""

    def stop(self) -> None:
        for runner in self._running.values():
            runner.stop()
        self._running.clear()

    def report(self) -> list[StreamReport]:
        """Figures since the last report, of every stream, also of those that do not run.

        A stream that an internal error has ended is reported as such, then started again.
        """
        reports = [runner.report() for runner in self._running.values()]
        reports += [
            StreamReport(name, "", 0, 0, 0, 0, reason=reason) for name, (_, reason) in self._refused.items()
        ]
        for name in [name for name, runner in self._running.items() if runner.failed]:
            runner = self._running.pop(name)
            runner.stop()
            self._start([runner.target])
        return reports

    def handle(self, request: Request, respond: Respond) -> None:
        """POST /v1/streams/{stream}/samples."""
        match = _TARGET.fullmatch(request.target)
        name = match[1].decode() if match else ""
        runner = self._running.get(name)
        source = runner.push if runner is not None else None
        if name in self._refused:
            reason = self._refused[name][1]
            respond(refuse(Refusal(503, f"the stream does not run: {reason}", retry_after=RETRY_AFTER)))
        elif source is None:
            respond(
                refuse(Refusal(404, f"no stream takes samples at {request.target[:200].decode('latin-1')}"))
            )
        elif request.method != b"POST":
            respond(refuse(Refusal(405, "this path answers POST", allow="POST")))
        else:
            _answer_off_loop(source, request, respond)


def _answer_off_loop(source: PushSource, request: Request, respond: Respond) -> None:
    """Decoding a large body would hold up every model on the loop."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers.items()}

    def done(future: asyncio.Future[tuple[int, bytes]]) -> None:
        error = future.exception()
        if error is not None:
            log.error("samples over HTTP", exc_info=error)
            respond(answer({"error": "internal error, see the agent's log"}, 500))
            return
        status, body = future.result()
        again = ((b"retry-after", b"%d" % RETRY_AFTER),) if status in (429, 503) else ()
        respond(Response(status, [body], headers=again))

    loop = asyncio.get_running_loop()
    loop.run_in_executor(None, source.handle, headers, request.body).add_done_callback(done)
