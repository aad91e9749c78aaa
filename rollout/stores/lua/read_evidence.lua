-- All that was counted for some trials, as of one moment.
-- KEYS: evidence (hash) of each trial, then pairs (hash) of each trial, then ledgers (hashes).
-- ARGV: the trials' fields in a ledger.
-- Returns {evidence of each trial, pairs of each trial, JSON array of each ledger}. One string for
-- a ledger, because a value for each trial in it would cost the reader more than all the rest.
local trials = #ARGV
local past, pairs_, ledgers = {}, {}, {}
for i = 1, trials do
  past[i] = redis.call('HGETALL', KEYS[i])
  pairs_[i] = redis.call('HGETALL', KEYS[trials + i])
end
for i = 2 * trials + 1, #KEYS do
  local values = redis.call('HMGET', KEYS[i], unpack(ARGV))
  for j = 1, trials do
    values[j] = values[j] or 'null'
  end
  ledgers[#ledgers + 1] = '[' .. table.concat(values, ',') .. ']'
end
return {past, pairs_, ledgers}
