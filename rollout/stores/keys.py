"""Every Redis key this system uses, with its type. Nothing else builds a key."""

_PREFIX = "sluice"

# What a gateway must see. Each change increments REVISION and is announced.
REVISION = f"{_PREFIX}:revision"  # integer
ANNOUNCEMENTS = f"{_PREFIX}:announcements"  # channel: the new revision
ROUTES = f"{_PREFIX}:routes"  # hash: route -> Route
ROLLOUTS = f"{_PREFIX}:rollouts"  # hash: route -> Rollout
VERSIONS = f"{_PREFIX}:versions"  # hash: route@number -> Version
VERSION_NUMBERS = f"{_PREFIX}:version-numbers"  # hash: route -> last number given out
CREDENTIALS = f"{_PREFIX}:credentials"  # hash: key id -> ApiKey
RESIDENCY = f"{_PREFIX}:residency"  # hash: replica url -> Residency

# What only the control plane reads.
WANTED = f"{_PREFIX}:wanted"  # sorted set: version name by the time until which it is wanted (ms)
AUDIT = f"{_PREFIX}:audit"  # stream of AuditEntry
GATEWAYS = f"{_PREFIX}:gateways"  # hash: incarnation -> GatewayPresence
GATEWAYS_SEEN = f"{_PREFIX}:gateways:seen"  # sorted set: incarnation by expiry (ms)

# Evidence, as the gateway workers count it.
LEDGERS = f"{_PREFIX}:ledgers"  # sorted set: ledger by its last report (ms)
LEDGERS_CLOSED = f"{_PREFIX}:ledgers:closed"  # sorted set: ledger by when it was folded (ms)

# Limits of keys, settled by the gateways once a second.
QUOTAS_ACTIVE = f"{_PREFIX}:quotas:active"  # sorted set: key id in use, until when it is (ms)

# The shadow's.
CAPTURES = f"{_PREFIX}:captures"  # stream of Exchange
SHADOW_GROUP = "shadow"  # its consumer group
CAPTURE_INDEX = f"{_PREFIX}:captures:index"  # sorted set: route|request id by its entry's time (ms)
REPLAYS = f"{_PREFIX}:replays"  # hash: replay id -> Replay
REPLAYS_QUEUED = f"{_PREFIX}:replays:queued"  # sorted set: id of each not ended, by asking (ms)

# What callers said of answers.
FEEDBACK_UNCLAIMED = f"{_PREFIX}:feedback:unclaimed"  # stream of Feedback without a receipt
FEEDBACK_OF_ANY = f"{_PREFIX}:feedback:*:*"  # pattern: the hashes of all routes and trials
QUESTIONS = f"{_PREFIX}:questions"  # stream of request ids: who answered them?

# Cases and labels.
CASES = f"{_PREFIX}:cases"  # hash: case id -> Case
LABELS = f"{_PREFIX}:labels"  # hash: case id -> its Labels, one a line, oldest first
CASE_LEASES = f"{_PREFIX}:case-leases"  # hash: case id -> labeler
CASES_DROPPED = f"{_PREFIX}:cases-dropped"  # hash: route -> cases that found the queue full

# Training runs.
RUNS = f"{_PREFIX}:runs"  # hash: run id -> TrainingRun
RUNS_QUEUED = f"{_PREFIX}:runs:queued"  # sorted set: run id by the time it was asked for (ms)
RUNS_LEASED = f"{_PREFIX}:runs:leased"  # sorted set: run id by the end of its lease (ms)
RUN_WORKERS = f"{_PREFIX}:runs:workers"  # hash: run id -> the trainer that took it last
RUN_FENCES = f"{_PREFIX}:runs:fences"  # hash: run id -> newest fencing token
RUN_FENCE = f"{_PREFIX}:runs:fence"  # integer: last token given out
RUNS_CANCELLED = f"{_PREFIX}:runs:cancelled"  # set of run ids
RUNS_PAUSED = f"{_PREFIX}:runs:paused"  # set of run ids: paused, or asked to
REPORTS = f"{_PREFIX}:reports"  # hash: report id -> Report
LATEST_REPORTS = f"{_PREFIX}:reports:latest"  # hash: version name -> id of its newest report

# Datasets.
DATASETS = f"{_PREFIX}:datasets"  # hash: digest -> Manifest
SUITES = f"{_PREFIX}:suites"  # hash: digest of the prompts -> SuiteUse

# Evaluation.
SUITE_INDEX = f"{_PREFIX}:suites:index"  # hash: digest of a suite -> SuiteManifest
KEPT_ANSWERS = (
    f"{_PREFIX}:answers:kept"  # hash: version, suite and decoding -> digest of a document
)


def suite_looks(digest: str) -> str:
    """Hash: `version|run` -> Look."""
    return f"{_PREFIX}:suites:looks:{digest}"


def dataset_anchors(route: str) -> str:
    """Hash: digest of a prompt -> that of the prompt by which its cluster is split."""
    return f"{_PREFIX}:dataset-anchors:{route}"


def dataset_held(route: str) -> str:
    """Set of the anchors that were ever held out."""
    return f"{_PREFIX}:dataset-held:{route}"


def runs_queued(kind: str) -> str:
    """Sorted set: id of a run of this kind that waits, by the time it was asked for (ms)."""
    return RUNS_QUEUED if kind == "train" else f"{RUNS_QUEUED}:{kind}"


def runs_leased(kind: str) -> str:
    """Sorted set: id of a run of this kind that a trainer has, by the end of its lease (ms)."""
    return RUNS_LEASED if kind == "train" else f"{RUNS_LEASED}:{kind}"


def history(route: str) -> str:
    """Stream of HistoryEntry, oldest first."""
    return f"{_PREFIX}:history:{route}"


def quota(key_id: str) -> str:
    """Hash: level and time of each limit of a key, and what each gateway worker holds of it."""
    return f"{_PREFIX}:quota:{key_id}"


def month_tokens(period: str) -> str:
    """Hash: key id -> tokens used in the month, by all gateways."""
    return f"{_PREFIX}:tokens:{period}"


def month_tokens_by_worker(period: str) -> str:
    """Hash: `key id|incarnation` -> tokens used in the month, absolute for that incarnation."""
    return f"{_PREFIX}:tokens:{period}:by-worker"


def ledger(name: str) -> str:
    """Hash: `route|trial` -> what one gateway worker counted, absolute, as rows of numbers."""
    return f"{_PREFIX}:ledger:{name}"


def evidence(route: str, trial: str) -> str:
    """Hash: `past` -> the sum of the ledgers that were folded."""
    return f"{_PREFIX}:evidence:{route}:{trial}"


def units(route: str, trial: str, kind: str) -> str:
    """Bitmap: a bit for each unit that was seen, or that rated an answer."""
    return f"{_PREFIX}:units:{route}:{trial}:{kind}"


def pairs(route: str, trial: str) -> str:
    """Hash: agree, disagree, failed, wins, losses, … -> integer; `floor|…` the same of stable
    beside itself."""
    return f"{_PREFIX}:pairs:{route}:{trial}"


def replay_settled(replay: str) -> str:
    """Set: entries of captures that the replay is done with."""
    return f"{_PREFIX}:replay:{replay}:settled"


def replay_counts(replay: str) -> str:
    """Hash: `kind|…`, `skipped|…`, offered -> integer."""
    return f"{_PREFIX}:replay:{replay}:counts"


def replay_differences(replay: str) -> str:
    """List of Difference."""
    return f"{_PREFIX}:replay:{replay}:differences"


def feedback(route: str, trial: str) -> str:
    """Hash: `key id|request id` -> Feedback; `trial` is empty for requests outside of one."""
    return f"{_PREFIX}:feedback:{route}:{trial}"


def answers(question: str) -> str:
    """List with expiry: what each gateway worker knows of the request in question."""
    return f"{_PREFIX}:answers:{question}"


def verdicts(route: str, trial: str) -> str:
    """String: the latest list of Verdict."""
    return f"{_PREFIX}:verdicts:{route}:{trial}"


def cases_open(route: str) -> str:
    """Sorted set: case id by priority."""
    return f"{_PREFIX}:cases:open:{route}"


def cases_leased(route: str) -> str:
    """Sorted set: case id by the end of its lease (ms)."""
    return f"{_PREFIX}:cases:leased:{route}"


def cases_labelled(route: str) -> str:
    """Sorted set: case id by the time of its label (ms)."""
    return f"{_PREFIX}:cases:labelled:{route}"


def cases_disputed(route: str) -> str:
    """Sorted set: case id by the time of its last label (ms)."""
    return f"{_PREFIX}:cases:disputed:{route}"


def cases_created(route: str) -> str:
    """Sorted set: id of each case in any state, by its creation (ms)."""
    return f"{_PREFIX}:cases:created:{route}"


def case_tallies(route: str) -> str:
    """Hash: name of a tally (rollout/tallies.py) -> how many of the stored cases belong to it."""
    return f"{_PREFIX}:cases:tallies:{route}"


def cases_waiting(route: str) -> str:
    """Sorted set: id of each case that is open or leased, by its creation (ms)."""
    return f"{_PREFIX}:cases:waiting:{route}"


def case_prompts(route: str, trial: str) -> str:
    """Hash: digest of a normalised prompt -> the case that asks about it in this trial."""
    return f"{_PREFIX}:case-prompts:{route}:{trial}"


def lease(name: str) -> str:
    """String with expiry: who holds the lease."""
    return f"{_PREFIX}:lease:{name}"


def lease_fence(name: str) -> str:
    """Integer: last fencing token given out for the lease."""
    return f"{_PREFIX}:lease-fence:{name}"


def run_events(run: str) -> str:
    """Stream of RunEvent."""
    return f"{_PREFIX}:run-events:{run}"
