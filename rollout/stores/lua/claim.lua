-- Lease the cases of highest priority to a labeler, after giving expired leases back.
-- KEYS: cases (hash), open, leased (sorted sets), leases (hash).
-- ARGV: labeler, count, milliseconds of the lease.  Returns the cases.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
  redis.call('ZREM', KEYS[3], id)
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZADD', KEYS[2], cjson.decode(redis.call('HGET', KEYS[1], id)).priority, id)
end
local claimed = {}
for _, id in ipairs(redis.call('ZREVRANGE', KEYS[2], 0, ARGV[2] - 1)) do
  redis.call('ZREM', KEYS[2], id)
  redis.call('ZADD', KEYS[3], now + ARGV[3], id)
  redis.call('HSET', KEYS[4], id, ARGV[1])
  claimed[#claimed + 1] = redis.call('HGET', KEYS[1], id)
end
return claimed
