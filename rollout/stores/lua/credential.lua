-- Add a key or change it (a value is given), or revoke it (none is given).
-- KEYS: credentials (hash), audit (stream), revision (integer).
-- ARGV: key id, ApiKey or '', audit entry, channel, what must stand there before or ''.
-- Returns 1, or 0 when nothing changed.
if ARGV[5] ~= '' and redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[5] then return 0 end
if ARGV[2] == '' then
  if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
else
  if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return 0 end
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', '100000', '*', 'entry', ARGV[3])
redis.call('PUBLISH', ARGV[4], redis.call('INCR', KEYS[3]))
return 1
