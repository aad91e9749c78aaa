-- Report a gateway, and forget those that have been silent.
-- KEYS: gateways (hash), seen (sorted set).  ARGV: incarnation, presence, milliseconds to live.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
local gone = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)
for _, incarnation in ipairs(gone) do
  redis.call('HDEL', KEYS[1], incarnation)
  redis.call('ZREM', KEYS[2], incarnation)
end
return #gone
