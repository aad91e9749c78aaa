-- Acknowledge a capture, count its pair and offer its case: all of it once, or none of it.
-- KEYS: captures (stream), pairs (hash), cases (hash), open, waiting (sorted sets),
--       prompts (hash), dropped (hash), created (sorted set), tallies (hash).
-- ARGV: group, entry id, fields to count (comma separated, may be empty),
--       case id ('' for none), case, priority, created (ms), prompt digest, route, maximum cases,
--       seconds to keep, name of the tally of offered cases.
-- Returns {counted, offered}: counted is 0 when the entry had been settled before.
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return {0, 0} end
redis.call('XDEL', KEYS[1], ARGV[2])
for field in string.gmatch(ARGV[3], '[^,]+') do
  redis.call('HINCRBY', KEYS[2], field, 1)
  redis.call('EXPIRE', KEYS[2], ARGV[11])
end
if ARGV[4] == '' then return {1, 0} end
if redis.call('ZCARD', KEYS[5]) >= tonumber(ARGV[10]) then
  redis.call('HINCRBY', KEYS[7], ARGV[9], 1)
  return {1, 0}
end
if redis.call('HSETNX', KEYS[6], ARGV[8], ARGV[4]) == 0 then return {1, 0} end
redis.call('EXPIRE', KEYS[6], ARGV[11])
redis.call('HSET', KEYS[3], ARGV[4], ARGV[5])
redis.call('ZADD', KEYS[4], ARGV[6], ARGV[4])
redis.call('ZADD', KEYS[5], ARGV[7], ARGV[4])
redis.call('ZADD', KEYS[8], ARGV[7], ARGV[4])
redis.call('HINCRBY', KEYS[9], ARGV[12], 1)
return {1, 1}
