-- Add a silent ledger to what is past and close it for ever; what was read must still be true.
-- KEYS: ledgers (sorted set), closed ledgers (sorted set), ledger (hash),
--       then the evidence (hash) of each trial in it.
-- ARGV: ledger's name, latest report for it to be silent (ms), seconds to keep,
--       then for each trial: its field in the ledger, the counts there, the past so far ('' for
--       none), the sum of both.
-- Returns 1, or 0 where something was written meanwhile or somebody else has folded it.
local reported = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not reported or tonumber(reported) > tonumber(ARGV[2]) then return 0 end
if redis.call('HLEN', KEYS[3]) ~= #KEYS - 3 then return 0 end
for i = 4, #KEYS do
  local at = (i - 3) * 4
  if redis.call('HGET', KEYS[3], ARGV[at]) ~= ARGV[at + 1] then return 0 end
  if (redis.call('HGET', KEYS[i], 'past') or '') ~= ARGV[at + 2] then return 0 end
end
for i = 4, #KEYS do
  redis.call('HSET', KEYS[i], 'past', ARGV[(i - 3) * 4 + 3])
  redis.call('EXPIRE', KEYS[i], ARGV[3])
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('DEL', KEYS[3])
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[3] * 1000)
return 1
