"""The section `[gateway]`: where it listens and what its limits are."""

from pydantic import Field

from rollout.redaction import RedactionSection
from rollout.settings import Section


class UpstreamSection(Section):
    """Limits on an engine's answer, in seconds; they are kept to within a tenth of a second.

    first_byte_seconds: from the request to the first byte of the body, which for an answer that is
        not streamed is nearly all of it.
    between_bytes_seconds: an engine that is shut down may leave a stream open and silent.
    idle_seconds: vLLM closes a connection that was idle for 5 s, so ours are retired before that.
    """

    connect_seconds: float = Field(2.0, gt=0)
    first_byte_seconds: float = Field(300.0, gt=0)
    between_bytes_seconds: float = Field(60.0, gt=0)
    total_seconds: float = Field(3600.0, gt=0)
    idle_seconds: float = Field(4.0, gt=0)
    maximum_idle: int = Field(512, ge=0)


class HealthSection(Section):
    """When a replica is taken out of the balance, and when it is tried again.

    failures: failures of the engine in a row (never a 4xx) after which it is out.
    open_seconds: how long it stays out before one request may try it; doubled each time it fails
        again, up to maximum_open_seconds.
    resolve_seconds: pause between two looks for the addresses of engines that DNS names.
    """

    check_seconds: float = Field(1.0, gt=0)
    check_timeout_seconds: float = Field(2.0, gt=0)
    failures: int = Field(3, ge=1)
    open_seconds: float = Field(1.0, gt=0)
    maximum_open_seconds: float = Field(30.0, gt=0)
    resolve_seconds: float = Field(5.0, gt=0)


class BalanceSection(Section):
    """How requests are shared out among the replicas that serve a version.

    slow_start_seconds: a replica that came back takes a part that rises to its whole within these.
    affinity: send prompts that begin alike to the same replica, for its prefix cache.
    affinity_characters: how much of a prompt's beginning is looked at.
    affinity_load: a replica with more under way than this times the mean is passed over.
    """

    slow_start_seconds: float = Field(10.0, ge=0)
    affinity: bool = False
    affinity_characters: int = Field(256, ge=1)
    affinity_load: float = Field(1.25, ge=1)


class HedgeSection(Section):
    """Whether a second replica is asked where the first keeps a stream waiting.

    after_seconds: for its first token; None never asks a second one.
    """

    after_seconds: float | None = Field(None, gt=0)


class CaptureSection(Section):
    """Bounds on what waits to be written to the store; what does not fit is dropped and counted."""

    maximum_waiting: int = Field(1000, ge=1)
    maximum_waiting_bytes: int = Field(64 * 2**20, ge=1)
    maximum_exchange_bytes: int = Field(512 * 1024, ge=1)
    batch: int = Field(32, ge=1)
    flush_seconds: float = Field(0.2, gt=0)
    redaction: RedactionSection = RedactionSection()


class AdmissionSection(Section):
    """When requests are answered 503 because the engines have enough to do.

    maximum_waiting: requests in a replica's own queue (vLLM's `num_requests_waiting`) above which
        it takes none while another has room, and where none has, the client is told to come back.
    """

    maximum_waiting: int = Field(512, ge=0)


class FeedbackSection(Section):
    """Bounds on feedback, for each worker.

    maximum_known: the newest requests that can be rated.
    maximum_waiting: what waits to be written to the store; over it the answer is 503.
    maximum_bytes: the body of one.
    """

    maximum_known: int = Field(20_000, ge=2)
    maximum_waiting: int = Field(1000, ge=1)
    maximum_bytes: int = Field(64 * 1024, ge=1)


class GatewaySettings(Section):
    """
    drain_seconds: how long streams may go on after SIGTERM.
    notice_seconds: how long requests are still taken after SIGTERM, so that a balancer that reads
        /readyz now and then loses none.
    stall_seconds: how long a client may take none of an answer that waits for it.
    maximum_inflight: requests at once in one worker; the next is answered 503 with Retry-After.
    retry_ratio: retries on another replica, as a share of all requests.
    maximum_answer_bytes: an answer up to this size is held until it is whole, so that one which
        breaks off can be asked for again; a larger one passes through as it comes.
    """

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    workers: int = Field(1, ge=1)
    backlog: int = Field(2048, ge=1)
    keep_alive_seconds: int = Field(75, ge=1)
    drain_seconds: int = Field(600, ge=0)
    notice_seconds: float = Field(10.0, ge=0)
    maximum_body_bytes: int = Field(16 * 2**20, ge=1)
    body_seconds: float = Field(60.0, gt=0)
    stall_seconds: float = Field(120.0, gt=0)
    maximum_headers: int = Field(200, ge=1)
    maximum_inflight: int = Field(4096, ge=1)
    maximum_answer_bytes: int = Field(2**20, ge=0)
    retry_ratio: float = Field(0.2, ge=0, le=1)
    poll_seconds: float = Field(5.0, gt=0)
    controller_url: str | None = None
    upstream: UpstreamSection = UpstreamSection()
    health: HealthSection = HealthSection()
    balance: BalanceSection = BalanceSection()
    hedge: HedgeSection = HedgeSection()
    admission: AdmissionSection = AdmissionSection()
    capture: CaptureSection = CaptureSection()
    feedback: FeedbackSection = FeedbackSection()
