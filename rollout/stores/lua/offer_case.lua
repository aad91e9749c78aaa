-- Put a case before people that no exchange brought; one that is or was there is left alone.
-- KEYS: cases (hash), open, waiting, created (sorted sets), dropped, tallies (hashes).
-- ARGV: case id, case, priority, created (ms), route, maximum cases, name of the tally of offered
--       cases.
-- Returns 1, or 0 where the case was there or the queue is full.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return 0 end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[6]) then
  redis.call('HINCRBY', KEYS[5], ARGV[5], 1)
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[4], ARGV[1])
redis.call('HINCRBY', KEYS[6], ARGV[7], 1)
return 1
