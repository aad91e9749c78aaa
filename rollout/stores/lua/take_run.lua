-- Lease the oldest run that waits, or one whose trainer went silent, with a new fencing token.
-- KEYS: runs (hash), queued, leased (sorted sets), fences (hash), fence (integer),
--       workers (hash).
-- ARGV: milliseconds of the lease, trainer.  Returns {run, fence}, or nothing.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local id = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, 1)[1]
if not id then
  id = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not id then return {} end
  redis.call('ZREM', KEYS[2], id)
end
local fence = redis.call('INCR', KEYS[5])
redis.call('HSET', KEYS[4], id, fence)
redis.call('HSET', KEYS[6], id, ARGV[2])
redis.call('ZADD', KEYS[3], now + ARGV[1], id)
return {redis.call('HGET', KEYS[1], id), fence}
