-- Settle a captured exchange, count its pair and offer its case: all of it once, or none of it.
-- KEYS: what tells whether it was settled (the stream of captures, or a replay's set), cases
--       (hash), open, waiting (sorted sets), prompts (hash), dropped (hash), created (sorted set),
--       tallies (hash), rows (list), then the hashes to count in.
-- ARGV: group ('' where KEYS[1] is a set), entry id, case id ('' for none), case, priority,
--       created (ms), prompt digest, route, maximum cases, seconds to keep, name of the tally of
--       offered cases, row ('' for none), maximum rows, then three for each count: number of its
--       key, field, how many.
-- Returns {counted, offered}: counted is 0 when the entry had been settled before.
if ARGV[1] == '' then
  if redis.call('SADD', KEYS[1], ARGV[2]) == 0 then return {0, 0} end
  redis.call('EXPIRE', KEYS[1], ARGV[10])
elseif redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then
  return {0, 0}
end
for place = 14, #ARGV, 3 do
  local key = KEYS[tonumber(ARGV[place])]
  redis.call('HINCRBY', key, ARGV[place + 1], ARGV[place + 2])
  redis.call('EXPIRE', key, ARGV[10])
end
if ARGV[12] ~= '' then
  redis.call('RPUSH', KEYS[9], ARGV[12])
  redis.call('LTRIM', KEYS[9], 0, ARGV[13] - 1)
  redis.call('EXPIRE', KEYS[9], ARGV[10])
end
if ARGV[3] == '' then return {1, 0} end
if redis.call('ZCARD', KEYS[4]) >= tonumber(ARGV[9]) then
  redis.call('HINCRBY', KEYS[6], ARGV[8], 1)
  return {1, 0}
end
if redis.call('HSETNX', KEYS[5], ARGV[7], ARGV[3]) == 0 then return {1, 0} end
redis.call('EXPIRE', KEYS[5], ARGV[10])
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
redis.call('ZADD', KEYS[3], ARGV[5], ARGV[3])
redis.call('ZADD', KEYS[4], ARGV[6], ARGV[3])
redis.call('ZADD', KEYS[7], ARGV[6], ARGV[3])
redis.call('HINCRBY', KEYS[8], ARGV[11], 1)
return {1, 1}
