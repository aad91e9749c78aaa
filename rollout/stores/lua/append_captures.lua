-- Append captured exchanges, and note under which entry each request is found.
-- KEYS: captures (stream), index (sorted set: route|request id by the time of its entry, ms).
-- ARGV: how many to keep, the time before which none are kept (ms), then two for each exchange:
--       its place in the index, the exchange.
for place = 3, #ARGV, 2 do
  local entry = redis.call(
    'XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'exchange', ARGV[place + 1])
  redis.call('ZADD', KEYS[2], string.match(entry, '^%d+'), ARGV[place])
end
redis.call('XTRIM', KEYS[1], 'MINID', '~', ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. ARGV[2])
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -ARGV[1] - 1)
