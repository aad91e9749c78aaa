"""The shared kernel: versions, rollouts, evidence, cases and the decisions made on them."""
