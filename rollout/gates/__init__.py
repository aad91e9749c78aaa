"""Gates: rules on evidence that pass, fail, or are inconclusive, with a reason a person can read.

How alpha is spent. Each gate runs an e-process for each of its two sides, so looking often costs
nothing. Let N_g be "the candidate is no worse than stable in what gate g looks at", and M_g "it is
worse there by the margin or more".

- A trial is rolled back where *any* gate fails, and gate g fails at E_g >= 1/alpha_g with E_g
  against N_g and the alpha_g summing to alpha, over the gates that the route asks for, in parts that
  the policy may set. By Ville's inequality gate g ever fails with a chance of at most alpha_g if
  N_g is true. So all gates together ever fail a candidate that is nowhere worse with a chance of at
  most alpha (the union bound, whatever the gates have to do with each other); and whatever is
  worse, the gates that see nothing of it raise false alarms with a chance of at most alpha.
- A step is left only where *all* the gates that its plan names pass, and gate g passes at
  E'_g >= 1/alpha with E'_g against M_g, undivided: if some M_g is true, then leaving takes that
  E'_g >= 1/alpha, which ever happens with a chance of at most alpha (an intersection-union test:
  Berger 1982). The evidence is that of the whole trial, so this holds for all steps together.
- Where both sides are reached, a gate fails: it is sure that the candidate is worse, by less than
  the margin.
- The split check has an alpha of its own. It neither fails a trial nor passes it: it says that
  counts of the two arms can't be compared, so all other gates are inconclusive and a person is
  asked.
"""

from rollout.gates.judging import combine, judge, thresholds
from rollout.gates.rates import RATES, RateGate
from rollout.gates.sides import GateOutcome, Thresholds
from rollout.gates.split import SPLIT
from rollout.gates.wording import in_short

__all__ = [
    "RATES",
    "SPLIT",
    "GateOutcome",
    "RateGate",
    "Thresholds",
    "combine",
    "in_short",
    "judge",
    "thresholds",
]
