"""The `[shadow]` table of the configuration."""

from pydantic import Field, model_validator

from rollout.settings import Section


class ShadowSettings(Section):
    """`concurrency` is how many requests of one shadow process are with the engines at a time.

    deadline_seconds: for one exchange, from taking it to the other version's answer.
    maximum_parked: exchanges that may wait for their version to become resident.
    maximum_waiting: requests in a replica's own queue above which it gets none from the shadow.
    take_over_seconds: an exchange that another shadow has held for so long is taken from it.
    stop_seconds: how long a shadow that was told to stop may finish what it has asked.
    replay_concurrency: requests of a replay that are with the engines at a time.
    replay_wait_seconds: how long a replay waits for room, or for its version to be loaded.
    priority: sent with each request, where engines run with `--scheduling-policy priority`
        (a larger number is served later); others refuse it, so it is not sent by default.
    metrics_port: 0 opens none.
    """

    concurrency: int = Field(4, ge=1)
    deadline_seconds: float = Field(60.0, gt=0)
    maximum_parked: int = Field(64, ge=0)
    maximum_waiting: int = Field(2, ge=0)
    poll_seconds: float = Field(1.0, gt=0)
    take_over_seconds: float = Field(180.0, gt=0)
    stop_seconds: float = Field(10.0, ge=0)
    replay_concurrency: int = Field(2, ge=1)
    replay_wait_seconds: float = Field(900.0, gt=0)
    priority: int | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(0, ge=0, le=65535)

    @model_validator(mode="after")
    def _live_shadows_keep_what_they_hold(self) -> "ShadowSettings":
        if self.take_over_seconds <= self.deadline_seconds:
            raise ValueError(
                "take_over_seconds must be longer than deadline_seconds, or shadows take "
                "exchanges from each other that are being worked on"
            )
        return self
