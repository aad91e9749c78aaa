-- Set what a gateway worker has counted, unless its ledger was closed.
-- KEYS: ledgers (sorted set), closed ledgers (sorted set), ledger (hash).
-- ARGV: ledger's name, seconds to keep, then trial, counts pairs.
-- Returns 1, or 0 where the ledger is closed.
if redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 0 end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], time[1] * 1000 + math.floor(time[2] / 1000), ARGV[1])
-- In pieces, because Lua's stack is bounded.
for first = 3, #ARGV, 1000 do
  redis.call('HSET', KEYS[3], unpack(ARGV, first, math.min(first + 999, #ARGV)))
end
redis.call('EXPIRE', KEYS[3], ARGV[2])
return 1
