-- Store a version under a number that was reserved for it.
-- KEYS: versions (hash), audit (stream), revision (integer).
-- ARGV: version name, version, audit entry, channel.  Returns 1, or 0 when it stands already.
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', '100000', '*', 'entry', ARGV[3])
redis.call('PUBLISH', ARGV[4], redis.call('INCR', KEYS[3]))
return 1
