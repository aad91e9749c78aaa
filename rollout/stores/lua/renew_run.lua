-- Prolong the lease on a run.  KEYS: runs (hash), leased (sorted set), fences (hash),
-- cancelled, paused (sets).  ARGV: run id, fence, milliseconds.
-- Returns {run, cancelled, paused}, or nothing when another trainer has it.
if redis.call('HGET', KEYS[3], ARGV[1]) ~= ARGV[2] then return {} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[2], 'XX', now + ARGV[3], ARGV[1])
return {
  redis.call('HGET', KEYS[1], ARGV[1]),
  redis.call('SISMEMBER', KEYS[4], ARGV[1]),
  redis.call('SISMEMBER', KEYS[5], ARGV[1]),
}
